"""Draws README's picture: bytes a parameter as bars, and losses of a GPT in training over seeds.

usage: .venv/bin/python tools/readme_picture.py      writes docs/pictures/readme.png

Losses are those of benchmarks/results/real_models.json. Bytes are counted for AdamW as weights, gradients, corrections
and states of one element, small tensors and activations left out.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCALES = 2 * 2 / 32  # two states, 16 bits for 32 codes
BNB_MAXIMA = 2 * 4 / 256  # two states, an fp32 maximum for 256 codes
PARTS = ("weights", "gradients", "corrections or fp32 copy", "states")
COLOURS = ("#3b5b92", "#7a9bd1", "#f2a65a", "#c44e52")
ROWS = (
    ("torch, fp32", (4, 4, 0, 8)),
    ("torch, bf16 with an fp32 copy", (2, 2, 4, 8)),
    ("bitsandbytes or torchao, 8 bit, fp32 weights", (4, 4, 0, 2 + BNB_MAXIMA)),
    ("flashoptim", (2, 2, 1, 2 + SCALES)),
    ("flashoptim, gradient release", (2, 0, 1, 2 + SCALES)),
    ("the same, states on the host: on the device", (2, 0, 0, 0)),
)


def bars(axes: plt.Axes) -> None:
    for row, (_, parts) in enumerate(ROWS):
        left = 0.0
        for part, value in enumerate(parts):
            axes.barh(row, value, left=left, color=COLOURS[part], label=PARTS[part] if row == 0 else None, height=0.66)
            left += value
        axes.text(left + 0.2, row, f"{left:.3f}".rstrip("0").rstrip("."), va="center", fontweight="bold")
    axes.set_yticks(range(len(ROWS)), [name for name, _ in ROWS])
    axes.invert_yaxis()
    axes.set_xlim(0, 18.5)
    axes.set_title("AdamW, bytes a parameter", loc="left")
    axes.legend(loc="center right", frameon=False, fontsize=8, bbox_to_anchor=(1.0, 0.3))
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: plt.Axes) -> None:
    runs = json.loads((ROOT / "benchmarks/results/real_models.json").read_text())["runs"]
    looks = (("fp32", "torch AdamW, fp32", "#222222", "-"), ("default", "FlashAdamW, bf16", "#c44e52", "--"))
    for variant, label, colour, style in looks:
        of = [run for run in runs if run["task"] == "gpt_tiny" and run["variant"] == variant]
        steps = np.array(of[0]["curve"]["step"])
        losses = np.array([run["curve"]["val_loss"] for run in of])
        axes.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, losses.mean(0), style, color=colour, label=f"{label} ({len(of)} seeds)", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_title("GPT of 0.83 M parameters, validation loss", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), width_ratios=(1.15, 1), layout="constrained")
    bars(left)
    curves(right)
    out = ROOT / "docs/pictures/readme.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)
    print(out.relative_to(ROOT))


if __name__ == "__main__":
    main()
