#!/usr/bin/env bash
# The README's second command: builds everything and runs every test. The last line sums up, the exit code agrees.
# usage: tools/test.sh [--all]      --all adds the long sweeps (FLASHOPTIM_TEST_ALL=1)
set -uo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} == --all ]] && export FLASHOPTIM_TEST_ALL=1

results=$PWD/build/test-results
rm -rf "$results"
mkdir -p "$results"
phases=()

# phase NAME COMMAND...: runs it, keeps its time and result. Its tests write to $junit.
phase() {
  local name=$1 start=$SECONDS code=0
  junit=$results/$1.xml
  shift
  echo "[test] == $name"
  "$@" || code=$?
  phases+=("$name:$code:$((SECONDS - start))")
  echo "[test] == $name: $([[ $code == 0 ]] && echo ok || echo "failed, exit code $code"), $((SECONDS - start)) s"
  return "$code"
}

# run_ctest DIRECTORY OPTIONS...
run_ctest() {
  local directory=$1
  shift
  ctest --test-dir "$directory" --parallel "$jobs" --output-on-failure --no-tests=error --output-junit "$junit" "$@"
}

build_all() {
  configure build/dev dev -DCMAKE_BUILD_TYPE=Release -DFLASHOPTIM_BUILD_BENCHMARKS=ON && build build/dev
}

python_tests() {
  PYTHONPATH=$PWD/python FLASHOPTIM_OPS_LIBRARY=$PWD/build/dev/libtorch/ops/libflashoptim_ops.so \
    FLASHOPTIM_FRONT_END_BYTES=$PWD/build/dev/tests/front_ends/front_end_bytes \
    "$python" -m pytest tests/python -q --durations=5 --junitxml="$junit"
}

sanitizers() {
  configure build/asan asan && build build/asan && run_ctest build/asan
}

# The CUDA kernels for one architecture, to see that they compile; they run where there is a device.
cuda() {
  local device=OFF architecture=90
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then device=ON architecture=native; fi
  configure build/cuda cuda -DFLASHOPTIM_CUDA_ARCHITECTURES=$architecture -DFLASHOPTIM_BUILD_EXAMPLES=OFF &&
    build build/cuda $([[ $device == ON ]] && echo all || echo flashoptim) || return
  [[ $device == OFF ]] || run_ctest build/cuda --tests-regex cuda
}

finish() {
  "${python:-python3}" tools/sum_up_tests.py "$results" $SECONDS "${phases[@]}"
  exit
}

phase "set-up" tools/setup.sh || finish
source tools/common.sh
if phase "build" build_all; then
  phase "C++ tests" run_ctest build/dev
  [[ ! -d tests/python ]] || phase "Python tests" python_tests
fi
phase "C++ tests with ASan and UBSan" sanitizers
if command -v nvcc >/dev/null && [[ -d src/cuda ]]; then phase "CUDA" cuda; fi
finish
