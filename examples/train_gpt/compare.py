#!/usr/bin/env python3
"""Prints one table that sets two finished runs of train_gpt side by side.

usage: compare.py RUN_DIR RUN_DIR
"""

import json
import sys
from pathlib import Path

MEGA = 1e6


def rows(summary: dict) -> list:
    """(label, value, format) for each line of the table."""
    memory, count = summary["memory"], summary["parameters"]
    return [
        ("final training loss", summary["train_loss"], "{:.4f}"),
        ("final validation loss", summary["val_loss"], "{:.4f}"),
        ("  in bits a byte", summary["val_bits_per_byte"], "{:.3f}"),
        ("unigram model's validation loss", summary["unigram_loss"], "{:.4f}"),
        ("bytes a parameter", memory["bytes_per_parameter"], "{:.3f}"),
        ("  parameters", memory["parameter_bytes"] / count, "{:.3f}"),
        ("  gradients", memory["gradient_bytes"] / count, "{:.3f}"),
        ("  optimizer", memory["optimizer_bytes"] / count, "{:.3f}"),
        ("checkpoint, MB", summary["checkpoint_bytes"] / MEGA, "{:.2f}"),
        ("optimizer, ms a step", summary["optimizer_ms"], "{:.2f}"),
        ("whole step, ms", summary["step_ms"], "{:.1f}"),
        ("tokens a second", summary["tokens_per_s"], "{:.0f}"),
        ("peak of all tensors, MB", summary["peak_tensor_bytes"] / MEGA, "{:.1f}"),
        ("peak of the process, MB", summary["peak_resident_bytes"] / MEGA, "{:.1f}"),
    ]


def heading(summary: dict) -> list:
    options = summary["options"]
    flash = options["optimizer"].startswith("flash-")
    parameters = "bf16" if flash else "fp32"
    if flash and options["master_weight_bits"]:
        parameters += f" + {options['master_weight_bits'] - 16} bit"
    return [options["optimizer"], f"weights {parameters}", f"activations {options['compute_dtype']}"]


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    summaries = []
    for folder in sys.argv[1:]:
        path = Path(folder) / "summary.json"
        if not path.exists():
            sys.exit(f"compare.py: there is no {path}: has the run finished?")
        summaries.append(json.loads(path.read_text()))
    first, second = summaries

    width = max(len(label) for label, _, _ in rows(first)) + 2
    columns = 22
    print(f"{first['parameters'] / MEGA:.2f} M parameters, {first['steps']} steps, seed {first['options']['seed']}\n")
    for names in zip(heading(first), heading(second)):
        print(" " * width + "".join(f"{name:>{columns}}" for name in names))
    print("-" * (width + 2 * columns + 10))
    for (label, left, form), (_, right, _) in zip(rows(first), rows(second)):
        ratio = f"{left / right:>9.3f}x" if right else ""
        print(f"{label:<{width}}{form.format(left):>{columns}}{form.format(right):>{columns}}{ratio}")
    difference = abs(first["val_loss"] - second["val_loss"]) / second["val_loss"]
    print(
        f"\nvalidation losses differ by {difference:.2%}; "
        f"the first run holds {first['memory']['bytes_per_parameter'] / second['memory']['bytes_per_parameter']:.0%} "
        f"of the second's bytes"
    )


if __name__ == "__main__":
    main()
