"""Writes docs/evidence.md and its picture from the runs' results; no figure of theirs is typed by hand.

    python report.py [--import-from DIRECTORY] [--results DIRECTORY] [--out FILE]

--import-from copies the JSON files of run_lm.py's work/results (and make_tokens.py's tokens.json) to --results first.
Runs that are not there, or not finished, are named as not run.
"""

import argparse
import json
import re
import shutil
import statistics
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
PICTURE = "evidence_lm.png"
MIB = 2**20
TITLES = {
    "fp32": "torch fused AdamW, fp32 weights and states",
    "default": "FlashAdamW, bf16 + 8-bit corrections, 8-bit states",
    "paper": "the same, `paper` codec",
    "exact": "FlashAdamW, 32-bit weights, fp32 states (control)",
    "uncorrected": "the same as default, without corrections",
    "torchao": "torchao AdamW8bit, fp32 weights",
    "bitsandbytes": "bitsandbytes AdamW8bit, fp32 weights",
}
ORDER = tuple(TITLES)
COLOURS = {"fp32": "black", "default": "tab:blue", "paper": "tab:orange", "exact": "tab:gray", "torchao": "tab:green"}
AGAIN = "+again"  # behind a run's name: the same run with cuDNN's attention, a control


def load(folder: Path) -> dict[str, dict]:
    """Runs by name; of training also those that are not finished."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*-*.json"))}
    return {name: run for name, run in runs.items() if "final" in run or name.startswith("lm-")}


def title(name: str, record: dict) -> str:
    again = ", again with cuDNN's attention (control)" if name.endswith(AGAIN) else ""
    return f"{TITLES[record['run']['variant']]}, seed {record['run']['seed']}{again}"


def losses(record: dict) -> dict[int, float]:
    """Held-out losses on the subset of all evaluations but the last, by step."""
    points = record["evaluations"][:-1] if "final" in record else record["evaluations"]
    return {point["step"]: point["code"] for point in points if point["step"] > 0}


def common_step(runs: dict[str, dict]) -> int:
    """The last step at which every training run with seed 1 was evaluated."""
    return max(set.intersection(*(set(losses(r)) for n, r in runs.items() if n.startswith("lm-"))))


def key(name: str) -> tuple:
    task, variant, last = re.fullmatch(r"(lm|tune)-([a-z0-9]+)-(.*)", name).groups()
    return task, ORDER.index(variant), last


def difference(value: float) -> str:
    return f"{value:+.4f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def spread(runs: dict[str, dict]) -> float | None:
    """Largest difference of final losses between the seeds of fp32; None with fewer than two."""
    finals = [r["final"]["code"] for n, r in runs.items() if re.fullmatch(r"lm-fp32-\d+", n) and "final" in r]
    return max(finals) - min(finals) if len(finals) > 1 else None


def training_table(runs: dict[str, dict], smoke: dict) -> str:
    rows, step = [], common_step(runs)
    for name in sorted((n for n in runs if n.startswith("lm-")), key=key):
        record = runs[name]
        seed, held, short = record["run"]["seed"], record.get("bytes"), smoke.get(name, {})
        beside = runs.get(f"lm-fp32-{seed}")
        speed = statistics.median(record["speeds"]) if record["speeds"] else 0
        checkpoint = record["checkpoint_bytes"] / MIB if "checkpoint_bytes" in record else short.get("checkpoint_mib")
        rows.append(
            [
                title(name, record),
                f"{record['final']['code']:.4f}" if "final" in record else f"(step {len(record['train_loss'])})",
                f"{losses(record)[step]:.4f}",
                "" if beside in (None, record) else difference(losses(record)[step] - losses(beside)[step]),
                f"{speed / 1000:.0f} k",
                "" if held is None else f"{(held['weight_bytes'] + held['state_bytes']) / held['parameters']:.2f}",
                "" if checkpoint is None else f"{checkpoint:.0f}",
                f"{record.get('peak_memory_bytes', 0) / 2**30:.2f}",
            ]
        )
    head = ["optimizer", "final loss", f"loss at step {step}", "beside fp32", "tokens/s", "bytes a parameter"]
    return table([*head, "checkpoint, MiB", "peak, GiB"], rows)


def tuning_table(runs: dict[str, dict]) -> str:
    rows = []
    for name in sorted((n for n in runs if n.startswith("tune-")), key=lambda n: (-runs[n]["run"]["lr"], key(n))):
        record = runs[name]
        first, final = record["evaluations"][0], record["final"]
        rows.append(
            [
                f"lr {record['run']['lr']:g}, {TITLES[record['run']['variant']]}",
                f"{first['prose']:.4f}",
                f"{final['prose']:.4f}",
                f"{final['code']:.4f}",
            ]
        )
    return table(["fine-tuning", "prose at the start", "prose after", "code after"], rows)


def picture(runs: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    reference = runs.get("lm-fp32-1")
    for name in sorted((n for n in runs if n.startswith("lm-")), key=key):
        record = runs[name]
        variant, seed = record["run"]["variant"], record["run"]["seed"]
        batch, known = record["run"]["batch"] * record["run"]["shape"]["context"] / 1e6, losses(record)
        points = {step * batch: loss for step, loss in known.items()}
        style = {
            "color": COLOURS.get(variant),
            "linestyle": "-" if seed == 1 else ":",
            "label": f"{variant}, seed {seed}{' again' * name.endswith(AGAIN)}",
        }
        axes[0].plot(points.keys(), points.values(), **style)
        if reference is not None and record is not reference:
            there = losses(reference)
            gaps = {step * batch: loss - there[step] for step, loss in known.items() if step in there}
            axes[1].plot(gaps.keys(), gaps.values(), **style)
    axes[1].axhline(0, color="black", linewidth=0.8)
    axes[0].set(xlabel="million tokens", ylabel="held-out loss, nats a token")
    axes[1].set(xlabel="million tokens", ylabel="difference from fp32, seed 1")
    for part in axes:
        part.grid(alpha=0.3)
        part.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def words(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else str(number)


def trained(runs: dict[str, dict], tokens: dict) -> str:
    record = runs[min((n for n in runs if n.startswith("lm-")), key=key)]
    run, source = record["run"], tokens["sources"]
    seen = run["steps"] * run["batch"] * run["shape"]["context"]
    shape = run["shape"]
    return fill(
        f"""A language model of GPT-2's shape ({shape["layers"]} layers of {shape["dim"]}, context {shape["context"]},
        {words(record["bytes"]["parameters"])} parameters) on {words(seen)} tokens of the Linux kernel's source
        ({words(source["code"]["bytes"])}B of C in {source["code"]["documents"]} files of Debian's
        {source["package"]["Package"]} {source["package"]["Version"]}, {tokens["code_train"]["bytes_a_token"]} bytes a
        token of its own byte-pair vocabulary of {tokens["vocabulary"]}; {words(tokens["code_train"]["tokens"])} tokens,
        so {seen / tokens["code_train"]["tokens"]:.2f} passes). One file in 64 is held out
        ({words(tokens["code_held"]["tokens"])} tokens; the final loss is over all of it, those on the way over
        the first {run["evaluate_windows"]} windows). {run["steps"]} steps of
        {words(run["batch"] * shape["context"])} tokens, lr {run["lr"]:g} with {run["warm_up"]} steps of warm-up and a
        cosine to a tenth, AdamW with betas 0.9 and 0.95 and weight decay 0.1, gradients clipped at 1. All runs of a
        seed have the same initial weights and batches, and all compute in bf16 with the weights rounded to bf16: they
        differ by what the optimizer keeps. {record.get("device", "CPU")}, torch {record["torch"]}."""
    )


def verdict(runs: dict[str, dict]) -> str:
    seeds, first, step = spread(runs), runs.get("lm-fp32-1"), common_step(runs)
    parts = []
    if seeds is not None:
        parts.append(f"Two seeds of fp32 end {seeds:.4f} apart.")
    others = [n for n in runs if n.startswith("lm-") and runs[n]["run"]["seed"] == 1 and n != "lm-fp32-1"]
    for name in sorted(others, key=key) if first else []:
        gaps = [loss - losses(first)[at] for at, loss in losses(runs[name]).items() if at in losses(first)]
        said = f"{title(name, runs[name])}: {difference(gaps[0])} to {difference(gaps[-1])} from fp32 with the same"
        said += f" weights and batches (first and last evaluation; between {difference(min(gaps))} and "
        said += difference(max(gaps)) + ")"
        if "final" in runs[name] and "final" in first:
            gap = runs[name]["final"]["code"] - first["final"]["code"]
            said += f", at the end {difference(gap)}"
            if seeds is not None:
                said += ", within the seeds' spread" if abs(gap) <= seeds else ", beyond the seeds' spread"
        parts.append(said + ".")
    slope = (losses(first)[step] - losses(first)[step - 100]) if first and step - 100 in losses(first) else None
    if slope is not None:
        parts.append(f"In the 100 steps before step {step} fp32's own loss fell by {-slope:.4f}.")
    if seeds is None:
        parts.append("With one seed of fp32 these differences cannot be told from what a seed or a rounding does.")
    resumes = [resume for record in runs.values() for resume in record["resumes"]]
    if resumes:
        parts.append(
            f"Runs were stopped and resumed {len(resumes)} times, each in a new process: every time weights and states "
            "were those saved, byte for byte, and the held-out loss the same number."
        )
    return fill(" ".join(parts))


def tuning_text(runs: dict[str, dict]) -> str:
    record = runs[min((n for n in runs if n.startswith("tune-")), key=key)]
    run = record["run"]
    seen = run["steps"] * run["batch"] * run["shape"]["context"]
    text = f"""Fine-tuning starts from the fp32 weights of seed 1 and takes {words(seen)} tokens, one pass, of another
    text: the kernel's documentation, with {run["warm_up"]} steps of warm-up and a cosine to a tenth. Forgetting is what
    the loss on held-out code rises by."""
    for rate in sorted({r["run"]["lr"] for n, r in runs.items() if n.startswith("tune-")}, reverse=True):
        of = {r["run"]["variant"]: r for n, r in runs.items() if n.startswith("tune-") and r["run"]["lr"] == rate}
        if "fp32" not in of:
            continue
        said = [
            f"`{v}` {difference(r['final']['prose'] - of['fp32']['final']['prose'])} on prose and "
            f"{difference(r['final']['code'] - of['fp32']['final']['code'])} on code"
            for v, r in sorted(of.items(), key=lambda item: ORDER.index(item[0]))
            if v != "fp32"
        ]
        text += f" Beside fp32 at lr {rate:g}: {'; '.join(said)}."
    return fill(text)


def page(runs: dict[str, dict], tokens: dict, smoke: dict) -> str:
    wanted = [f"lm-{v}-1" for v in ("fp32", "default", "paper", "torchao")] + ["lm-fp32-2"]
    wanted += [f"tune-{v}-{rate}" for rate in ("1e-5", "3e-6") for v in ("fp32", "default", "paper", "uncorrected")]
    missing = [name for name in wanted if "final" not in runs.get(name, {})]
    not_tried = """Not tried: models of more parameters, more tokens, more than two seeds of fp32 and one of the others,
    bitsandbytes' optimizer on this text, pictures at this size, several GPUs."""
    if missing:
        not_tried += f" Planned and not run, or not to the end: {', '.join(f'`{name}`' for name in missing)}."
    parts = ["# Evidence", "", "## What was trained", "", trained(runs, tokens), ""]
    parts += ["## What came out", "", training_table(runs, smoke), "", verdict(runs), ""]
    parts += [f"![held-out losses](../benchmarks/results/evidence/{PICTURE})", ""]
    if any(name.startswith("tune-") for name in runs):
        parts += [tuning_table(runs), "", tuning_text(runs), ""]
    parts += ["## What was not tried", "", fill(not_tried), ""]
    parts += [
        fill(
            """This page and its picture are `python benchmarks/evidence/report.py`'s, from
            `benchmarks/results/evidence/*.json`. To run it again: `prepare_data.py`, `make_tokens.py` and `run_lm.py`
            in `benchmarks/evidence`, whose `--help` says how."""
        ),
        "",
    ]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--import-from", type=Path, metavar="DIRECTORY")
    parser.add_argument("--control", type=Path, metavar="DIRECTORY", help="results of runs made again (+again)")
    parser.add_argument("--smoke", type=Path, metavar="LOG", help="run_lm.py --smoke's output, for checkpoints' sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "evidence.md", help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.import_from is not None:
        for path in sorted(arguments.import_from.glob("*.json")):
            shutil.copy(path, arguments.results / path.name)
    if arguments.control is not None:
        for path in sorted(arguments.control.glob("lm-*.json")):
            shutil.copy(path, arguments.results / f"{path.stem}{AGAIN}.json")
    if arguments.smoke is not None:
        found = re.findall(r"smoke (\S+): .* saved (\d+) MiB", arguments.smoke.read_text())
        text = json.dumps({name: {"checkpoint_mib": int(size)} for name, size in found}, indent=2)
        (arguments.results / "smoke.json").write_text(text + "\n")
    runs = load(arguments.results)
    if not any(name.startswith("lm-") for name in runs):
        parser.error(f"{arguments.results} has no lm-* run")
    tokens = json.loads((arguments.results / "tokens.json").read_text())
    smoke_path = arguments.results / "smoke.json"
    smoke = json.loads(smoke_path.read_text()) if smoke_path.exists() else {}
    picture(runs, arguments.results / PICTURE)
    arguments.out.write_text(page(runs, tokens, smoke))


if __name__ == "__main__":
    main()
