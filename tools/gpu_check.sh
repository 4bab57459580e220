#!/usr/bin/env bash
# Checks the CUDA back end on a machine with a GPU and prints one table.
#
#   tools/gpu_check.sh build DIR     here: builds what travels into DIR (programs that need nothing but a driver)
#   tools/gpu_check.sh run DIR       there: bit equality, front ends, arithmetic, sanitizer, benchmarks; writes
#                                    benchmarks/results/<h100>.md
#
# GPU_CHECK_ARCH (default 90) is the architecture built. GPU_CHECK_FULL=1 also tries every division (a minute), a tensor
# of more than 2^31 elements, and a model of 8B parameters in training (54 GiB of the device's memory).
# GPU_CHECK_LIBTORCH=1 also builds and runs the C++ front end's tests, against the torch of that machine's python3
# (CMake, a compiler, nvcc and GoogleTest needed there; GPU_CHECK_PREFIX: where else CMake finds packages;
# GPU_CHECK_BUILD: a build folder to keep). GPU_CHECK_COMMIT names the commit where there is no git; PYTHON and
# GPU_CHECK_JOBS are build's python3 and number of compilers.
set -u -o pipefail
mode=${1:-} directory=${2:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,13p' "${BASH_SOURCE[0]}" | cut -c3-; exit 2; }
[ -n "$directory" ] || usage

build() {
  cmake -S "$root" -B "$directory-cmake" \
    -DFLASHOPTIM_CUDA=ON -DFLASHOPTIM_BUILD_TORCH=ON -DFLASHOPTIM_BUILD_LIBTORCH_FRONTEND=OFF \
    -DCMAKE_PREFIX_PATH="$(${PYTHON:-python3} -c 'import torch; print(torch.utils.cmake_prefix_path)')" \
    -DFLASHOPTIM_BUILD_TESTS=OFF -DFLASHOPTIM_BUILD_EXAMPLES=OFF -DFLASHOPTIM_CUDA_CHECKS=ON \
    -DCMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON \
    -DFLASHOPTIM_CUDA_ARCHITECTURES="${GPU_CHECK_ARCH:-90}" >/dev/null || exit 1
  cmake --build "$directory-cmake" -j"${GPU_CHECK_JOBS:-2}" \
    --target flashoptim_cuda_test flashoptim_cuda_benchmark plain_cuda flashoptim_ops || exit 1
  local program
  for program in flashoptim_cuda_test flashoptim_cuda_benchmark plain_cuda; do
    cp "$(find "$directory-cmake" -name "$program" -type f -perm -u+x | head -1)" "$directory/" &&
      strip "$directory/$program" || exit 1
  done
  cp "$directory-cmake/libtorch/ops/libflashoptim_ops.so" "$directory/" && strip "$directory/libflashoptim_ops.so"
}

failures=0
# row NAME COMMAND...: one line of the table; the command's output goes to a log.
row() {
  local name=$1 start=$SECONDS result=ok
  local log="$logs/${name// /_}.log"
  shift
  "$@" >"$log" 2>&1 || { result=FAILED; failures=$((failures + 1)); }
  printf '%-44s %-8s %4d s   %s\n' "$name" "$result" $((SECONDS - start)) "$(summary "$log")" |
    tee -a "$logs/checks.txt"
}
# with_package COMMAND...: sees the Python package with the library that was brought.
with_package() { PYTHONPATH="$root/python" FLASHOPTIM_OPS_LIBRARY="$directory/libflashoptim_ops.so" "$@"; }
summary() {
  local telling='PASSED|FAILED  \]|(ERROR|RACECHECK) SUMMARY|^learned|(^|[ =])[0-9]+ (passed|failed|skipped)'
  grep -E "$telling|all quantized |peak [0-9.]+ GiB" "$1" | tail -1 | tr -s ' ='
}

libtorch() {
  local build=${GPU_CHECK_BUILD:-$logs/libtorch}
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$(sed 's/.$/.&/' <<<"${GPU_CHECK_ARCH:-90}")} \
    cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DFLASHOPTIM_CUDA=ON \
    -DFLASHOPTIM_CUDA_ARCHITECTURES="${GPU_CHECK_ARCH:-90}" -DFLASHOPTIM_BUILD_TORCH=ON -DFLASHOPTIM_BUILD_TESTS=ON \
    -DCMAKE_PREFIX_PATH="$(python3 -c 'import torch; print(torch.utils.cmake_prefix_path)');${GPU_CHECK_PREFIX:-}" &&
    cmake --build "$build" -j"$(nproc)" --target libtorch_test && "$build/tests/libtorch/libtorch_test" --gtest_brief=1
}

write_report() {
  local device
  ./flashoptim_cuda_benchmark | tee "$logs/benchmark.txt" || return
  device=$(sed -n 's/^device=[^ ]* \([^ ,]*\).*/\L\1/p' "$logs/facts.txt")
  local report=$root/benchmarks/results/${device:-gpu}.md
  python3 "$root/tools/gpu_report.py" "$logs" "$report" && echo "written: $report"
}

run() {
  logs=$directory/logs
  [ -z "${GPU_CHECK_BUILD:-}" ] || GPU_CHECK_BUILD=$(realpath -m "$GPU_CHECK_BUILD")
  rm -rf "$logs" && mkdir -p "$logs"
  local commit=${GPU_CHECK_COMMIT:-$(git -C "$root" log -1 --format=%h 2>/dev/null || echo unknown)}
  cd "$directory" || exit 1
  chmod +x flashoptim_cuda_test flashoptim_cuda_benchmark plain_cuda
  {
    echo "device=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | head -1)"
    echo "commit=$commit"
    local settings=${GPU_CHECK_FULL:+GPU_CHECK_FULL=$GPU_CHECK_FULL }
    settings+=${GPU_CHECK_LIBTORCH:+GPU_CHECK_LIBTORCH=$GPU_CHECK_LIBTORCH }
    echo "command=${settings}tools/gpu_check.sh run DIR"
  } | tee "$logs/facts.txt"
  row "bits against the CPU, plans, graphs, norm" ./flashoptim_cuda_test --gtest_brief=1
  [ "${GPU_CHECK_FULL:-0}" = 1 ] &&
    row "every division" env FLASHOPTIM_TEST_ALL=1 ./flashoptim_cuda_test --gtest_filter='CudaArithmetic.*'
  row "plain_cuda example" ./plain_cuda
  local has_python=0
  python3 -c 'import pytest, hypothesis, torch' 2>/dev/null && has_python=1
  if [ $has_python = 1 ]; then
    row "Python front end" with_package python3 -m pytest "$root/tests/python/test_cuda.py"
    [ "${GPU_CHECK_FULL:-0}" = 1 ] && row "more than 2^31 elements" with_package env FLASHOPTIM_TEST_ALL=1 \
      python3 -m pytest "$root/tests/python/test_cuda.py" -k two_to_the_31
  else
    echo "Python front end: not checked, python3 has no pytest, hypothesis and torch" | tee -a "$logs/checks.txt"
  fi
  [ "${GPU_CHECK_LIBTORCH:-0}" = 1 ] && row "C++ front end" libtorch
  if command -v compute-sanitizer >/dev/null; then
    local tool
    for tool in memcheck racecheck initcheck; do
      row "sanitizer $tool" timeout 300 compute-sanitizer --tool $tool --error-exitcode 1 \
        ./flashoptim_cuda_test --gtest_brief=1 --gtest_filter='CudaSmall.*'
    done
  else
    echo "sanitizer: not checked, there is no compute-sanitizer" | tee -a "$logs/checks.txt"
  fi
  # Times last, when nothing is being built.
  if [ $has_python = 1 ]; then
    row "torch fused AdamW" python3 "$root/benchmarks/cuda/torch_adamw.py"
    row "host time of step()" with_package python3 "$root/tests/python/measure_step.py" cuda
    [ "${GPU_CHECK_FULL:-0}" = 1 ] && row "a step of 8B parameters in training" with_package \
      python3 "$root/benchmarks/memory/llama_shape.py" --out "$logs/memory" --commit "$commit"
  fi
  write_report || failures=$((failures + 1))
  [ $failures = 0 ] && echo "all checks passed" || echo "$failures checks FAILED: logs in $logs"
  exit $((failures != 0))
}

case $mode in
  build) mkdir -p "$directory" && directory=$(cd "$directory" && pwd) && build ;;
  run) directory=$(cd "$directory" && pwd) && run ;;
  *) usage ;;
esac
