#!/usr/bin/env bash
# Configures and builds the release preset; the program is then build/release/rlhf. Arguments are targets; none: everything, tests too.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cd "$root"

jobs=$(nproc)
# The largest files need about 1 GiB of memory each.
memory_gib=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
if [ "$memory_gib" -lt "$jobs" ]; then jobs=$((memory_gib > 1 ? memory_gib : 1)); fi

step "Configuring" "run scripts/install_dependencies.sh; remove build/release if it comes from elsewhere" \
  cmake --preset release -Wno-dev
step "Building with $jobs jobs" "read the first error above; when the compiler was killed, memory ran out: run again" \
  cmake --build --preset release --parallel "$jobs" ${1:+--target} "$@"
