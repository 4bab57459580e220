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

has_version() {  # has_version PACKAGE PREFIX: is it in .venv, with a version that starts so?
  .venv/bin/python - "$@" 2>/dev/null <<'PY'
import importlib.metadata, sys
sys.exit(not importlib.metadata.version(sys.argv[1]).startswith(sys.argv[2]))
PY
}

if ! has_version torch 2.13.0; then
  say "pip install torch==2.13.0 (the largest part; a few minutes)"
  "${pip[@]}" torch==2.13.0
fi
missing=()
for package in numpy pytest hypothesis matplotlib scikit-learn scikit-build-core ninja; do
  has_version "$package" "" || missing+=("$package")
done
# The machine's own cmake will do where it is new enough.
if ! has_version cmake "" && ! { command -v cmake && cmake --version | awk 'NR == 1 {split($3, v, "."); exit !(v[1] > 3 || v[1] == 3 && v[2] >= 25)}'; } >/dev/null 2>&1; then
  missing+=("cmake")
fi
if ((${#missing[@]})); then
  say "pip install ${missing[*]}"
  "${pip[@]}" "${missing[@]}"
fi
say "ready: $(.venv/bin/python -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")')"
