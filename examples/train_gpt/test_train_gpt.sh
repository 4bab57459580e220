#!/usr/bin/env bash
# Smoke test of the whole program: it learns, an interrupted run continues bit for bit, errors say what is wrong.
# usage: test_train_gpt.sh TRAIN_GPT [OPTIMIZER]
set -euo pipefail

program=$1
optimizer=${2:-torch-adamw}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checks=0
export PYTHONDONTWRITEBYTECODE=1
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # spinning threads crawl where other tests run beside this one

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

pass() {
  checks=$((checks + 1))
  echo "ok  $*"
}

# field FILE KEY: a value of a summary.
field() {
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1/summary.json" "$2"
}

# losses DIR: everything in the metrics that is not a time.
losses() {
  python3 - "$1/metrics.jsonl" <<'PY'
import json, sys
for line in open(sys.argv[1]):
    record = json.loads(line)
    print({key: value for key, value in record.items() if key not in ("step_ms", "optimizer_ms", "tokens_per_s")})
PY
}

# same_run A B WHAT: two finished runs agree in every bit.
same_run() {
  diff <(losses "$1") <(losses "$2") >/dev/null || fail "$3: other losses"
  [[ $(field "$1" state_fingerprint) == $(field "$2" state_fingerprint) ]] || fail "$3: other final state"
  pass "$3"
}

# expect_error TEXT ARGUMENTS...: the program fails and its message has the text.
expect_error() {
  local text=$1 output
  shift
  if output=$("$program" "$@" 2>&1); then fail "no error from: $*"; fi
  [[ $output == *"$text"* ]] || fail "expected '$text' from: $* -- got: $output"
  [[ $output != *"terminate called"* ]] || fail "crash instead of an error: $*"
  pass "error: $text"
}

python3 "$here/topics_text.py" "$work/text.txt"
common=(--data "$work/text.txt" --optimizer "$optimizer" --context 64 --batch 8 --warmup 5 --eval-every 10 --sample 20)
full=(--steps 40 --seed 7)

"$program" "${common[@]}" "${full[@]}" --out "$work/whole" >"$work/whole.log"
python3 - "$work/whole" <<'PY' || fail "the loss does not fall"
import json, sys
records = [json.loads(line) for line in open(sys.argv[1] + "/metrics.jsonl")]
summary = json.load(open(sys.argv[1] + "/summary.json"))
assert len(records) == 40 and records[0]["loss"] > 5 and records[-1]["loss"] < 3.3, records[-1]
assert summary["val_loss"] < summary["unigram_loss"], summary
assert summary["memory"]["optimizer_bytes"] > 0 and summary["checkpoint_bytes"] > 0
PY
[[ -s $work/whole/sample.txt ]] || fail "no sample"
pass "40 steps bring the validation loss below a unigram model's"

"$program" "${common[@]}" "${full[@]}" --out "$work/again" >/dev/null
same_run "$work/whole" "$work/again" "the same seed gives the same bits"

"$program" "${common[@]}" "${full[@]}" --out "$work/parts" --stop-after 20 >"$work/parts.log"
grep -q -- "--resume --out $work/parts --eval-every 10 --sample 20" "$work/parts.log" || fail "no resume command"
"$program" --resume --out "$work/parts" --eval-every 10 --sample 20 >/dev/null
same_run "$work/whole" "$work/parts" "stopped after 20 steps and resumed equals uninterrupted"

for signal in INT TERM; do
  run=$work/signal_$signal
  # A script's background processes ignore SIGINT; python starts the program with the default handling.
  code=0
  command=("$program" "${common[@]}" "${full[@]}" --out "$run")
  python3 - "$signal" "$run/metrics.jsonl" "${command[@]}" >"$work/$signal.log" <<'PY' || code=$?
import os, signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
child = subprocess.Popen(sys.argv[3:])
deadline = time.time() + 30
while time.time() < deadline and child.poll() is None:
    if os.path.exists(sys.argv[2]) and len(open(sys.argv[2]).readlines()) >= 5:
        break
    time.sleep(0.01)
child.send_signal(getattr(signal, "SIG" + sys.argv[1]))
sys.exit(child.wait())
PY
  [[ $code -gt 128 ]] || fail "SIG$signal: exit code $code"
  eval "$(sed -n 's/^to resume: *//p' "$work/$signal.log")" >/dev/null
  same_run "$work/whole" "$run" "SIG$signal, then the printed command, equals uninterrupted"
done

"$program" "${common[@]}" "${full[@]}" --out "$work/recompute" --activation-checkpointing >/dev/null
same_run "$work/whole" "$work/recompute" "activation checkpointing changes no bit"

if [[ $optimizer == flash-* ]]; then
  released=("$program" "${common[@]}" "${full[@]}" --gradient-release)
  "$program" "${common[@]}" "${full[@]}" --clip 0 --out "$work/unclipped" >/dev/null
  "${released[@]}" --clip 0 --out "$work/released" >/dev/null
  [[ $(field "$work/unclipped" state_fingerprint) == $(field "$work/released" state_fingerprint) ]] ||
    fail "gradient release changes bits"
  "${released[@]}" --clip two_pass:0.5 --out "$work/two_pass" >/dev/null
  "${released[@]}" --clip two_pass:0.5 --out "$work/two_pass_parts" --stop-after 20 >"$work/two_pass.log"
  "$program" --resume --out "$work/two_pass_parts" --eval-every 10 --sample 20 >/dev/null
  same_run "$work/two_pass" "$work/two_pass_parts" "released and clipped in two passes, stopped and resumed"
  expect_error "Say how to clip" "${common[@]}" --gradient-release --out "$work/x"
else
  expect_error "must be one of flashoptim's" "${common[@]}" --gradient-release --clip 0 --out "$work/x"
fi
expect_error "goes with --gradient-release" "${common[@]}" --clip two_pass --out "$work/x"
expect_error "--clip" "${common[@]}" --clip most --out "$work/x"

"$program" "${common[@]}" "${full[@]}" --out "$work/all_windows" --eval-windows 0 --stop-after 20 \
  >"$work/all_windows.log"
eval "$(sed -n 's/^to resume: *//p' "$work/all_windows.log")" >/dev/null
[[ $(field "$work/whole" state_fingerprint) == $(field "$work/all_windows" state_fingerprint) ]] ||
  fail "--eval-windows changes training"
[[ $(field "$work/whole" val_loss) != $(field "$work/all_windows" val_loss) ]] ||
  fail "--eval-windows 0 evaluates the same"
pass "--eval-windows changes evaluations, also of a resumed run, and no training"

"$program" --data "$here" --tokenizer bpe --vocab-size 300 --optimizer "$optimizer" --context 32 --batch 4 --steps 6 \
  --compute-dtype fp32 --out "$work/bpe" --stop-after 3 >/dev/null
"$program" --resume --out "$work/bpe" --sample 10 >/dev/null
pass "a folder, byte pairs, resumed"

printf 'too short' >"$work/short.txt"
: >"$work/empty.txt"
mkdir "$work/no_text"
printf 'not a checkpoint' >"$work/no_text/checkpoint.pt"
sed 's/a/b/' "$work/text.txt" >"$work/other.txt"
expect_error "--data FILE|DIR is needed" --out "$work/x"
expect_error "does not exist" --data "$work/nowhere" --optimizer "$optimizer" --out "$work/x"
expect_error "holds no text" --data "$work/empty.txt" --optimizer "$optimizer" --out "$work/x"
expect_error "too short" --data "$work/short.txt" --optimizer "$optimizer" --out "$work/x"
expect_error "--model" "${common[@]}" --model huge --out "$work/x"
expect_error "--optimizer" --data "$work/text.txt" --optimizer adagrad --out "$work/x"
expect_error "--steps" "${common[@]}" --steps 0 --out "$work/x"
expect_error "--lr" "${common[@]}" --lr nan --out "$work/x"
expect_error "not finite" "${common[@]}" --lr 1000 --clip 0 --warmup 0 --steps 40 --out "$work/x"
expect_error "holds a run already" "${common[@]}" --out "$work/parts"
expect_error "there is no checkpoint" --resume --out "$work/nowhere"
expect_error "cannot read" --resume --out "$work/no_text"
expect_error '--model "small" differs' --resume --out "$work/parts" --model small
expect_error "--seed 8 differs" --resume --out "$work/parts" --seed 8
expect_error "is not the one this run was started with" --resume --out "$work/parts" --data "$work/other.txt"
if ! nvidia-smi >/dev/null 2>&1; then
  expect_error "finds no CUDA device" "${common[@]}" --device cuda --out "$work/x"
fi

[[ $("$program" --help) == *"--activation-checkpointing"* ]] || fail "--help"
echo "all $checks checks passed with $optimizer"
