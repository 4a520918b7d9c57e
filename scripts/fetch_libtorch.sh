#!/usr/bin/env bash
# Puts the pinned LibTorch (PyPI wheels) into .deps/libtorch. Repeatable: does nothing when it is already there.
# The wheel's shared libraries do not depend on the Python version, so one fixed wheel serves every distribution.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

version=2.11.0
target="$root/.deps/libtorch"
stamp="$target/.complete-$version"
if [ -e "$stamp" ]; then
  say "LibTorch $version: already in $target"
  exit 0
fi
download="$root/.deps/wheels"
mkdir -p "$download"

required_kib=2000000
free_kib=$(df -Pk "$download" | awk 'NR == 2 {print $4}')
if [ "$free_kib" -lt "$required_kib" ]; then
  echo "LibTorch needs 2 GB below $download, $((free_kib / 1000000)) GB are free." >&2
  exit 1
fi

platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_26 manylinux_2_25 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_x86_64")
done
step "Downloading LibTorch $version (0.5 GB)" "check the network and pip's package index, then run this script again" \
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
  --python-version 3.11 "${platforms[@]}" --dest "$download" \
  "torch==$version" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85

check_sums() {
  (cd "$download" && sha256sum --check --quiet --strict - <<'SUMS'
7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a  torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl
7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548  nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8  nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl
SUMS
  )
}
step "Checking the wheels" "remove $download and run this script again" check_sums

unpack() {
  rm -rf "$target" && mkdir -p "$target" || return 1
  python3 - "$target" "$download"/torch-"$version"-*.whl "$download"/nvidia_cuda_*.whl <<'PY' || return 1
import sys
import zipfile

target, wheels = sys.argv[1], sys.argv[2:]
keep = ("torch/include/", "torch/lib/", "nvidia/")
for wheel in wheels:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [n for n in archive.namelist() if n.startswith(keep)])
PY
  rm -f "$download"/torch-*.whl "$download"/nvidia_*.whl && touch "$stamp"
}
step "Unpacking LibTorch to $target" "free some disk space and run this script again" unpack
