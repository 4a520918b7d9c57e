#!/usr/bin/env bash
# Runs this library and eager PyTorch alternately on decoding and on a training step, and prints the median of the ratios of
# their speeds (above 1: this library is faster; below 0.5: a step is more than twice as slow).
#   benchmarks/compare_eager.sh MODEL [PAIRS]
# MODEL: Hugging Face directory or GGUF file of a llama; PAIRS: runs of each program per case (3). BUILD_DIR: build/release.
set -euo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1
pairs=${2:-3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${BUILD_DIR:-$root/build/release}
for program in "$build/rlhf" "$build/torch_eager"; do
  if [ ! -x "$program" ]; then
    echo "$program is missing: configure with -DRLHF_BENCHMARKS=ON and build rlhf_program and torch_eager" >&2
    exit 1
  fi
done
# Threads that wait must not spin: they would take the processor from those that work.
export OMP_WAIT_POLICY=passive

# compare NAME FIELD ARGUMENTS...: the same arguments for both programs.
compare() {
  local name=$1 field=$2
  shift 2
  local ours=() eager=()
  for ((i = 0; i < pairs; ++i)); do
    ours+=("$("$build/rlhf" bench "$@" --model "$model" --repetitions 2)")
    eager+=("$("$build/torch_eager" "$@" --model "$model" --repetitions 2)")
  done
  python3 - "$name" "$field" "$pairs" "${ours[@]}" "${eager[@]}" <<'PY'
import json
import statistics
import sys

name, field, pairs = sys.argv[1], sys.argv[2], int(sys.argv[3])
speeds = [json.loads(text)[field] for text in sys.argv[4:]]
ours, eager = speeds[:pairs], speeds[pairs:]
ratios = [a / b for a, b in zip(ours, eager)]
print(f"{name:12} ours {statistics.median(ours):8.1f} tok/s   eager {statistics.median(eager):8.1f} tok/s   "
      f"ratio {statistics.median(ratios):5.2f}   [{min(ratios):.2f}, {max(ratios):.2f}]", flush=True)
PY
}

for batch in 1 8 32 64; do
  compare "decode B$batch" decode_tokens_per_s decode --batch "$batch" --context 64 --new-tokens 32
done
compare "train 1024" tokens_per_s train --tokens 1024 --sequence 128
