#!/usr/bin/env bash
# From a fresh machine to a trained model: installs what is missing, builds, fetches the model, runs the main job.
# --tiny runs the same pipeline on a tiny model of its own, without a download. Further arguments go to `rlhf train`.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cd "$root"

config=configs/runs/finance_desk.yaml
tiny=no
if [ "${1:-}" = --tiny ]; then
  tiny=yes
  config=configs/runs/tiny.yaml
  shift
fi

# A second call does the work again, in the same run directory.
start=--overwrite
for argument in "$@"; do
  if [ "$argument" = --resume ]; then start=""; fi
done

scripts/install_dependencies.sh
scripts/build.sh rlhf_program
[ "$tiny" = yes ] || scripts/fetch_model.sh
step "Training with $config" "read the message above; an unfinished run goes on with: build/release/rlhf train $config --resume" \
  build/release/rlhf train "$config" ${start:+"$start"} "$@"
