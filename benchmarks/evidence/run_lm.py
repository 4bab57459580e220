"""Trains GPT-2 124M on the kernel's source with several optimizers, then fine-tunes it on the kernel's documentation.

    python run_lm.py --tokens DIRECTORY --work DIRECTORY RUN... [--stop-after SECONDS]

runs what is not finished, in the order given: lm-VARIANT-SEED (100 M tokens of code, see --lm-tokens) and
tune-VARIANT-LR (one pass over the documentation, from lm-fp32-1's weights), with the variants of variants.py. `tune`
stands for all of fine-tuning. At --stop-after, or SIGTERM, the run at hand is saved; the same command then goes on
where it was. --smoke SECONDS tries each run for that long in a folder of its own and prints its speed. --toy is a small
model, for a CPU. Results are work/results/*.json, for report.py.
"""

import argparse
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from lm import Shape, compile_parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_lm import Run, Texts, Training
from variants import VARIANTS

FIRST = "lm-fp32-1"  # the run that fine-tuning starts from
TUNED = ("fp32", "default", "paper", "uncorrected")
TUNING_RATES = ("1e-5", "3e-6")
TOY = Shape(layers=2, dim=64, heads=2, vocabulary=512, context=32)
ATTENTION = {
    "flash": [SDPBackend.FLASH_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "any": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def describe(name: str, arguments: argparse.Namespace, tuning_windows: int) -> Run:
    """The run of a name; ValueError where there is none."""
    task, _, rest = name.partition("-")
    variant, _, last = rest.partition("-")
    shape = TOY if arguments.toy else Shape()
    if variant not in VARIANTS or task not in ("lm", "tune"):
        raise ValueError(f"no run {name!r}: allowed are lm-VARIANT-SEED and tune-VARIANT-LR, of {', '.join(VARIANTS)}")
    every = 2 if arguments.toy else 100
    if task == "lm":
        batch = 8 if arguments.toy else 64
        steps = -(-arguments.lm_tokens // (batch * shape.context))
        return Run(
            name, variant, int(last), "code", steps, batch, 6e-4, 0.1, min(100, steps // 10), every, 256, None, shape
        )
    batch = 8 if arguments.toy else 32
    steps = tuning_windows // batch
    return Run(name, variant, 1, "prose", steps, batch, float(last), 0.1, min(20, steps // 10), 50, 256, FIRST, shape)


def expand(names: list[str]) -> list[str]:
    tuning = [f"tune-{variant}-{rate}" for rate in TUNING_RATES for variant in TUNED]
    return [name for given in names for name in (tuning if given == "tune" else [given])]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--tokens", type=Path, required=True, help="what make_tokens.py wrote")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and results")
    parser.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--stop-at-step", type=int, help="save and stop there, once for every call")
    parser.add_argument("--smoke", type=float, metavar="SECONDS")
    parser.add_argument("--lm-tokens", type=int, default=100_000_000, help="(default: %(default)s)")
    parser.add_argument("--attention", choices=ATTENTION, default="any", help="(default: %(default)s)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--toy", action="store_true")
    arguments = parser.parse_args(argv)
    start, stopped = time.perf_counter(), []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {text}", flush=True)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    if not arguments.eager:
        compile_parts()
    shape = TOY if arguments.toy else Shape()
    texts = Texts(arguments.tokens, shape.context, device)
    names = expand(arguments.runs)
    runs = [describe(name, arguments, texts["prose_train"].count) for name in names]
    folder = arguments.work / "smoke" if arguments.smoke else arguments.work
    if arguments.smoke:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with sdpa_kernel(ATTENTION[arguments.attention], set_priority=True):
        for run in runs:
            limit = [start + arguments.stop_after]

            def wants_stop(step: int, limit: list[float] = limit) -> bool:
                if arguments.smoke and step == 1:  # behind the first step, which compiles
                    limit[0] = time.perf_counter() + arguments.smoke
                return bool(stopped) or time.perf_counter() > limit[0] or step == arguments.stop_at_step

            training = Training(run, texts, folder, device)
            if training.finished:
                say(f"{run.name} is finished")
                continue
            for resume in training.record["resumes"][-1:]:
                say(f"{run.name} resumes: {resume}")
            done = training.train(wants_stop, say)
            if arguments.smoke:
                peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
                losses = training.record["train_loss"]
                say(
                    f"smoke {run.name}: {training.step} steps, {training.speed()} tokens/s, loss {losses[0]} to "
                    f"{losses[-1]}, peak {peak:.1f} GiB, saved {training.checkpoint.stat().st_size / 2**20:.0f} MiB"
                )
                resumed = Training(run, texts, folder, device)
                say(f"smoke {run.name}: {resumed.record['resumes'][-1:]}")
                (folder / f"{run.name}.pt").unlink()
                del resumed
            elif not done:
                say(f"{run.name} is saved at step {training.step} of {run.steps}; the same command goes on")
                return 3
            del training
    say("all runs are finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
