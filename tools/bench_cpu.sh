#!/usr/bin/env bash
# Times the CPU step beside torch's AdamW and writes benchmarks/results/<machine>.md. Needs an otherwise idle machine.
# usage: tools/bench_cpu.sh [step_benchmark's options]      e.g. --full --benchmark_filter='lion/.*/n:67108864'
# MACHINE=name names the result; REPETITIONS=5 of every benchmark take turns, and medians are reported.
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
source tools/common.sh

configure build/bench dev -DCMAKE_BUILD_TYPE=Release -DFLASHOPTIM_BUILD_BENCHMARKS=ON -DFLASHOPTIM_BUILD_TESTS=OFF \
  -DFLASHOPTIM_BUILD_EXAMPLES=OFF >build/bench-configure.log 2>&1 || { cat build/bench-configure.log; exit 1; }
build build/bench step_benchmark
program=build/bench/benchmarks/step/step_benchmark
common=(--benchmark_enable_random_interleaving=true --benchmark_repetitions="${REPETITIONS:-5}" --benchmark_min_time=0.2
  --benchmark_display_aggregates_only=true --benchmark_out_format=json)

files=(build/bench/best.json)
"$program" "${common[@]}" --benchmark_out=build/bench/best.json "$@"
best=$("$python" -c 'import json; print(json.load(open("build/bench/best.json"))["context"]["isa"])')
# The other instruction sets, on the figure that counts.
for isa in avx512 avx2 scalar; do
  [[ $isa != "$best" ]] || continue
  FLASHOPTIM_ISA=$isa "$program" --benchmark_list_tests >/dev/null 2>&1 || continue
  FLASHOPTIM_ISA=$isa "$program" "${common[@]}" --benchmark_out=build/bench/$isa.json \
    --benchmark_filter='rmw|(step/adamw/(default|paper)/bf16/24bit|torch/adamw/fused/fp32)/n:67108864/'
  files+=(build/bench/$isa.json)
done
COMMAND="tools/bench_cpu.sh $*" "$python" tools/bench_table.py "${files[@]}"
