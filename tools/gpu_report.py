#!/usr/bin/env python3
"""Makes one markdown page of the logs that `tools/gpu_check.sh run` has written.

usage: gpu_report.py LOGS [OUT.md]
"""

import json
import re
import sys
from pathlib import Path

#: Figures of the project's aims for AdamW, default codec, bf16, 24 bit: ms, and whether they are wall time.
AIMS = {
    "256Mi, one tensor": (1.16, 1.13, False),
    "Llama-3.1-8B layer": (0.95, 0.92, False),
    "GPT-2 124M": (0.60, 0.54, False),
    "ResNet-50": (0.25, 0.16, True),
}
#: The same behind the backward pass of a model of 8B parameters (benchmarks/memory/llama_shape.py), and its bytes of
#: 24-bit AdamW.
TRAINING_AIMS, BYTES = (36, 34), 12.25
USUAL = "AdamW default, bf16 g bf16, 24"
ROW = re.compile(r"^(.{28}) (.{32,38}?)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\d+)\s+([\d.]+)%\s+([\d.]+)\s+([\d.]+)$")
TORCH = re.compile(r"^(.{28}) torch AdamW fused, fp32\s+[\d.]+\s+([\d.]+)\s+[\d.]+\s+([\d.]+)$")
SMALL = re.compile(r"^(.{28})\s{1,3}(gradient norm|inspect, stride \d+)\s+([\d.]+)(?:\s+(\d+)\s+([\d.]+)%)?$")


def read(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def training_row(logs: Path, facts: dict[str, str], copy: float) -> list[list[str]]:
    """The row of the step in training, if it was run."""
    path = logs / "memory" / "llama_shape-flash.json"
    results = json.loads(path.read_text())["results"] if path.exists() else None
    if results is None:
        return []
    numel, ms = results["parameters"], results["optimizer_ms"]
    memory = re.search(r"(\d+) MiB", facts.get("device", ""))
    fits = memory is None or 16 * numel < int(memory[1]) << 20
    share = f"{BYTES * numel / ms / 1e4 / copy:.1f} %"
    reached = "yes" if ms <= TRAINING_AIMS[0] else "no"
    return [
        [
            "Llama-3.1-8B's shape, in training",
            f"{ms:.2f}",
            share,
            *map(str, TRAINING_AIMS),
            "" if fits else "does not fit",
            reached,
        ]
    ]


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__.split("\n\n")[1])
    logs = Path(sys.argv[1])
    benchmark, checks = read(logs / "benchmark.txt"), read(logs / "checks.txt")
    facts = dict(line.split("=", 1) for line in read(logs / "facts.txt"))
    steps = {(m[1].strip(), m[2].strip()): m for m in map(ROW.match, benchmark) if m}
    torch = {m[1].strip(): m for m in map(TORCH.match, read(logs / "torch_fused_AdamW.log")) if m}
    device = next((line for line in benchmark if "copy" in line and "multiprocessors" in line), "")
    copy = re.search(r"copy (\d+) GB/s", device)

    out = [f"# CUDA step: {facts.get('device', 'unknown device').split(',')[0]}", ""]
    out.append(
        "Made by `tools/gpu_check.sh run DIR` (after `tools/gpu_check.sh build DIR`); reasons and variants are in"
    )
    out.append("[docs/cuda.md](../../docs/cuda.md), training runs in [h100_memory.md](h100_memory.md).")
    out += ["", f"- {facts.get('device', '')}; {device}"]
    command = facts.get("command", "tools/gpu_check.sh run DIR")
    out.append(f"- commit {facts.get('commit', 'unknown')}, everything from one run: `{command}`; copy")
    out.append(f"  bandwidth in the same run {copy[1] if copy else '?'} GB/s (bytes read and written)")
    out += ["- times are medians by events, the next steps queued behind; wall is a step that is waited for", ""]
    rows = []
    for name, (reach, aim, is_wall) in AIMS.items():
        ours, theirs = steps.get((name, USUAL)), torch.get(name)
        if ours is None:
            continue
        mine = float(ours[8] if is_wall else ours[4])
        other = (theirs[3] if is_wall else theirs[2]) if theirs else ""
        rows.append(
            [
                name + (", wall time" if is_wall else ""),
                f"{mine:.3f}",
                f"{float(ours[7]) * float(ours[4]) / mine:.1f} %",
                f"{reach}",
                f"{aim}",
                f"{float(other):.2f}" if other else "",
                "yes" if mine <= reach else "no",
            ]
        )
    if copy is not None:
        rows += training_row(logs, facts, float(copy[1]))
    out += table(
        [f"{USUAL}, ms", "flashoptim", "share of copy", "to reach", "aim", "torch fused fp32", "reached"], rows
    ) + [""]
    out += ["## Checks", "", "```", *checks, "```", ""]
    out += ["## Every format", ""]
    rows = [[m[1].strip(), m[2].strip(), m[3], m[4], m[6], f"{m[7]} %", m[8], m[9]] for m in steps.values()]
    out += table(["tensors", "format", "M elements", "ms", "GB/s", "of copy", "wall ms", "host us"], rows) + [""]
    rows = [
        [m[1].strip(), m[2], m[3], m[4] or "", f"{m[5]} %" if m[5] else ""] for m in map(SMALL.match, benchmark) if m
    ]
    out += ["## Beside the step", ""] + table(["tensors", "", "ms", "GB/s", "of copy"], rows) + [""]
    host = read(logs / "host_time_of_step().log")
    if host:
        out += ["## Host time of step() in Python", "", "```", *host, "```", ""]
    text = "\n".join(out)
    if len(sys.argv) == 3:
        Path(sys.argv[2]).write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
