"""Makes benchmarks/results/<machine>.md of step_benchmark's JSON files.

usage: bench_table.py FILE...      COMMAND: what ran; MACHINE: name of the result (default: from the processor's)
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
WORKLOADS = {
    "resnet50": "ResNet-50: 161 tensors, 25.6 M",
    "gpt2": "GPT-2 124M: 148 tensors, 124.4 M",
    "llama_layer": "one Llama-3.1-8B layer: 9 tensors, 218.1 M",
}


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def processor() -> dict[str, str]:
    pairs = (line.split(":", 1) for line in output("lscpu").splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def medians(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Counters and `ms` of every benchmark, medians over repetitions."""
    repetitions: dict[str, list[dict]] = {}
    for run in runs:
        if run["run_type"] == "iteration" and not run.get("error_occurred"):
            repetitions.setdefault(run["run_name"].removesuffix("/manual_time"), []).append(run)
    factor = {"ms": 1.0, "us": 1e-3, "ns": 1e-6, "s": 1e3}
    counters = ("ns", "cycles", "GB_per_s", "held_B", "moved_B")
    return {
        name: {c: median(run[c] for run in group) for c in counters if all(c in run for run in group)}
        | {"ms": median(run["real_time"] * factor[run["time_unit"]] for run in group)}
        for name, group in repetitions.items()
    }


def title(workload: str) -> str:
    if workload in WORKLOADS:
        return WORKLOADS[workload]
    numel = int(workload.removeprefix("n:"))
    return f"one tensor of {numel >> 20} Mi" if numel >= 1 << 20 else f"one tensor of {numel >> 10} Ki"


def size(workload: str) -> float:
    return {"resnet50": 1e12, "gpt2": 2e12, "llama_layer": 3e12}.get(workload) or -float(workload.removeprefix("n:"))


def bandwidths(file: dict) -> dict[int, float]:
    """Read-modify-write GB/s by threads, the best of all measurements in the run."""
    best: dict[int, float] = {}
    for key, value in file["context"].items():
        if key.startswith("rmw_GB_per_s/threads:"):
            best[int(key.split(":")[1])] = float(value)
    for run in file["benchmarks"]:
        if run["run_type"] == "iteration" and run["run_name"].startswith("rmw/"):
            threads = int(re.search(r"threads:(\d+)", run["run_name"])[1])
            best[threads] = max(best.get(threads, 0.0), run["GB_per_s"])
    return best


def tables(results: dict[str, dict[str, float]], rmw: dict[int, float]) -> list[str]:
    lines = []
    by_case: dict[tuple[str, int], list[tuple[str, dict[str, float]]]] = {}
    for name, values in results.items():
        if name.startswith("rmw/"):
            continue
        match = re.fullmatch(r"(.+?)/(n:\d+|resnet50|gpt2|llama_layer)/threads:(\d+)(?:/(\w+))?", name)
        what = match[1].removeprefix("step/").replace("/", " ") + (f" ({match[4]})" if match[4] else "")
        by_case.setdefault((match[2], int(match[3])), []).append((what, values))
    for (workload, threads), rows in sorted(by_case.items(), key=lambda item: (size(item[0][0]), item[0][1])):
        base = next((v["ms"] for what, v in rows if what == "torch adamw fused fp32"), None)
        lines += [
            f"### {title(workload)}, {threads} thread{'s' if threads > 1 else ''}",
            "",
            "| step | ms | ns / element | cycles / element and core | GB/s | of RMW bandwidth | bytes held "
            "| speed-up |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for what, v in sorted(rows, key=lambda row: (not row[0].startswith("torch"), row[0])):
            faster = f"{base / v['ms']:.2f}" if base else ""
            bandwidth, share = f"{v['GB_per_s']:.1f}", f"{v['GB_per_s'] / rmw[threads]:.0%}"
            if "foreach" in what:  # moves more than the counter says
                bandwidth = share = ""
            lines.append(
                f"| {what} | {v['ms']:.4g} | {v['ns']:.3g} | {v.get('cycles', 0):.2f} | {bandwidth} | {share} | "
                f"{v['held_B']:.4g} | {faster} |"
            )
        lines.append("")
    return lines


def main() -> None:
    files = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    cpu = processor()
    model = " ".join(cpu.get(k, "") for k in ("Model name", "CPU family", "Model"))
    machine = os.environ.get("MACHINE") or re.sub(
        r"[^a-z0-9]+",
        "-",
        f"{cpu.get('Model name', 'cpu')} family {cpu.get('CPU family', '')} {os.cpu_count()} cores".lower(),
    ).strip("-")
    context = files[0]["context"]
    commit = output("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    if output("git", "status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    rmw = ", ".join(f"{value:.1f} GB/s with {threads} thread(s)" for threads, value in bandwidths(files[0]).items())
    lines = [
        f"# CPU step on {machine}",
        "",
        f"- Command: `{os.environ.get('COMMAND', 'step_benchmark').strip()}`",
        f"- Commit: {commit}",
        f"- Processor: {model} (name, family, model), {os.cpu_count()} cores, {context['clock_GHz']} GHz measured",
        f"- Compiler: {output('c++', '--version').splitlines()[0]}; torch {context.get('torch', 'none')}",
        f"- Read-modify-write bandwidth in the same run (best): {rmw}",
        "- Medians over repetitions; repetitions of all benchmarks of a run take turns in random order.",
        "- Speed-up: time of torch's fused fp32 AdamW over this row's, same run, same tensors, same threads.",
        "- Bytes held: parameter, gradient, correction and states, per parameter. What moves in a step is that and",
        "  what is written of it; where it fits into the caches, the share of the bandwidth exceeds 100 %.",
        "",
    ]
    for file in files:
        lines += [
            f"## Instruction set {file['context']['isa']}",
            "",
            *tables(medians(file["benchmarks"]), bandwidths(file)),
        ]
    path = ROOT / "benchmarks" / "results" / f"{machine}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))
    print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
