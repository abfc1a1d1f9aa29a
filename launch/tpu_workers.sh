# shellcheck shell=bash
# What tpu_vm.sh and tpu_queued.sh have in common: a TPU VM's workers, and the loop that keeps a program running there.
#
# The script that sources this defines where the machine comes from, and then calls tpu_main "$@":
#     node_state       prints absent, waiting, ready, lost (preempted), failed, or unknown (gcloud does not answer)
#     node_create      asks for the machine
#     node_describe    shows what Google Cloud says of it
#     node_delete      gives it back

TREE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
declare -A FLAG=(
  [name]="" [project]="" [zone]=""             # which machine
  [accelerator]="" [runtime_version]=""        # v4-128; the image, else the one for the accelerator
  [spot]=false [internal_ip]=false             # preemptible and cheap; connect from within the network
  [create_flags]=""                            # more flags for gcloud's create: --network=… --data-disk=…
  [prepare]=""                                 # command of every worker before the installation: mount a disk
  [worker]=0 [lines]=50                        # of logs
  [poll]=30 [lost_after]=600 [max_crashes]=3   # of watch: seconds, seconds, reruns
)

require_machine() {
  require_name name "the name of the TPU VM"
  require project "the Google Cloud project"
  require zone "the zone of the TPU, such as us-central2-b"
  require_switch spot
  require_switch internal_ip
  local name
  for name in lines poll lost_after max_crashes; do require_number "$name"; done
  [[ ${FLAG[worker]} =~ ^(all|[0-9,-]+)$ ]] || die "--worker is a number or all, is '${FLAG[worker]}'"
  require_command gcloud "the Google Cloud CLI, see https://cloud.google.com/sdk"
}

# The image of Cloud TPU for the accelerator, unless one is named.
require_accelerator() {
  require accelerator "the type of the TPU slice, such as v4-128 (tools/plan_topology.py says which one fits)"
  local version="${FLAG[runtime_version]}"
  case "${FLAG[accelerator]}" in
    v[234]-*[0-9]) version="${version:-tpu-ubuntu2204-base}" ;;
    v5litepod-*[0-9]) version="${version:-v2-alpha-tpuv5-lite}" ;;
    v5p-*[0-9]) version="${version:-v2-alpha-tpuv5}" ;;
    v6e-*[0-9]) version="${version:-v2-alpha-tpuv6e}" ;;
    *)
      [[ -n $version ]] ||
        die "--accelerator '${FLAG[accelerator]}' is not of v2- … v4-, v5litepod-, v5p- or v6e-: name a --runtime_version"
      ;;
  esac
  FLAG[runtime_version]="$version"
}

# gcloud_tpus WORDS… : a command of `gcloud compute tpus`, in the project and zone.
gcloud_tpus() {
  run gcloud compute tpus "$@" "--project=${FLAG[project]}" "--zone=${FLAG[zone]}"
}

# state_of KIND FIELD: the state of the machine or the request; nothing when there is none.
state_of() {
  gcloud_tpus "$1" list "--filter=name~\"(^|/)${FLAG[name]}\$\"" "--format=value($2)"
}

# connect ssh|scp WORDS… ; --quiet, as nobody is there to answer its questions.
connect() {
  local flags=(--quiet)
  ! ${FLAG[internal_ip]} || flags+=(--internal-ip)
  gcloud_tpus tpu-vm "$@" "${flags[@]}"
}

# on_workers WORKERS COMMAND: a shell command on all workers, or on one.
on_workers() {
  connect ssh "${FLAG[name]}" "--worker=$1" "--command=$2"
}

# The tree as it is committed, and what it needs, on every worker.
set_up_workers() {
  local archive
  archive="${TMPDIR:-/tmp}/retro_jax-${FLAG[name]}.tar.gz"
  $DRY_RUN || check_tree
  # Joined by `||`, as the caller asks whether all went well, and bash then does not stop at a failure by itself.
  run git -C "$TREE" archive --format=tar.gz "--output=$archive" HEAD || return 1
  connect scp "$archive" "${FLAG[name]}:retro_jax.tar.gz" --worker=all || return 1
  [[ -z ${FLAG[prepare]} ]] || on_workers all "${FLAG[prepare]}" || return 1
  on_workers all "mkdir -p retro_jax && tar -xzf retro_jax.tar.gz -C retro_jax && retro_jax/launch/worker.sh install"
}

check_tree() {
  git -C "$TREE" rev-parse --quiet --verify HEAD >/dev/null ||
    die "$TREE is no git checkout: nothing to copy to the workers"
  [[ -z $(git -C "$TREE" status --porcelain --untracked-files=no) ]] || say "what is not committed is not copied"
}

start_workers() {
  on_workers all "retro_jax/launch/worker.sh start $(quoted "${PROGRAM[@]}")"
}

# One line a worker: HOST idle | running | stopped S | exited S. A worker without the tree is idle.
worker_status() {
  local there=retro_jax/launch/worker.sh
  on_workers all "if [ -x $there ]; then $there status; else echo \"\$(hostname) idle\"; fi"
}

# One word for what `worker_status` printed:
#   idle      nowhere a program: not started yet
#   running   everywhere
#   broken    it runs on some workers only
#   done      ended everywhere with 0
#   stopped   ended, and someone had asked for it
#   mistake   ended with 1, the user's mistake: the same command would fail again
#   saved     ended with 143, saved after SIGTERM: run it again
#   crashed   ended in another way, or a worker went down
# When a worker goes down the others end with 75, which counts as crashed.
verdict() {
  awk '
    $2 == "idle" { idle++ }
    $2 == "running" { running++ }
    $2 == "stopped" { stopped++ }
    $2 == "exited" && $3 == 0 { good++ }
    $2 == "exited" && $3 == 1 { one++ }
    $2 == "exited" && $3 == 143 { saved++ }
    $2 == "exited" && $3 != 0 && $3 != 1 && $3 != 143 { crashed++ }
    END {
      all = idle + running + stopped + good + one + saved + crashed
      if (all == 0) print "silent"
      else if (running == all) print "running"
      else if (running) print "broken"
      else if (idle == all) print "idle"
      else if (stopped) print "stopped"
      else if (crashed || idle) print "crashed"
      else if (saved) print "saved"
      else if (one) print "mistake"
      else print "done"
    }'
}

show_logs() {
  on_workers "${FLAG[worker]}" "retro_jax/launch/worker.sh logs ${FLAG[lines]}"
}

# Keeps PROGRAM running until it is done: asks for the machine, sets it up, starts the program, and after a preemption
# does it all again. What it must know lies on the workers, so this loop may be ended and started again at any time.
# Exits with 0 when the program is done, 1 after a user's mistake or too many crashes, 143 when it was stopped.
watch() {
  if $DRY_RUN; then
    show_watch
    return
  fi
  local state last_state="" statuses word attached=false prepared=false broken_since="" crashes=0
  while true; do
    state="$(node_state)"
    [[ $state != unknown || -n $last_state ]] ||
      die "gcloud cannot tell the state of ${FLAG[name]} in project ${FLAG[project]}, zone ${FLAG[zone]}"
    [[ $state == "$last_state" ]] || say "${FLAG[name]} is $state"
    last_state="$state"
    case "$state" in
      absent)
        attached=false prepared=false
        create_or_wait
        ;;
      lost)
        attached=false prepared=false
        node_delete || say "trying again in ${FLAG[poll]} s"
        ;;
      failed) die "the request ${FLAG[name]} has failed; see '$SCRIPT describe', remove it with '$SCRIPT delete'" ;;
      ready)
        if statuses="$(worker_status 2>/dev/null)"; then word="$(verdict <<<"$statuses")"; else word=silent; fi
        # What an earlier command has left behind tells nothing about this one.
        $attached || [[ $word =~ ^(running|broken|silent)$ ]] || word=idle
        [[ $word == broken || $word == silent ]] || broken_since=""
        case "$word" in
          idle) start_on_machine ;;
          running) attached=true ;;
          broken | silent)
            broken_since="${broken_since:-$SECONDS}"
            if ((SECONDS - broken_since >= FLAG[lost_after])); then
              broken_since=""
              if [[ $word == silent ]]; then # the fault may be on this side: a machine that trains is not given back
                say "for ${FLAG[lost_after]} s the workers have not answered; see '$SCRIPT status'"
              else
                say "for ${FLAG[lost_after]} s the program has run on some workers only; killing it there"
                on_workers all "retro_jax/launch/worker.sh kill" || true
                attached=true
              fi
            fi
            ;;
          done)
            say "done on all workers"
            return 0
            ;;
          stopped)
            say "stopped; the same command goes on"
            return 143
            ;;
          mistake)
            show_logs || true
            say "the program ended with 1, and the same command would again; 'logs --worker=all' shows every worker"
            return 1
            ;;
          saved)
            say "saved after SIGTERM; starting it again"
            start_on_machine
            ;;
          crashed)
            crashes=$((crashes + 1))
            say "crash $crashes of at most ${FLAG[max_crashes]}:" "$(tr '\n' ',' <<<"$statuses")"
            if ((crashes > FLAG[max_crashes])); then
              show_logs || true
              return 1
            fi
            start_on_machine
            ;;
        esac
        ;;
    esac
    sleep "${FLAG[poll]}"
  done
}

# Capacity comes and goes, and is asked for again; any other refusal is the user's to mend.
create_or_wait() {
  local answer
  if answer="$(node_create 2>&1)"; then return; fi
  echo "$answer" >&2
  local passing='capacity|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|DEADLINE_EXCEEDED|already exists|ALREADY_EXISTS'
  grep -qiE "$passing" <<<"$answer" || die "${FLAG[name]} cannot be created"
  say "asking again in ${FLAG[poll]} s"
}

start_on_machine() {
  if ! $prepared; then
    say "setting up the workers"
    set_up_workers || { say "the set-up failed; trying again in ${FLAG[poll]} s" && return; }
    prepared=true
  fi
  if start_workers; then attached=true; else say "starting failed; trying again in ${FLAG[poll]} s"; fi
}

show_watch() {
  remark "1. The machine, asked for until it is there"
  node_create
  node_state
  remark "2. The program"
  set_up_workers
  start_workers
  remark "3. Every ${FLAG[poll]} s; after 143 or a crash the last command of 2 again, until it exits with 0 or 1"
  node_state
  worker_status
  remark "4. After a preemption, then from 1 again"
  node_delete
}

# The command line: a command, its flags, and for watch and run the program.
tpu_main() {
  local command="${1-}"
  [[ $command != --help && -n $command ]] || { show_help && exit 0; }
  shift
  parse_flags "$@"
  case "$command" in
    watch | create | describe | setup | run | status | logs | stop | delete) require_machine ;;
    *) die "'$command' is no command; see $SCRIPT --help" ;;
  esac
  case "$command" in
    watch | create) require_accelerator ;;
  esac
  case "$command" in
    watch | run) require_program ;;
    *) ((${#PROGRAM[@]} == 0)) || die "$command runs no program, found '${PROGRAM[0]}'" ;;
  esac
  case "$command" in
    watch) watch ;;
    create) node_create ;;
    describe) node_describe ;;
    setup) set_up_workers ;;
    run) start_workers ;;
    status) worker_status ;;
    logs) show_logs ;;
    stop) on_workers all "retro_jax/launch/worker.sh stop" ;;
    delete) node_delete ;;
  esac
}
