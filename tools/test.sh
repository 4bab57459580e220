#!/usr/bin/env bash
# The README's second command: builds everything and runs every test. The last line sums up, the exit code agrees.
# usage: tools/test.sh [--all]      --all adds the long sweeps (FLASHOPTIM_TEST_ALL=1)
set -uo pipefail
cd "$(dirname "$0")/.."
[[ ${1:-} == --all ]] && export FLASHOPTIM_TEST_ALL=1
export NINJA_STATUS="[%f/%t, %e s] "

results=$PWD/build/test-results
# How long each phase took when it last went well, "SECONDS NAME" a line; not in $results, which .ci/run removes.
times=$PWD/build/test-times${FLASHOPTIM_TEST_ALL:+-all}.txt
rm -rf "$results"
mkdir -p "$results"
touch "$times"
phases=() ended=() passed=()

# phase NAME NEEDED COMMAND...: plans a phase. It runs where the phase NEEDED ("" for none) went well.
phase() { phases+=("$(printf '%q ' "$@")"); }

# Runs what is planned, keeps times and results. A phase's tests write to $junit.
run_phases() {
  local number=0 planned name needed start code last
  for planned in "${phases[@]}"; do
    eval "set -- $planned"
    name=$1 needed=$2
    shift 2
    number=$((number + 1))
    if [[ -n $needed && " ${passed[*]} " != *" $needed "* ]]; then
      echo "[test] [$number/${#phases[@]}] == $name: not run, because \"$needed\" failed"
      ended+=("$name:not run:0")
      continue
    fi
    last=$(sed -n "s/^\([0-9]*\) $name\$/last time \1 s/p" "$times")
    echo "[test] [$number/${#phases[@]}] == $name ($(date +%H:%M:%S), ${last:-no time known})"
    junit=$results/$name.xml start=$SECONDS code=0
    "$@" || code=$?
    ended+=("$name:$code:$((SECONDS - start))")
    if [[ $code == 0 ]]; then
      passed+=("$name")
      sed -i "/^[0-9]* $name\$/d" "$times"
      echo "$((SECONDS - start)) $name" >>"$times"
      echo "[test] [$number/${#phases[@]}] == $name: ok, $((SECONDS - start)) s"
    else
      echo "[test] [$number/${#phases[@]}] == $name: failed, exit code $code, $((SECONDS - start)) s"
    fi
  done
}

set_up() { tools/setup.sh && source tools/common.sh; }

style() { "$python" tools/style.py --junit "$junit"; }

# run_ctest DIRECTORY OPTIONS...
run_ctest() {
  local directory=$1
  shift
  ctest --test-dir "$directory" --parallel "$jobs" --output-on-failure --no-tests=error --output-junit "$junit" "$@"
}

build_all() {
  configure build/dev dev -DCMAKE_BUILD_TYPE=Release -DFLASHOPTIM_BUILD_BENCHMARKS=ON && build build/dev
}

# A test that hangs ends the run, with every thread's stack, instead of taking its time limit without a word.
python_tests() {
  local hung=$([[ ${FLASHOPTIM_TEST_ALL:-} == 1 ]] && echo 3600 || echo 900)
  PYTHONPATH=$PWD/python FLASHOPTIM_OPS_LIBRARY=$PWD/build/dev/libtorch/ops/libflashoptim_ops.so \
    FLASHOPTIM_FRONT_END_BYTES=$PWD/build/dev/tests/front_ends/front_end_bytes \
    "$python" -m pytest tests/python tests/reliability --durations=5 --junitxml="$junit" \
    -o faulthandler_timeout="$hung" -o faulthandler_exit_on_timeout=true
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

# The NEON loops' bits, under qemu-user; test_arm.sh says which packages that needs.
arm() { tools/test_arm.sh --junit "$junit"; }

phase "set-up" "" set_up
phase "style" "set-up" style
phase "build" "set-up" build_all
phase "C++ tests" "build" run_ctest build/dev
phase "Python tests" "build" python_tests
phase "C++ tests with ASan and UBSan" "set-up" sanitizers
if command -v nvcc >/dev/null; then phase "CUDA" "set-up" cuda; fi
if [[ ${FLASHOPTIM_TEST_ALL:-} == 1 ]]; then phase "C++ tests on Arm" "set-up" arm; fi
run_phases
"${python:-python3}" tools/sum_up_tests.py "$results" $SECONDS "${ended[@]}"
