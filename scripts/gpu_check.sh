#!/usr/bin/env bash
# Everything that needs a GPU, in phases of at most 8 minutes each. Needs no network.
#   scripts/gpu_check.sh [PHASE ...]     phases: build test memcheck racecheck initcheck bench models; none: all, in this order
# `models` times decoding and training of a model with random weights, made by benchmarks/random_model.py (torch, safetensors).
# Results go to $RLHF_GPU_RESULTS (default build/gpu/results): one log per phase and summary.txt.
# `build` alone runs without a GPU, too: its programs need no installed packages and can be carried to the machine with
# the GPU, where the other phases then use them.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
cd "$root"

build=build/gpu
results=${RLHF_GPU_RESULTS:-$build/results}
test_program=$build/tests/device_kernels_test
run_test_program=$build/tests/device_test
bench_program=$build/device_bench
limit_s=480
mkdir -p "$results"

usage() {
  sed -n '2,7s/^# //p' "$0" >&2
  exit 2
}

die() {
  printf '%s\n' "gpu_check: $*" >&2
  exit 1
}

# cuBLASLt and NCCL may only be inside PyTorch's wheels; without them the tests run with the own products, and through the
# host's memory, and say so.
find_libraries() {
  local wheels file
  wheels=$(python3 -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1] / "nvidia")' 2>/dev/null) || return 0
  for file in cu13/lib/libcublasLt.so.13 nccl/lib/libnccl.so.2; do
    if [ -e "$wheels/$file" ]; then export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$wheels/${file%/*}"; fi
  done
}

build() {
  find_nvcc >/dev/null || die "no nvcc: put CUDA's bin folder on PATH, or carry $build from a machine that has it"
  # As few shared libraries as possible, so that the programs run where the Debian packages are not installed.
  cmake -S . -B "$build" -G Ninja -Wno-dev -DCMAKE_BUILD_TYPE=Release -DRLHF_TORCH=OFF -DRLHF_CUDA=ON -DRLHF_BENCHMARKS=ON \
    -DCMAKE_EXE_LINKER_FLAGS="-Wl,--as-needed -static-libstdc++ -static-libgcc" &&
    cmake --build "$build" --parallel "$(nproc)" --target device_kernels_test device_test device_bench rlhf
}

find_nvcc() { command -v nvcc || { [ -x /usr/local/cuda/bin/nvcc ] && echo /usr/local/cuda/bin/nvcc; }; }

find_sanitizer() {
  local folder
  for folder in "" /usr/local/cuda/bin/ /usr/local/cuda/compute-sanitizer/; do
    if command -v "${folder}compute-sanitizer"; then return 0; fi
  done
  return 1
}

need_gpu() {
  [ -x "$test_program" ] || die "$test_program is missing: run the phase build first, or carry it from another machine"
  # Fails with what is missing (driver, GPU, capability) when there is none.
  RLHF_TEST_DEVICES=cuda "$test_program" "without a GPU*" || die "this phase needs a GPU; the reason stands above"
}

# With two GPUs and more this includes runs of several processes (tests/device/ranks_test.cpp); with one they are skipped, and
# say so.
run_tests() {
  local program
  for program in "$test_program" "$run_test_program"; do RLHF_TEST_DEVICES=cuda timeout "$limit_s" "$program" || return 1; done
}

# The first batch of each line shows latency, the last one throughput.
time_models() {
  local model=$results/model batch format tokens
  python3 benchmarks/random_model.py "$model" qwen2.5-0.5b || return 1
  for batch in 1 8 64 256; do
    timeout "$limit_s" "$build/rlhf" bench decode --device cuda --model "$model" --batch "$batch" --context 256 --new-tokens 128 \
      --repetitions 3 || return 1
  done
  for batch in 64 256; do
    for format in auto fp8; do
      timeout "$limit_s" "$build/rlhf" bench decode --device cuda --model "$model" --batch "$batch" --context 2048 --new-tokens 64 \
        --kv-dtype "$format" --repetitions 2 || return 1
    done
  done
  for tokens in "8192 --sequence 1024" "16384 --sequence 2048" "8192 --sequence 1024 --recompute"; do
    # shellcheck disable=SC2086  # several options
    timeout "$limit_s" "$build/rlhf" bench train --device cuda --model "$model" --tokens $tokens --repetitions 3 || return 1
  done
  rm -r "$model"
}

sanitize() {
  local tool=$1 program
  program=$(find_sanitizer) || die "compute-sanitizer is missing: it comes with the CUDA toolkit"
  # The largest shapes take minutes under a sanitizer and touch no code of their own.
  RLHF_TEST_DEVICES=cuda timeout "$limit_s" "$program" --tool "$tool" --error-exitcode 9 --print-limit 20 \
    "$test_program" "[device]~*100000*"
}

run_phase() {
  local phase=$1 begin=$SECONDS status=0
  say "gpu_check: $phase"
  (
    case "$phase" in
      build) build ;;
      test) need_gpu && run_tests ;;
      memcheck | racecheck | initcheck) need_gpu && sanitize "$phase" ;;
      bench) need_gpu && timeout "$limit_s" "$bench_program" --device cuda ;;
      models) need_gpu && time_models ;;
    esac
  ) > >(tee "$results/$phase.log") 2>&1 || status=$?
  printf '%-10s %s in %d s\n' "$phase" "$([ "$status" -eq 0 ] && echo ok || echo "FAILED ($status)")" \
    $((SECONDS - begin)) | tee -a "$results/summary.txt"
  return "$status"
}

find_libraries
phases=("$@")
if [ ${#phases[@]} -eq 0 ]; then phases=(build test memcheck racecheck initcheck bench models); fi
for phase in "${phases[@]}"; do
  case "$phase" in build | test | memcheck | racecheck | initcheck | bench | models) ;; *) usage ;; esac
done
{ date -u +%FT%TZ; git rev-parse HEAD 2>/dev/null || echo "no git"; nvidia-smi -L 2>/dev/null || echo "no nvidia-smi"; } >>"$results/summary.txt"
failed=0
for phase in "${phases[@]}"; do
  # In a subshell with `set -e` of its own: a phase that fails does not stop the others.
  run_phase "$phase" || failed=1
  if [ "$phase" = build ] && [ "$failed" -ne 0 ]; then break; fi
done
say "gpu_check: results in $results"
exit "$failed"
