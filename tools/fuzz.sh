#!/usr/bin/env bash
# Builds the targets of tests/fuzz with Clang and runs each. What is found is left in build/fuzz/findings and fails.
# usage: tools/fuzz.sh [SECONDS]      of each target; 600 without
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${1:-600}

compiler=${CXX:-}
for one in clang++ clang++-14 clang++-15 clang++-16; do
  [[ -n $compiler ]] || compiler=$(command -v "$one" || true)
done
if [[ -z $compiler ]]; then
  echo "[fuzz] no clang++ found; please install clang and its libFuzzer (Debian: clang libclang-rt-14-dev)" >&2
  exit 1
fi
tools/setup.sh
source tools/common.sh
findings=$PWD/build/fuzz/findings
mkdir -p "$findings"

# fuzz PRESET TARGET: builds one and runs it; ends the script where it finds something.
fuzz() {
  configure "build/$1" "$1" -DCMAKE_CXX_COMPILER="$compiler"
  build "build/$1" "$2"
  mkdir -p "build/fuzz/corpus/$2"
  echo "[fuzz] $2 for $seconds s"
  "build/$1/tests/fuzz/$2" -max_total_time="$seconds" -max_len=8192 -len_control=0 -print_final_stats=1 \
    -rss_limit_mb=4096 \
    -artifact_prefix="$findings/$2-" "build/fuzz/corpus/$2"
}

fuzz fuzz fuzz_steps
fuzz fuzz-torch fuzz_archives
echo "[fuzz] nothing found"
