"""Markdown tables of the JSON files that llama_shape.py and gpt2.py have written.

python benchmarks/memory/report.py                                    prints build/memory's
python benchmarks/memory/report.py --runs FOLDER --out benchmarks/results/memory.md
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = ROOT / "build" / "memory"
GIB = 2**30
VARIANTS = {
    "torch-fused": "torch AdamW, fused, fp32 weights, autocast",
    "torch-fused-bf16": "torch AdamW, fused, all bf16",
    "flash": "FlashAdamW, bf16, 24 bit",
    "flash-paper": "FlashAdamW, bf16, 24 bit, paper's codec",
    "flash-no-correction": "FlashAdamW, bf16, no correction",
    "flash-paper-no-correction": "FlashAdamW, bf16, no correction, paper's codec",
}
RELEASE = "-release"
#: Title of a column, and its cell.
COMMON = [
    ("peak, GiB", lambda r: f"{r['peak_gib']:.2f}"),
    ("peak, bytes a parameter", lambda r: f"{r['peak_gib'] * GIB / r['parameters']:.3f}"),
    ("weights, states, gradients, bytes a parameter", lambda r: f"{r['bytes_per_parameter']:.3f}"),
    ("optimizer.step(), ms", lambda r: f"{r['optimizer_ms']:.2f}"),
    ("backward(), ms", lambda r: f"{r['backward_ms']:.1f}"),
    ("whole step, ms", lambda r: f"{r['step_ms']:.1f}"),
]
COLUMNS = {
    "llama_shape": COMMON + [("loss, first and last", lambda r: f"{r['loss'][0]:.3f}, {r['loss'][-1]:.3f}")],
    "gpt2": COMMON
    + [
        ("tokens/s", lambda r: f"{r['tokens_per_s']:,.0f}"),
        ("training loss", lambda r: f"{r['train_loss']:.4f}"),
        ("held-out loss", lambda r: f"{r['val_loss']:.4f}"),
    ],
}
INTRODUCTIONS = {
    "llama_shape": "A decoder of Llama-3.1-8B's shape ({layers} layers, dim {dim}, {heads} heads, {kv_heads} key-value "
    "heads, ffn {ffn}, vocabulary {vocab:,}; {parameters:,} parameters), random weights, batch {batch} x {tokens} "
    "tokens, blocks by checkpoint: {checkpoint_blocks}, cross entropy for {chunk} tokens at a time; {steps} steps on "
    "one batch.",
    "gpt2": "A decoder of GPT-2's shape ({layers} layers, dim {dim}, {heads} heads, vocabulary {vocab:,}, tied head; "
    "{parameters:,} parameters), bytes of pydoc's topics, batch {batch} x {context}, {steps} steps, the same batches "
    "and initial weights for all; no clipping. Losses in nats a byte.",
}


def load(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def ordered(runs: list[dict]) -> list[dict]:
    names = [name + end for name in VARIANTS for end in ("", RELEASE)]
    return sorted(runs, key=lambda run: names.index(run["variant"]) if run["variant"] in names else len(names))


def title(run: dict) -> str:
    name = run["variant"].removesuffix(RELEASE)
    return VARIANTS.get(name, name) + ", gradient release" * run["variant"].endswith(RELEASE)


def table(runs: list[dict]) -> list[str]:
    """One table of runs of one benchmark."""
    columns = COLUMNS[runs[0]["benchmark"]]
    lines = ["| | " + " | ".join(head for head, _ in columns) + " |", "|---" + "|--:" * len(columns) + "|"]
    for run in ordered(runs):
        results = run["results"]
        cells = ["out of memory" if i == 0 else "" for i in range(len(columns))]
        if results is not None:
            cells = [cell(results) for _, cell in columns]
        lines.append(f"| {title(run)} | " + " | ".join(cells) + " |")
    return lines


def curves(runs: list[dict]) -> list[str]:
    """Held-out losses by step, where there are curves."""
    with_curves = [run for run in ordered(runs) if run["results"] is not None and "curve" in run["results"]]
    if not with_curves:
        return []
    steps = [point["step"] for point in with_curves[0]["results"]["curve"]]
    lines = ["| held-out loss at step | " + " | ".join(map(str, steps)) + " |", "|---" + "|--:" * len(steps) + "|"]
    for run in with_curves:
        values = {point["step"]: f"{point['val_loss']:.4f}" for point in run["results"]["curve"]}
        lines.append(f"| {title(run)} | " + " | ".join(values.get(step, "") for step in steps) + " |")
    return lines


def machine_line(machine: dict) -> str:
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    versions = f"torch {machine['torch']}{cuda}, Python {machine['python']}; commit {machine['commit']}"
    return f"- {machine['device']}{driver}; {versions}"


def unique(items: list[str]) -> list[str]:
    return list(dict.fromkeys(items))


def introduction(benchmark: str, config: dict, runs: list[dict]) -> str:
    parameters = [run["results"]["parameters"] for run in runs if run["results"] is not None]
    if not parameters:
        return "No run of these fitted into memory."
    return INTRODUCTIONS[benchmark].format(**config, parameters=parameters[0])


def make_report(runs: list[dict]) -> str:
    parts = ["# Memory of training steps", "Made by `benchmarks/memory/report.py`."]
    # Runs belong into one table if all but the variant is the same.
    tables: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        tables.setdefault((run["benchmark"], json.dumps(run["config"], sort_keys=True)), []).append(run)
    for (benchmark, config), same in sorted(tables.items(), reverse=True):
        peaks = unique([run["results"]["peak_is"] for run in same if run["results"] is not None])
        parts += [
            f"## {benchmark}",
            introduction(benchmark, json.loads(config), same),
            "\n".join(unique([machine_line(run["machine"]) for run in ordered(same)])),
            "\n".join(["```sh", *unique([run["command"] for run in ordered(same)]), "```"]),
            "\n".join(table(same)),
            "\n".join(curves(same)),
            "Times are medians by CUDA events (on a CPU by its clock) without the first two steps; the peak is "
            f"{', '.join(peaks)}. With gradient release the optimizer's work is part of backward().",
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=DEFAULT_FOLDER, help="folder of results (default: build/memory)")
    parser.add_argument("--out", type=Path, help="file to write (default: standard output)")
    args = parser.parse_args(arguments)
    runs = load(args.runs)
    if not runs:
        sys.exit(f"report.py: there are no results in {args.runs}; llama_shape.py and gpt2.py make them")
    text = make_report(runs)
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)
        print(f"report.py: {len(runs)} runs, written to {args.out}")


if __name__ == "__main__":
    main()
