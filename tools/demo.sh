#!/usr/bin/env bash
# The README's first command: trains a GPT on real text with FlashAdamW and with torch's fp32 AdamW, and compares.
# usage: tools/demo.sh [OUT_DIR]      Ctrl-C saves the run at hand; the same command goes on from there.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS

tools/setup.sh
source tools/common.sh
echo "[demo] building examples/train_gpt"
mkdir -p build
configure build/dev dev -DCMAKE_BUILD_TYPE=Release >build/configure.log 2>&1 || { cat build/configure.log; exit 1; }
build build/dev train_gpt
echo "[demo] built after $((SECONDS - started)) s"

PYTHON=$python examples/train_gpt/run_demo.sh build/dev/examples/train_gpt/train_gpt "${1:-demo_out}"
echo "[demo] done in $((SECONDS - started)) s"
