# shellcheck shell=bash
# Shared by the scripts of launch/: flags written as --name=value, one-line errors, and --dry_run.
#
# A script declares its flags with their defaults, and PROGRAM gets what stands behind the flags:
#
#     declare -A FLAG=([project]="" [zone]="" [spot]=false)
#     parse_flags "$@"
#     require project "the Google Cloud project"
#
# Arrays with names are of bash 4.

if ((BASH_VERSINFO[0] < 4)); then
  echo "error: ${0##*/} needs bash 4 or newer, this is $BASH_VERSION" >&2
  exit 1
fi

SCRIPT="${0##*/}"
declare -A FLAG=()
DRY_RUN=false
PROGRAM=()

# One line on stderr, exit status 1: as the Python programs answer a user's mistake.
die() {
  echo "error: $*" >&2
  exit 1
}

# What a script does by itself, as opposed to what it starts.
say() {
  echo "$SCRIPT: $*" >&2
}

# The comment at the top of the script.
show_help() {
  sed -n '2,/^[^#]/{/^#SBATCH/d;/^#/s/^# \{0,1\}//p}' "$0"
}

# The arguments as one line that a shell reads back as the same arguments.
quoted() {
  local argument line=""
  for argument in "$@"; do
    if [[ $argument =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      line+=" $argument"
    elif [[ $argument =~ ^(--[A-Za-z0-9_-]+=)(.*)$ ]]; then # only the value: --command='cd retro_jax'
      line+=" ${BASH_REMATCH[1]}$(single_quoted "${BASH_REMATCH[2]}")"
    else
      line+=" $(single_quoted "$argument")"
    fi
  done
  printf '%s\n' "${line# }"
}

single_quoted() {
  local quote="'\\''"
  printf "'%s'" "${1//\'/$quote}"
}

# Runs a command, or prints it under --dry_run.
run() {
  if $DRY_RUN; then
    quoted "$@"
  else
    "$@"
  fi
}

# A line between the commands that --dry_run prints; a shell that reads them skips it.
remark() {
  if $DRY_RUN; then echo "# $*"; fi
}

# Reads --name=value into FLAG[name] (--name alone is true), --dry_run into DRY_RUN and what follows into PROGRAM, from
# `--` or from the first argument that is no flag.
parse_flags() {
  local name
  while (($#)); do
    case "$1" in
      --help) show_help && exit 0 ;;
      --dry_run) DRY_RUN=true ;;
      --)
        PROGRAM=("${@:2}")
        return
        ;;
      --*)
        name="${1%%=*}"
        name="${name#--}"
        [[ -v FLAG[$name] ]] || die "--$name is unknown; flags: $(known_flags)"
        if [[ $1 == *=* ]]; then
          FLAG[$name]="${1#*=}"
        elif [[ ${FLAG[$name]} == true || ${FLAG[$name]} == false ]]; then
          FLAG[$name]=true
        else
          die "--$name needs a value: --$name=VALUE"
        fi
        ;;
      *)
        PROGRAM=("$@")
        return
        ;;
    esac
    shift
  done
}

known_flags() {
  local name
  printf -- '--%s\n' "${!FLAG[@]}" dry_run | sort | tr '\n' ' ' | sed 's/ $//'
}

# require NAME WHAT: the flag must have a value.
require() {
  [[ -n ${FLAG[$1]} ]] || die "--$1 is missing: $2"
}

require_number() {
  [[ ${FLAG[$1]} =~ ^[0-9]+$ ]] || die "--$1 must be a whole number, is '${FLAG[$1]}'"
}

require_switch() {
  [[ ${FLAG[$1]} == true || ${FLAG[$1]} == false ]] || die "--$1 is true or false, is '${FLAG[$1]}'"
}

# Names of machines, jobs and disks: what Google Cloud and Kubernetes accept.
require_name() {
  require "$1" "$2"
  [[ ${FLAG[$1]} =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] ||
    die "--$1 has small letters, digits and hyphens, at most 42, is '${FLAG[$1]}'"
}

require_program() {
  ((${#PROGRAM[@]})) || die "no program to run; write it last: $SCRIPT … python launch/train.py --config=… --workdir=…"
}

require_command() {
  $DRY_RUN || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}
