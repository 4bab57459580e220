#!/usr/bin/env bash
# Builds the torch-free library for 64-bit Arm and runs the tests of its bits under qemu-user: that NEON gives the
# scalar
# loops' bytes, and those of the oracle and the golden files. usage: tools/test_arm.sh [--junit FILE]
# Needs Debian's g++-aarch64-linux-gnu, qemu-user and googletest.
set -euo pipefail
cd "$(dirname "$0")/.."
junit=()
[[ ${1:-} == --junit ]] && junit=(--output-junit "$2")
for needed in aarch64-linux-gnu-g++ qemu-aarch64 /usr/src/googletest/CMakeLists.txt; do
  command -v "$needed" >/dev/null || [[ -e $needed ]] || {
    echo "tools/test_arm.sh: $needed is missing: apt-get install g++-aarch64-linux-gnu qemu-user googletest" >&2
    exit 1
  }
done
source tools/common.sh
toolchain=$PWD/cmake/toolchains/aarch64-linux-gnu.cmake
prefix=$PWD/build/arm/prefix
if [[ ! -e $prefix/lib/libgtest.a ]]; then
  cmake -S /usr/src/googletest -B build/arm/googletest -G Ninja --toolchain "$toolchain" -DBUILD_GMOCK=OFF \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$prefix" -DCMAKE_INSTALL_LIBDIR=lib
  cmake --build build/arm/googletest --parallel "$jobs" --target install
fi
cmake --preset no-torch -B build/arm/flashoptim -G Ninja --toolchain "$toolchain" -DFLASHOPTIM_INSTALL=OFF \
  -DCMAKE_FIND_ROOT_PATH="$prefix" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_EXE_LINKER_FLAGS=-static-libstdc++
build build/arm/flashoptim core_tests isa_tests kernel_tests
# The sweeps of FLASHOPTIM_TEST_ALL would take hours there.
unset FLASHOPTIM_TEST_ALL
export OMP_WAIT_POLICY=passive
ctest --test-dir build/arm/flashoptim --parallel "$jobs" --output-on-failure --no-tests=error "${junit[@]}" \
  --tests-regex '^(core_tests|isa_tests|kernel_tests)\.'
