#!/usr/bin/env python3
"""Plots the loss curves of two runs of train_gpt into a PNG.

usage: plot_losses.py RUN_DIR RUN_DIR PNG
"""

import json
import sys
from pathlib import Path

COLORS = ("#d1495b", "#00798c")
SMOOTHING = 0.05  # weight of the newest step in the training curve


def read_run(folder: Path) -> dict:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    smooth, average = [], None
    for line in lines:
        average = line["loss"] if average is None else average + SMOOTHING * (line["loss"] - average)
        smooth.append(average)
    validated = [line for line in lines if "val_loss" in line]
    return {
        "name": summary["options"]["optimizer"],
        "bytes": summary["memory"]["bytes_per_parameter"],
        "unigram": summary["unigram_loss"],
        "steps": [line["step"] for line in lines],
        "smooth": smooth,
        "val_steps": [line["step"] for line in validated],
        "val": [line["val_loss"] for line in validated],
    }


def plot(runs: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8.5, 5), constrained_layout=True)
    axes.axhline(runs[0]["unigram"], color="#888888", linewidth=1, linestyle=(0, (4, 4)))
    axes.annotate(
        "unigram model",
        (0.99, runs[0]["unigram"]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color="#666666",
        fontsize=10,
    )
    # The second run is drawn thinner and on top: where the curves agree, both stay visible.
    for run, color, width in zip(runs, COLORS, (3.6, 1.4)):
        label = f"{run['name']}  ({run['bytes']:.2f} bytes a parameter)"
        axes.plot(run["steps"], run["smooth"], color=color, linewidth=width, alpha=0.9, label=label)
        axes.plot(
            run["val_steps"],
            run["val"],
            color=color,
            linewidth=0,
            marker="o",
            markersize=width + 3,
            markeredgecolor="white",
            markeredgewidth=0.7,
        )
    axes.plot([], [], color="#444444", linewidth=2, label="training (smoothed)")
    axes.plot([], [], color="#444444", linewidth=0, marker="o", markersize=6, label="validation")
    low = min(min(run["smooth"] + run["val"]) for run in runs)
    high = max([runs[0]["unigram"]] + [run["smooth"][-1] for run in runs])  # the steep beginning is cut off
    axes.set_ylim(low - 0.15, high + 0.45)
    axes.set_xlim(left=0)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 0.86))
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    runs = [read_run(Path(folder)) for folder in sys.argv[1:3]]
    try:
        plot(runs, Path(sys.argv[3]))
    except ModuleNotFoundError as error:
        sys.exit(f"plot_losses.py: {error}; install matplotlib (Debian: python3-matplotlib)")
    print(f"loss curves: {sys.argv[3]}")


if __name__ == "__main__":
    main()
