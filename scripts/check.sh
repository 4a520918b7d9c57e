#!/usr/bin/env bash
# Checks that need no build: format, include layers, spelling, shell scripts. Every check runs; the exit code says whether all
# passed. `scripts/install_dependencies.sh --checks` installs the tools.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cd "$root" || exit 1

failed=()
check() {
  local name=$1
  shift
  if "$@"; then
    say "$name: ok"
  else
    failed+=("$name")
    say "$name: FAILED"
  fi
}

sources() { git ls-files -- '*.h' '*.cpp' '*.cu' '*.cuh'; }
check_format() { sources | xargs clang-format-14 --dry-run -Werror; }
check_spelling() {
  # Test vectors, published templates and word lists are data, not prose.
  git ls-files -- ':!tests/golden' ':!LICENSE' | xargs codespell --ignore-words-list=dout,kown,wieght
}
check_shell() { git ls-files -- '*.sh' .ci/run | xargs shellcheck; }

check "format" check_format
check "include layers" python3 scripts/check_layers.py
check "spelling" check_spelling
check "mutations apply" scripts/mutation_check.py --dry-run
check "shell scripts" check_shell

if [ ${#failed[@]} -gt 0 ]; then
  printf '%s\n' "Failed checks: ${failed[*]}" >&2
  exit 1
fi
