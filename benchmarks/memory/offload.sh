#!/usr/bin/env bash
# Offloaded states against resident ones, at Llama-3.1-8B's shape: 8,192 tokens a step, every block checkpointed, loss
# in chunks, gradient release. usage: [QUICK=1] benchmarks/memory/offload.sh OUT
set -u
out=$1
here=$(dirname "$0")
mkdir -p "$out"
steps=${STEPS:-8} batch=4
run() {
  local name=$1
  shift
  timeout 240 python3 "$here/llama_shape.py" --gradient-release --batch $batch --steps "$steps" --out "$out/$name" \
    ${COMMIT:+--commit "$COMMIT"} "$@" 2>&1 | grep -v '^\[llama_shape\].*step [0-9]* of' | tee "$out/$name.log"
}
run resident
run offload --offload --cap 24 --offload-buffer "${BUFFER:-1}" --trace "$out/timeline.json"
run clip --offload --cap 24 --clip exact
if [ -z "${QUICK:-}" ]; then
  run wide --offload --cap 24 --offload-buffer 2
  export CUBLAS_WORKSPACE_CONFIG=:4096:8
  steps=20
  run resident-bits --deterministic --checksum
  run offload-bits --deterministic --checksum --offload --cap 24
  steps=4
  run fp32 --offload --fp32-states --cap 24
fi
