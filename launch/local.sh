#!/usr/bin/env bash
# Starts N processes of a program on this machine, which work together as the hosts of a cluster would.
#
#     launch/local.sh -n 2 python launch/train.py --config=experiments/tiny.py --workdir=runs/tiny
#     launch/local.sh -n 2 --devices=4 python launch/train.py …      # 2 processes with 4 virtual CPU devices each
#
# Each process gets --coordinator, --num_processes and --process_id. Process 0 writes to stdout and stderr as ever; the
# lines of process 1 appear on stderr behind "[1] ", or go to DIR/process-1.log with --logs=DIR.
#
#     -n N            processes
#     --devices=D     virtual CPU devices of each process (JAX_NUM_CPU_DEVICES; else as the environment says)
#     --logs=DIR      files for the output of all processes but the first
#     --port=P        port of the coordinator (else one that is free)
#     --grace=S       seconds between SIGTERM and SIGKILL once a process has failed (10)
#     --dry_run       print the commands
#
# When a process fails the others get 2 seconds to say so and are ended, and its exit status is the script's, not the 75
# with which another one says that it ends because of the first. SIGTERM, SIGINT and SIGHUP are passed on as SIGTERM,
# once, and the programs are waited for: they save. JAX_PLATFORMS is cpu unless the environment sets it.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# 1. Arguments
FLAG=([n]="" [devices]="" [logs]="" [port]="" [grace]=10)
arguments=()
while (($#)); do
  case "$1" in
    -n) arguments+=("--n=${2-}") && shift ;;
    --devices | --logs | --port | --grace) arguments+=("$1=${2-}") && shift ;;
    -h) arguments+=(--help) ;;
    --*) arguments+=("$1") ;;
    *) break ;;
  esac
  (($#)) && shift
done
parse_flags "${arguments[@]}" -- "$@"
[[ ${PROGRAM[0]-} == -- ]] && PROGRAM=("${PROGRAM[@]:1}")
[[ -n ${FLAG[n]} ]] || die "-n is missing: the number of processes, as in $SCRIPT -n 2 python launch/train.py …"
[[ ${FLAG[n]} =~ ^[1-9][0-9]*$ ]] || die "-n is the number of processes, at least 1, is '${FLAG[n]}'"
require_number grace
[[ -z ${FLAG[devices]} ]] || require_number devices
[[ -z ${FLAG[port]} ]] || require_number port
require_program
python="${PYTHON:-python}"
[[ ${PROGRAM[0]} != *.py ]] || PROGRAM=("$python" "${PROGRAM[@]}")
command -v "${PROGRAM[0]}" >/dev/null || die "${PROGRAM[0]}: no such program"

# 2. The commands: the same for all but the number of the process
free_port() { # below those that the system gives to outgoing connections, so that none takes it meanwhile
  "$python" -c '
import random, socket
while True:
    port = random.randrange(15_000, 30_000)
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
            break
        except OSError:
            continue
print(port)'
}
port="${FLAG[port]:-$(free_port)}"
environment=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}")
[[ -z ${FLAG[devices]} ]] || environment+=("JAX_NUM_CPU_DEVICES=${FLAG[devices]}")
command_of() {
  command=(env "${environment[@]}" "${PROGRAM[@]}")
  command+=("--coordinator=127.0.0.1:$port" "--num_processes=${FLAG[n]}" "--process_id=$1")
}
if $DRY_RUN; then
  for ((i = 0; i < FLAG[n]; i++)); do
    command_of "$i"
    echo "$(quoted "${command[@]}") &"
  done
  echo wait
  exit 0
fi

# 3. Start, each process in a group of its own so that it can be ended with everything it has started
[[ -z ${FLAG[logs]} ]] || mkdir -p "${FLAG[logs]}"
pids=()
statuses=()
kill_groups() {
  local pid
  for pid in "${pids[@]}"; do kill -s "$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'kill_groups KILL' EXIT
asked_to_stop=false
trap 'asked_to_stop=true' TERM INT HUP
prefixed() { # the signals of the terminal are for the programs; this ends when its program closes the pipe
  trap '' TERM INT HUP
  exec sed -u "s/^/[$1] /"
}
set -m
for ((i = 0; i < FLAG[n]; i++)); do
  command_of "$i"
  if ((i == 0)); then
    "${command[@]}" </dev/null &
  elif [[ -n ${FLAG[logs]} ]]; then
    "${command[@]}" </dev/null >"${FLAG[logs]}/process-$i.log" 2>&1 &
  else
    "${command[@]}" </dev/null > >(prefixed "$i" >&2) 2>&1 &
  fi
  pids+=("$!")
  statuses+=("")
done
set +m

# 4. Wait for all; the first that fails, or a signal, ends the others
result=0
signalled=false
end_at="" # when to send SIGTERM to those that have not followed by themselves, and SIGKILL
kill_at=""
while true; do
  running=0
  failed=()
  for i in "${!pids[@]}"; do
    [[ -z ${statuses[i]} ]] || continue
    if kill -0 "${pids[i]}" 2>/dev/null; then
      running=$((running + 1))
      continue
    fi
    status=0
    wait "${pids[i]}" || status=$?
    statuses[i]=$status
    ((status == 0)) || failed+=("$i")
  done
  if ((${#failed[@]} && result == 0)); then
    cause=${failed[0]}
    for i in "${failed[@]}"; do
      if ((statuses[cause] == 75)); then cause=$i; fi
    done
    result=${statuses[cause]}
    if $signalled; then # they save together, so the others are nearly done as well
      kill_at=$((SECONDS + 60))
    else
      say "process $cause exited with $result; ending the others"
      end_at=$((SECONDS + 2))
    fi
  fi
  ((running)) || break
  if $asked_to_stop && ! $signalled; then
    signalled=true
    say "passing the signal on to $running processes"
    kill_groups TERM
  fi
  if [[ -n $end_at ]] && ((SECONDS >= end_at)); then
    kill_groups TERM
    kill_at=$((SECONDS + FLAG[grace]))
    end_at=""
  fi
  if [[ -n $kill_at ]] && ((SECONDS >= kill_at)); then
    say "killing $running processes that did not stop"
    kill_groups KILL
    kill_at=""
  fi
  sleep 0.1 || true # Ctrl-C in a terminal ends the sleep too
done
exit "$result"
