#!/usr/bin/env bash
# Runs a program on all workers of a Cloud TPU that is asked for as a queued resource: it comes when there is capacity.
#
#     launch/tpu_queued.sh watch --name=retro --project=P --zone=Z --accelerator=v4-128 \
#         -- python launch/train.py --config=experiments/paper.py:172m --workdir=/mnt/runs/172m …
#
# Commands:
#     watch       all of it: asks for the machine, waits for it, sets it up, starts the program, and after a preemption
#                 asks again, until the program is done; may itself be ended and started again at any time
#     create      asks for the machine
#     describe    what Google Cloud says of the request
#     setup       copies the tree as it is committed to all workers and installs it there
#     run         starts the program on all workers in the background
#     status      one line a worker: idle, running, or how the program ended
#     logs        the end of the program's output, of --worker=0 or all, --lines=50
#     stop        SIGTERM to the program on all workers: it saves and ends
#     delete      deletes the request and the machine
#
# Flags: --name --project --zone always; --accelerator=v4-128 for watch and create; and
#     --runtime_version=V    image of the machine (else the one for the accelerator)
#     --spot                 cheap, may be preempted
#     --internal_ip          connect over the internal network
#     --create_flags='…'     more flags for gcloud's create: --network=… --data-disk=…
#     --prepare='…'          command of every worker before the installation: sudo mount …
#     --poll=30              seconds between two looks of watch
#     --lost_after=600       seconds after which workers that do not answer, or only some of which run, are given up
#     --max_crashes=3        reruns after crashes; a preemption or a save after SIGTERM counts as none
#     --dry_run              print every command instead
#
# Exit status of watch: 0 done, 1 a mistake of the user's or too many crashes, 143 stopped.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/lib.sh
source "$here/lib.sh"
# shellcheck source=launch/tpu_workers.sh
source "$here/tpu_workers.sh"

node_state() {
  local state
  state="$(state_of queued-resources state.state)" || state=UNKNOWN
  if $DRY_RUN; then echo "$state" && return; fi
  case "$state" in
    "") echo absent ;;
    ACTIVE) echo ready ;;
    SUSPENDING | SUSPENDED) echo lost ;;
    FAILED) echo failed ;;
    UNKNOWN) echo unknown ;;
    *) echo waiting ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, DELETING
  esac
}

# The request and the machine that comes of it have the same name.
node_create() {
  local flags more
  read -ra more <<<"${FLAG[create_flags]}"
  flags=("--accelerator-type=${FLAG[accelerator]}" "--runtime-version=${FLAG[runtime_version]}" "${more[@]}")
  ! ${FLAG[spot]} || flags+=(--spot)
  gcloud_tpus queued-resources create "${FLAG[name]}" "--node-id=${FLAG[name]}" "${flags[@]}"
}

node_describe() {
  gcloud_tpus queued-resources describe "${FLAG[name]}"
}

node_delete() {
  gcloud_tpus queued-resources delete "${FLAG[name]}" --force --quiet
}

tpu_main "$@"
