# Sourced by the other scripts: named steps that say what they do, how long it took, and what to do when they fail.
# shellcheck shell=bash

# shellcheck disable=SC2034  # used by the scripts that source this file
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# libgomp's default is to spin at barriers, which costs a factor when another process is busy.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

say() { printf '%s\n' "==> $*"; }

# A function given as command runs without `set -e` (bash's rule behind ||): it must chain its commands itself.
# step "what it does" "what to do when it fails" command...
step() {
  local what=$1 advice=$2 begin=$SECONDS status=0
  shift 2
  say "$what"
  "$@" || status=$?
  if [ "$status" -ne 0 ]; then
    printf '%s\n' "FAILED: $what (exit $status, command: $*)" "What to do: $advice" >&2
    exit "$status"
  fi
  say "$what: done in $((SECONDS - begin)) s"
}
