#!/usr/bin/env bash
# Runs a program on all workers of a Cloud TPU VM, a single machine or a pod.
#
#     launch/tpu_vm.sh watch --name=retro --project=P --zone=Z --accelerator=v4-128 \
#         -- python launch/train.py --config=experiments/paper.py:172m --workdir=/mnt/runs/172m …
#
# Commands:
#     watch       all of it: creates the machine, sets it up, starts the program and starts it again after a preemption,
#                 until it is done; may itself be ended and started again at any time
#     create      creates the machine
#     describe    what Google Cloud says of it
#     setup       copies the tree as it is committed to all workers and installs it there
#     run         starts the program on all workers in the background
#     status      one line a worker: idle, running, or how the program ended
#     logs        the end of the program's output, of --worker=0 or all, --lines=50
#     stop        SIGTERM to the program on all workers: it saves and ends
#     delete      deletes the machine
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
  state="$(state_of tpu-vm state)" || state=UNKNOWN
  if $DRY_RUN; then echo "$state" && return; fi
  case "$state" in
    "") echo absent ;;
    READY) echo ready ;;
    PREEMPTED | TERMINATED | STOPPED) echo lost ;;
    UNKNOWN) echo unknown ;;
    *) echo waiting ;; # CREATING, STARTING, RESTARTING, REPAIRING, DELETING, …
  esac
}

node_create() {
  local flags more
  read -ra more <<<"${FLAG[create_flags]}"
  flags=("--accelerator-type=${FLAG[accelerator]}" "--version=${FLAG[runtime_version]}" "${more[@]}")
  ! ${FLAG[spot]} || flags+=(--spot)
  gcloud_tpus tpu-vm create "${FLAG[name]}" "${flags[@]}"
}

node_describe() {
  gcloud_tpus tpu-vm describe "${FLAG[name]}"
}

node_delete() {
  gcloud_tpus tpu-vm delete "${FLAG[name]}" --quiet
}

tpu_main "$@"
