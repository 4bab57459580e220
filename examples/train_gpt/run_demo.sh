#!/usr/bin/env bash
# Trains the same model from the same seed twice, with FlashAdamW and with torch's AdamW in fp32, then shows both.
# usage: run_demo.sh TRAIN_GPT [OUT_DIR]
# Ctrl-C saves the run at hand; the same command goes on from there. DEMO_OPTIONS="..." adds options to both runs.
set -euo pipefail

if [[ $# -lt 1 || $# -gt 2 ]]; then
  sed -n '3,4s/^# //p' "$0" >&2
  exit 2
fi
program=$1
out=${2:-demo_out}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
read -r -a optimizers <<<"${DEMO_OPTIMIZERS:-flash-adamw torch-adamw}"
read -r -a options <<<"${DEMO_OPTIONS:-}"
runs=()
# Waiting threads shall sleep: where they spin, steps were measured 4 to 7 times slower on a busy machine.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

mkdir -p "$out"
data=$out/topics.txt
unfinished=$out/.unfinished  # there while a demo is under way: the next call keeps what that one has finished
if [[ ! -e $unfinished ]]; then
  for optimizer in "${optimizers[@]}"; do rm -f "$out/$optimizer/"{checkpoint.pt,summary.json}; done
  "$python" "$here/topics_text.py" "$data"
  touch "$unfinished"
fi

for optimizer in "${optimizers[@]}"; do
  run=$out/$optimizer
  runs+=("$run")
  echo "== $optimizer"
  code=0
  if [[ -e $run/summary.json ]]; then
    echo "finished before"
  elif [[ -e $run/checkpoint.pt ]]; then
    "$program" --resume --out "$run" "${options[@]}" || code=$?
  else
    "$program" --data "$data" --optimizer "$optimizer" --out "$run" "${options[@]}" || code=$?
  fi
  if [[ $code -gt 128 ]]; then echo "or, for the whole demo: the same command again"; fi
  if [[ $code -ne 0 ]]; then exit "$code"; fi
  echo
done

"$python" "$here/compare.py" "${runs[@]}" | tee "$out/table.txt"
echo
"$python" "$here/plot_losses.py" "${runs[@]}" "$out/losses.png" || echo "(no plot)"
echo "metrics: ${runs[*]/%//metrics.jsonl}"
rm -f "$unfinished"
