#!/usr/bin/env bash
# Installs what is missing, builds, and runs all tests. Arguments go to ctest, e.g. -L torchfree.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cd "$root"

scripts/install_dependencies.sh
scripts/fetch_libtorch.sh
scripts/build.sh
# Tests use all cores themselves, so they run one after another.
step "Testing" "run the failed test alone: build/release/tests/NAME" \
  ctest --test-dir build/release --output-on-failure --no-tests=error "$@"
