#!/usr/bin/env bash
# What a TPU VM does for tpu_vm.sh and tpu_queued.sh, which copy this tree to it and call this script on every worker.
#
#     launch/worker.sh install             uv, a Python 3.11 in .venv, this package with the [tpu] extra
#     launch/worker.sh start PROGRAM …     starts it in the background, its output in ~/retro_run/log
#     launch/worker.sh status              one line: HOST idle | running | stopped S | exited S
#     launch/worker.sh logs LINES          the end of the output
#     launch/worker.sh stop                SIGTERM to the program: it saves and exits with 143
#     launch/worker.sh kill                SIGKILL to the program and all it has started
#
# The program outlives the connection that started it. ~/retro_run holds its log, and how it goes: group (of processes,
# in which boot of the machine), pid, stopped (asked to stop), status.
set -euo pipefail
# shellcheck source=launch/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
tree="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
state="$HOME/retro_run"

boot="$(cat /proc/sys/kernel/random/boot_id)"

running() {
  local group started_in
  [[ -f $state/group && ! -f $state/status ]] || return 1
  read -r group started_in <"$state/group"
  [[ $started_in == "$boot" ]] && kill -0 "$group" 2>/dev/null
}

case "${1-}" in
  install)
    # The images of Cloud TPU have Python 3.10; uv brings its own 3.11. The versions are the ones that are tested.
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    export PATH="$HOME/.local/bin:$PATH"
    cd "$tree"
    [[ -x .venv/bin/python ]] || uv venv --quiet --python=3.11 .venv
    uv pip install --quiet --python=.venv/bin/python --constraint=requirements/dev.txt --editable '.[tpu]'
    ;;
  start)
    shift
    PROGRAM=("$@")
    require_program
    ! running || die "$(hostname): a program is running already; stop it first"
    mkdir -p "$state"
    rm -f "$state"/{group,pid,status,stopped}
    cd "$tree"
    [[ ! -d .venv ]] || export PATH="$tree/.venv/bin:$PATH"
    # shellcheck disable=SC2016 # expanded by the new shell
    setsid nohup bash -c '
      "${@:3}" &
      echo "$!" >"$1/pid"
      echo "$$ $2" >"$1/group"
      status=0
      wait "$!" || status=$?
      echo "$status" >"$1/status.new"
      mv "$1/status.new" "$1/status"
    ' worker "$state" "$boot" "${PROGRAM[@]}" >"$state/log" 2>&1 </dev/null &
    until [[ -s $state/group ]]; do sleep 0.05; done
    ;;
  status)
    if running; then
      echo "$(hostname) running"
    elif [[ ! -f $state/group ]]; then
      echo "$(hostname) idle"
    else # a process that is gone without a status went down with its machine
      status=137
      [[ ! -f $state/status ]] || status="$(<"$state/status")"
      [[ -f $state/stopped ]] && echo "$(hostname) stopped $status" || echo "$(hostname) exited $status"
    fi
    ;;
  logs)
    [[ ! -f $state/log ]] || tail -n "${2:-50}" "$state/log"
    ;;
  stop)
    if running; then
      touch "$state/stopped"
      kill -TERM "$(<"$state/pid")"
    fi
    ;;
  kill)
    ! running || kill -KILL -- "-$(cut -d' ' -f1 "$state/group")"
    ;;
  --help) show_help ;;
  *) die "'${1-}' is no command; see launch/worker.sh --help" ;;
esac
