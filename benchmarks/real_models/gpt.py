"""Trains examples/train_gpt's model with torch's fp32 AdamW and with FlashAdamW's two codecs, from the same seeds on
the same text with the same hyperparameters.

    python benchmarks/real_models/gpt.py --program build/dev/examples/train_gpt/train_gpt --seeds 3 --jobs 2

Finished runs are not run again, interrupted ones go on where they were. report.py makes tables and pictures.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import runs

VARIANTS = {
    "fp32": ("--optimizer", "torch-adamw"),
    "paper": ("--optimizer", "flash-adamw", "--state-codec", "paper"),
    "default": ("--optimizer", "flash-adamw", "--state-codec", "default"),
    # What bf16 activations change without the optimizer's part in it: fp32 ones over bf16 parameters.
    "default-fp32-activations": ("--optimizer", "flash-adamw", "--state-codec", "default", "--compute-dtype", "fp32"),
}
SAVE_EVERY = 1000


def make_jobs(args: argparse.Namespace, data_hash: str) -> list[dict]:
    return [
        {
            "task": f"gpt_{args.model}",
            "optimizer": "adamw",
            "variant": variant,
            "seed": seed,
            "config": {
                "arguments": list(VARIANTS[variant]) + args.options.split(),
                "model": args.model,
                "steps": args.steps,
                "eval_every": args.eval_every,
                "threads": args.threads,
                "device": args.device,
                "data": data_hash,
            },
        }
        for seed in range(args.first_seed, args.first_seed + args.seeds)
        for variant in args.variants
    ]


def run_folder(out: Path, job: dict) -> Path:
    return out / "train_gpt" / runs.run_name(job)


def steps_done(out: Path, job: dict) -> int:
    try:
        with open(run_folder(out, job) / "metrics.jsonl", "rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def command(job: dict, program: Path, text: Path, folder: Path) -> list[str]:
    """The command line that starts or goes on with a run. A folder that holds a run of another config is emptied."""
    config = job["config"]
    kept = folder / "config.json"
    line = [str(program), "--out", str(folder), "--eval-every", str(config["eval_every"]), "--eval-windows", "0",
            "--save-every", str(SAVE_EVERY), "--sample", "0"]  # fmt: skip
    if (folder / "checkpoint.pt").exists() and kept.exists() and json.loads(kept.read_text()) == config:
        return [*line, "--resume"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept.write_text(json.dumps(config))
    for option in ("model", "steps", "threads", "device"):
        line += [f"--{option}", str(config[option])]
    return [*line, "--data", str(text), "--seed", str(job["seed"]), *config["arguments"]]


def run_job(job: dict, program: Path, text: Path, out: Path) -> dict:
    folder = run_folder(out, job)
    line = command(job, program, text, folder)
    machine = runs.machine(job["config"]["device"], job["config"]["threads"], ("examples/train_gpt",))
    start = time.monotonic()
    # Waiting threads shall sleep: where they spin, steps crawl on a busy machine.
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(job["config"]["threads"])}
    with open(folder / "log.txt", "a") as log:
        code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=os.environ | environment).returncode
    if code != 0 or not (folder / "summary.json").exists():
        raise RuntimeError(f"train_gpt ended with exit code {code}; its output: {folder / 'log.txt'}")
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(metrics) for metrics in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [metrics for metrics in lines if "val_loss" in metrics]
    return job | {
        "machine": machine,
        "final": {"val_loss": summary["val_loss"], "train_loss": summary["train_loss"]},
        "curve": {
            "step": [metrics["step"] for metrics in evaluated],
            "val_loss": [round(metrics["val_loss"], 5) for metrics in evaluated],
        },
        "facts": {
            "parameters": summary["parameters"],
            "bytes_per_parameter": summary["memory"]["bytes_per_parameter"],
            "unigram_loss": summary["unigram_loss"],
        },
        "seconds": time.monotonic() - start,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    program = runs.ROOT / "build/dev/examples/train_gpt/train_gpt"
    parser.add_argument("--program", type=Path, default=program, help="train_gpt, built (default: build/dev's)")
    parser.add_argument(
        "--out", type=Path, default=runs.DEFAULT_FOLDER, help="folder of results (default: build/real_models)"
    )
    parser.add_argument("--data", type=Path, help="text to learn from (default: pydoc's topics, as in make demo)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["fp32", "paper", "default"])
    parser.add_argument("--seeds", type=int, default=3, help="seeds per variant (default: 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a run (default: 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="tiny", help="train_gpt's --model (default: tiny)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--eval-every", type=int, default=160)
    parser.add_argument("--options", default="", help='more options for every run, "--lr 4e-3 --batch 8"')
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    args = parse(arguments)
    if not args.program.exists():
        sys.exit(
            f"gpt.py: there is no {args.program}: build target train_gpt (tools/demo.sh does), or name it by --program"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    text = args.data
    if text is None:
        text = args.out / "topics.txt"
        script = runs.ROOT / "examples/train_gpt/topics_text.py"
        subprocess.run([sys.executable, str(script), str(text)], check=True)
    jobs = make_jobs(args, hashlib.sha256(text.read_bytes()).hexdigest()[:16])
    with ThreadPoolExecutor(args.jobs) as executor:
        return runs.execute(
            jobs,
            args.out,
            executor,
            lambda job: run_job(job, args.program, text, args.out),
            lambda job: min(steps_done(args.out, job) / job["config"]["steps"], 1.0),
        )


if __name__ == "__main__":
    main()
