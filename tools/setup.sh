#!/usr/bin/env bash
# Installs what the build, the tests and the demo need and this machine lacks: Debian packages with apt, Python packages
# with pip into .venv. Does nothing, and needs no network, where everything is there. usage: tools/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "[setup] $*"; }

# ---- Debian packages ------------------------------------------------------------------------------------------------
apt_packages=()
want_apt() { apt_packages+=("$1"); }
command -v g++ >/dev/null || want_apt g++
command -v make >/dev/null || want_apt make
command -v python3 >/dev/null || want_apt python3
{ command -v python3 && python3 -c 'import ensurepip, venv'; } >/dev/null 2>&1 || want_apt python3-venv
[[ -e /usr/include/gtest/gtest.h ]] || want_apt libgtest-dev
[[ -e /usr/include/benchmark/benchmark.h ]] || want_apt libbenchmark-dev
[[ -e /usr/include/CLI/CLI.hpp ]] || want_apt libcli11-dev
[[ -e /usr/include/nlohmann/json.hpp ]] || want_apt nlohmann-json3-dev
[[ -e /usr/include/zlib.h ]] || want_apt zlib1g-dev
if [[ ${FLASHOPTIM_TEST_ALL:-} == 1 ]]; then  # tools/test_arm.sh
  command -v aarch64-linux-gnu-g++ >/dev/null || want_apt g++-aarch64-linux-gnu
  command -v qemu-aarch64 >/dev/null || want_apt qemu-user
  [[ -e /usr/src/googletest/CMakeLists.txt ]] || want_apt googletest
fi

if ((${#apt_packages[@]})); then
  if ! command -v apt-get >/dev/null; then
    say "no apt-get here; please install what these Debian packages hold: ${apt_packages[*]}" >&2
    exit 1
  fi
  as_root=()
  if [[ $(id -u) != 0 ]]; then
    as_root=(sudo)
    command -v sudo >/dev/null || { say "as root, please: apt-get install ${apt_packages[*]}" >&2; exit 1; }
  fi
  say "apt-get install ${apt_packages[*]}"
  "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "${apt_packages[@]}"
fi

# ---- Python packages ------------------------------------------------------------------------------------------------
if ! .venv/bin/python -c 'import pip' 2>/dev/null; then
  say "making .venv with $(python3 --version)"
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { say "python3 must be 3.10 or later" >&2; exit 1; }
  python3 -m venv --clear .venv
fi
pip=(.venv/bin/python -m pip install --disable-pip-version-check --quiet)

# absent PACKAGE[==VERSION]...: those that .venv lacks, or has in another version (of which +cpu, +cu130 is no part)
absent() {
  .venv/bin/python - "$@" <<'PY'
import importlib.metadata
import sys

for wanted in sys.argv[1:]:
    name, _, version = wanted.partition("==")
    try:
        installed = importlib.metadata.version(name).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or version not in ("", installed):
        print(wanted)
PY
}

cmake_is_new_enough() {
  command -v cmake && cmake --version | awk 'NR == 1 {split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25)}'
}

torch=2.13.0
if [[ -n $(absent torch==$torch) ]]; then
  say "pip install torch==$torch (the largest part; a few minutes)"
  "${pip[@]}" torch==$torch
fi
# Formatters and checkers have one version: another would find something else in the same sources.
wanted=(numpy pytest hypothesis matplotlib scikit-learn scikit-build-core ninja typer rich safetensors
  clang-format==18.1.8 ruff==0.17.6 mypy==2.4.1)
cmake_is_new_enough >/dev/null 2>&1 || wanted+=(cmake)
missing=$(absent "${wanted[@]}")
if [[ -n $missing ]]; then
  mapfile -t missing <<<"$missing"
  say "pip install ${missing[*]}"
  # The torch that is there stays, whatever its build (+cpu, +cu130).
  "${pip[@]}" --constraint <(.venv/bin/python -c \
    'import importlib.metadata as m; print("torch==" + m.version("torch"))') "${missing[@]}"
fi
say "ready: $(.venv/bin/python -c \
  'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")')"
