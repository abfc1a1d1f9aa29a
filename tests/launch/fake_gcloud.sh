#!/usr/bin/env bash
# Stands in for gcloud in the tests. Under $CLOUD it keeps:
#     calls       every command, one a line
#     states      what the next questions for the machine's state are answered with, one a line; the last one stays
#     coming      the states that a machine goes through once it is asked for
#     refusal     what `create` says instead of creating anything
#     worker-N/   home directory of worker N; WORKERS of them
# A worker's command runs with that home, and in the test's checkout when it is there.
set -euo pipefail
echo "$*" >>"$CLOUD/calls"
[[ "$1 $2" == "compute tpus" ]]
verb="$3 $4"
shift 4

state() {
  head -n 1 "$CLOUD/states" 2>/dev/null || true
}

value_of() { # --NAME=…
  local argument name="$1"
  shift
  for argument in "$@"; do
    [[ $argument != --"$name"=* ]] || echo "${argument#*=}"
  done
}

end_workers() {
  local worker
  for worker in "$CLOUD"/worker-*; do
    if [[ -f $worker/retro_run/group ]]; then
      kill -KILL -- "-$(cut -d' ' -f1 "$worker/retro_run/group")" 2>/dev/null || true
    fi
    rm -rf "$worker"
  done
}

case "$verb" in
  *" create")
    if [[ -s $CLOUD/refusal ]]; then
      cat "$CLOUD/refusal" >&2
      rm "$CLOUD/refusal"
      exit 1
    fi
    cp "$CLOUD/coming" "$CLOUD/states"
    for ((i = 0; i < WORKERS; i++)); do mkdir "$CLOUD/worker-$i"; done
    ;;
  *" list")
    [[ ! -f $CLOUD/offline ]] || exit 1
    state
    if [[ -f $CLOUD/states ]] && (($(wc -l <"$CLOUD/states") > 1)); then sed -i 1d "$CLOUD/states"; fi
    ;;
  *" delete")
    end_workers
    rm "$CLOUD/states"
    ;;
  "tpu-vm scp" | "tpu-vm ssh")
    if [[ $(state) != ACTIVE && $(state) != READY ]]; then
      echo "ssh: connect to host: Connection timed out" >&2
      exit 255
    fi
    chosen="$(value_of worker "$@")"
    [[ $chosen != all ]] || chosen="$(seq 0 $((WORKERS - 1)))"
    for worker in $chosen; do
      if [[ $verb == "tpu-vm scp" ]]; then
        cp "$1" "$CLOUD/worker-$worker/${2#*:}"
      else
        (cd "$CLOUD/worker-$worker" && HOME="$PWD" WORKER="$worker" bash -c "$(value_of command "$@")")
      fi
    done
    ;;
esac
