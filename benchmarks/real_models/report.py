"""Tables, pictures and numbers of finished runs: real_models.md, a PNG per task, and real_models.json, which can itself
be read again.

    python benchmarks/real_models/report.py
    python benchmarks/real_models/report.py --runs benchmarks/results/real_models.json --out elsewhere
"""

import argparse
import io
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import gpt
import runs

BASELINE = "fp32"
FLAT_SHARE = 0.2  # of the steps, at the end, over which the validation loss shall be flat
FLAT_LIMIT = 0.005
FEW_SEEDS = 5  # up to so many, every seed's value is shown
OPTIMIZERS = {"sgd": "SGD, momentum 0.9", "lion": "Lion", "adamw": "AdamW"}
VARIANTS = {
    "fp32": "fp32",
    "paper": "flashoptim, `paper`",
    "default": "flashoptim, `default`",
    "fp32-states": "flashoptim, states in fp32",
    "default-fp32-activations": "flashoptim, `default`, activations in fp32",
}
COLORS = {"fp32": "#222222", "paper": "#d1495b", "default": "#00798c", "fp32-states": "#b07d2b"}
METRICS = {
    "gpt": [
        ("val_loss", "validation loss, nats a byte", 1, 4),
        ("val_loss_tail", "the same, mean over the last fifth", 1, 4),
        ("train_loss", "training loss, whole split", 1, 4),
    ],
    "digits": [
        ("val_loss", "test loss, nats", 1, 5),
        ("accuracy", "test accuracy, %", 100, 2),
        ("train_loss", "training loss, last epoch, nats", 1, 5),
    ],
}
INTRODUCTIONS = {
    "gpt": "`examples/train_gpt`, model `{model}` ({parameters:,} parameters), bytes of pydoc's topics, {steps} steps, "
    "the whole held-out tenth of the text evaluated. fp32: LibTorch's AdamW, parameters and activations in fp32. "
    "flashoptim: FlashAdamW, parameters and gradients in bf16 with 8-bit corrections, activations in bf16. Learning "
    "rate, decay, clipping and batches are the same; the loss of a model that knows byte frequencies only is "
    "{unigram_loss:.3f}.",
    "digits": "A residual network ({parameters:,} parameters, batch norms in fp32) on scikit-learn's digits, {epochs} "
    "epochs, a third of the pictures held out. fp32: `torch.optim`, for Lion 15 lines of torch. flashoptim: parameters "
    "and gradients in bf16 with 8-bit corrections, bf16 arithmetic; its third row has fp32 states and shows what bf16 "
    "alone changes.",
}


def kind(task: str) -> str:
    return task.split("_")[0]


def shared_config(run: dict) -> dict:
    """The config without train_gpt's arguments that make the variant; all the rest is the same for all variants."""
    config = dict(run["config"])
    if "arguments" in config:
        config["arguments"] = config["arguments"][len(gpt.VARIANTS.get(run["variant"], ())) :]
    return config


def group_runs(all_runs: list[dict]) -> dict:
    """{task: {optimizer: {variant: {seed: run}}}}; the runs of one task and optimizer must have one config."""
    groups: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for run in all_runs:
        groups[run["task"]][run["optimizer"]][run["variant"]][run["seed"]] = run
    for task, optimizers in groups.items():
        for optimizer, variants in optimizers.items():
            configs = {
                json.dumps(shared_config(run), sort_keys=True) for seeds in variants.values() for run in seeds.values()
            }
            if len(configs) > 1:
                raise ValueError(f"{task}, {optimizer}: runs of different configs: {'; '.join(sorted(configs))}")
            if BASELINE not in variants:
                raise ValueError(f"{task}, {optimizer}: no {BASELINE} runs to compare with")
    return groups


def tail(run: dict) -> list[tuple[float, float]]:
    """Steps and validation losses of the last fifth of a run."""
    curve = list(zip(run["curve"]["step"], run["curve"]["val_loss"]))
    return [(step, loss) for step, loss in curve if step >= (1 - FLAT_SHARE) * curve[-1][0]]


def value_of(run: dict, metric: str) -> float:
    return statistics.mean(loss for _, loss in tail(run)) if metric == "val_loss_tail" else run["final"][metric]


def compare(variants: dict, metric: str) -> dict:
    """Per variant: values, mean, deviation between seeds, difference to fp32 (also in units of fp32's deviation), and
    mean and standard error of the differences of equal seeds."""

    def deviation(values):
        return statistics.stdev(values) if len(values) > 1 else math.nan

    base = {seed: value_of(run, metric) for seed, run in variants[BASELINE].items()}
    base_mean, spread = statistics.mean(base.values()), deviation(list(base.values()))
    rows = {}
    for variant in order(variants):
        values = {seed: value_of(run, metric) for seed, run in sorted(variants[variant].items())}
        pairs = [value - base[seed] for seed, value in values.items() if seed in base]
        difference = statistics.mean(values.values()) - base_mean
        rows[variant] = {
            "values": values,
            "mean": statistics.mean(values.values()),
            "deviation": deviation(list(values.values())),
            "difference": difference,
            "in_spreads": difference / spread if spread > 0 else math.nan,
            "paired_mean": statistics.mean(pairs) if pairs else math.nan,
            "paired_error": deviation(pairs) / math.sqrt(len(pairs)) if pairs else math.nan,
        }
    return rows


def order(variants: dict) -> list[str]:
    return [name for name in VARIANTS if name in variants] + sorted(set(variants) - set(VARIANTS))


def drift(run: dict) -> float:
    """Change of the validation loss over the last fifth of the steps, by a straight line through its values there
    (single values scatter by more than that)."""
    points = tail(run)
    if len(points) < 3:
        return math.nan
    return statistics.linear_regression(*zip(*points)).slope * FLAT_SHARE * run["curve"]["step"][-1]


def table(optimizers: dict, metric: str, title: str, scale: float, digits: int) -> list[str]:
    lines = [
        f"| {title} | seeds | mean | deviation between seeds | - fp32 | in deviations of fp32 "
        "| same seeds: mean +- error | within |",
        "|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for optimizer in [name for name in OPTIMIZERS if name in optimizers]:
        for variant, row in compare(optimizers[optimizer], metric).items():
            cells = [f"{OPTIMIZERS[optimizer]}: {VARIANTS.get(variant, variant)}", str(len(row["values"]))]
            cells += [f"{scale * row['mean']:.{digits}f}", f"{scale * row['deviation']:.{digits}f}"]
            if variant == BASELINE:
                cells += ["", "", "", ""]
            else:
                known = math.isfinite(row["in_spreads"])
                cells += [f"{scale * row['difference']:+.{digits}f}", f"{row['in_spreads']:+.2f}" if known else ""]
                cells += [f"{scale * row['paired_mean']:+.{digits}f} +- {scale * row['paired_error']:.{digits}f}"]
                cells += [("yes" if abs(row["in_spreads"]) <= 1 else "**no**") if known else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def seed_table(optimizers: dict, metric: str, digits: int) -> list[str]:
    """Every seed's value, where there are few."""
    lines = []
    for optimizer in [name for name in OPTIMIZERS if name in optimizers]:
        rows = compare(optimizers[optimizer], metric)
        seeds = sorted({seed for row in rows.values() for seed in row["values"]})
        if len(seeds) > FEW_SEEDS:
            continue
        if lines:
            lines.append("")
        lines += [
            f"| {OPTIMIZERS[optimizer]} | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
            "|---" * (len(seeds) + 1) + "|",
        ]
        for variant, row in rows.items():
            values = [f"{row['values'][seed]:.{digits}f}" if seed in row["values"] else "" for seed in seeds]
            lines.append(f"| {VARIANTS.get(variant, variant)} | " + " | ".join(values) + " |")
    return lines


def flatness(task: str, optimizers: dict) -> list[str]:
    """How far the loss still moves at the end, for each optimizer."""
    lines = []
    for optimizer in [name for name in OPTIMIZERS if name in optimizers]:
        variants, shown, flat = optimizers[optimizer], [], True
        for variant in order(variants):
            change = statistics.mean(drift(run) for run in variants[variant].values())
            share = change / statistics.mean(run["final"]["val_loss"] for run in variants[variant].values())
            shown.append(f"{VARIANTS.get(variant, variant)} {change:+.4f} ({100 * share:+.2f} %)")
            flat = flat and abs(share) < FLAT_LIMIT
        verdict = (
            f": {'flat' if flat else 'not flat'} by the limit of {100 * FLAT_LIMIT:g} %" if kind(task) == "gpt" else ""
        )
        lines.append(f"- {OPTIMIZERS[optimizer]}: {', '.join(shown)}{verdict}")
    return lines


def machine_line(all_runs: list[dict]) -> str:
    facts = sorted({
        f"{m['device']}, {m['processor']}, {m['threads']} thread{'s' * (m['threads'] > 1)} a run; torch {m['torch']}, "
        f"Python {m['python']}; commit {m['commit']}"
        for m in (run["machine"] for run in all_runs)
    })  # fmt: skip
    return "\n".join(f"- {fact}" for fact in facts)


def introduction(task: str, run: dict) -> str:
    return INTRODUCTIONS[kind(task)].format(**(run["config"] | run.get("facts", {})))


def make_report(all_runs: list[dict]) -> str:
    parts = [
        "# Real models",
        "Made by `benchmarks/real_models/report.py` from `real_models.json` beside this file. All runs again, some 55 "
        "minutes on two cores after `tools/build.sh`:",
        "    export PYTHONPATH=python FLASHOPTIM_OPS_LIBRARY=build/dev/libtorch/ops/libflashoptim_ops.so\n"
        "    .venv/bin/python benchmarks/real_models/gpt.py --seeds 5 --jobs 2\n"
        "    .venv/bin/python benchmarks/real_models/digits.py --seeds 20 --jobs 2\n"
        "    .venv/bin/python benchmarks/real_models/report.py",
        "Equal seeds have equal initial weights and batches. *Within*: |mean - fp32's mean| is at most the standard "
        "deviation of fp32 between seeds. *Same seeds*: mean and standard error of the differences of runs with equal "
        "seeds. Two sets of fp32 runs, with different seeds, would themselves differ by a standard deviation or more "
        "in 1 of 3 cases with 3 seeds, in 1 of 5 with 5, in 1 of 200 with 20.",
    ]
    for task, optimizers in sorted(group_runs(all_runs).items(), reverse=True):
        task_runs = [run for variants in optimizers.values() for seeds in variants.values() for run in seeds.values()]
        parts += [f"## {task}", introduction(task, task_runs[0]), machine_line(task_runs)]
        for metric, title, scale, digits in METRICS[kind(task)]:
            parts.append("\n".join(table(optimizers, metric, title, scale, digits)))
        parts.append("\n".join(seed_table(optimizers, *[METRICS[kind(task)][0][i] for i in (0, 3)])))
        parts.append(
            f"Change of the validation loss over the last {100 * FLAT_SHARE:g} % of the steps, nats, mean over seeds "
            "(of a straight line through the values there):"
        )
        parts.append("\n".join(flatness(task, optimizers)))
        parts.append(f"![curves](real_models_{task}.png)")
    return "\n\n".join(part for part in parts if part) + "\n"


def plot(task: str, optimizers: dict, path: Path) -> None:
    """Above: means over seeds. Below: differences of equal seeds, and fp32's deviation in grey."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy
    import PIL.Image

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    names = [name for name in OPTIMIZERS if name in optimizers]
    figure, axes = plt.subplots(
        2, len(names), figsize=(2.5 + 3.7 * len(names), 6.5), sharex=True, squeeze=False, constrained_layout=True
    )
    for column, optimizer in enumerate(names):
        variants = optimizers[optimizer]
        above, below = axes[0][column], axes[1][column]
        curves = {
            variant: {seed: numpy.array(run["curve"]["val_loss"]) for seed, run in seeds.items()}
            for variant, seeds in variants.items()
        }
        steps = next(iter(variants[BASELINE].values()))["curve"]["step"]
        base = curves[BASELINE]
        spread = numpy.std(list(base.values()), axis=0, ddof=1) if len(base) > 1 else numpy.zeros(len(steps))
        below.fill_between(steps, -spread, spread, color="#dddddd")
        for variant in order(curves):
            color, values = COLORS.get(variant, "#7a5195"), numpy.array(list(curves[variant].values()))
            label = VARIANTS.get(variant, variant).replace("`", "")
            if variant == BASELINE:
                above.fill_between(
                    steps,
                    values.min(axis=0),
                    values.max(axis=0),
                    color="#dddddd",
                    label="fp32: all seeds; below: deviation",
                )
            above.plot(
                steps, values.mean(axis=0), color=color, linewidth=3 if variant == BASELINE else 1.4, label=label
            )
            pairs = [curve - base[seed] for seed, curve in curves[variant].items() if seed in base]
            if variant != BASELINE and pairs:
                below.plot(steps, numpy.mean(pairs, axis=0), color=color, linewidth=1.4, label=label)
        final = numpy.mean([curve[-1] for curve in base.values()])
        if kind(task) == "gpt":
            above.set_ylim(0.95 * final, 1.6 * final)
        else:
            above.set_ylim(0, 6 * final)
        limit = 3 * numpy.median(spread[len(spread) // 3 :]) or 0.1
        below.set_ylim(-limit, limit)
        below.axhline(0, color="#222222", linewidth=0.8)
        above.set_title(OPTIMIZERS[optimizer])
        below.set_xlabel("step")
        for axis in (above, below):
            axis.yaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.grid(axis="y", color="#e5e5e5", linewidth=0.7)
    axes[0][0].set_ylabel("validation loss, mean of seeds")
    axes[1][0].set_ylabel("- fp32, mean of equal seeds")
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside lower center", ncols=3 if len(names) > 1 else 2, frameon=False
    )
    # A palette makes the file a third as large.
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    PIL.Image.open(buffer).convert("RGB").quantize(64).save(path, optimize=True)


def write(all_runs: list[dict], out: Path, pictures: bool = True) -> None:
    out.mkdir(parents=True, exist_ok=True)
    report = make_report(all_runs)
    (out / "real_models.md").write_text(report)
    runs.save_runs(out / "real_models.json", all_runs)
    for task, optimizers in group_runs(all_runs).items():
        if pictures:
            plot(task, optimizers, out / f"real_models_{task}.png")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", type=Path, default=runs.DEFAULT_FOLDER, help="folder of run files, or real_models.json"
    )
    parser.add_argument("--out", type=Path, default=runs.ROOT / "benchmarks/results")
    args = parser.parse_args(arguments)
    try:
        all_runs = runs.load_runs(args.runs)
        if not all_runs:
            raise ValueError(f"no runs in {args.runs}")
        write(all_runs, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    print((args.out / "real_models.md").read_text())


if __name__ == "__main__":
    main()
