"""What the benchmarks of this folder share: a JSON file per finished run, progress lines, facts about the machine.

A run is a dict:
    task, optimizer, variant, seed     which run it is
    config                             everything that decides its numbers
    machine                            where it ran
    final                              its results, {"val_loss": ...}
    curve                              lists of equal length, {"step": [...], "val_loss": [...]}
    facts                              about the model
    seconds                            wall time
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from concurrent.futures import FIRST_COMPLETED, Executor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = ROOT / "build" / "real_models"
LIBRARY = ("include", "src", "libtorch")
HEARTBEAT_S = 30
SHARED = ("config", "machine", "facts")


def run_name(run: dict) -> str:
    return f"{run['task']}-{run['optimizer']}-{run['variant']}-seed{run['seed']}"


def write_run(folder: Path, run: dict) -> None:
    """Writes the file as a whole: one that is there is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run_name(run)}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(run) + "\n")
    partial.replace(path)


def finished_run(folder: Path, job: dict) -> dict | None:
    """The result of this job from an earlier call; None if there is none or its config was another one."""
    path = folder / f"{run_name(job)}.json"
    if not path.exists():
        return None
    run = json.loads(path.read_text())
    return run if run["config"] == job["config"] else None


def load_runs(path: Path) -> list[dict]:
    """The runs of a folder of run files, or of one file that save_runs has written."""
    if path.is_dir():
        return [json.loads(file.read_text()) for file in sorted(path.glob("*-seed*.json"))]
    stored = json.loads(path.read_text())
    return [run | {key: stored[key][run[key]] for key in SHARED} for run in stored["runs"]]


def save_runs(path: Path, all_runs: list[dict]) -> None:
    """One file, a line a run. What runs share stands once; of the curves only the validation loss is kept."""
    shared: dict[str, list] = {key: [] for key in SHARED}
    lines = []
    for run in sorted(all_runs, key=lambda run: (run["task"], run["optimizer"], run["variant"], run["seed"])):
        kept = run | {"curve": {key: run["curve"][key] for key in ("step", "val_loss")}}
        for key in SHARED:
            if run[key] not in shared[key]:
                shared[key].append(run[key])
            kept[key] = shared[key].index(run[key])
        lines.append(json.dumps(kept | {"seconds": round(run["seconds"])}, separators=(",", ":")))
    heads = "".join(f'"{key}": {json.dumps(shared[key])},\n' for key in SHARED)
    path.write_text("{" + heads + '"runs": [\n' + ",\n".join(lines) + "\n]}\n")


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def execute(jobs: list[dict], folder: Path, executor: Executor, work, fraction=lambda job: 0.0) -> list[dict]:
    """Runs `work(job)`, which returns a run, for every job that has no result in `folder` yet; returns all runs.

    `fraction(job)` tells how much of a running job is done. A job that fails does not stop the others; the first
    failure is raised at the end.
    """
    results = {run_name(job): finished_run(folder, job) for job in jobs}
    pending = [job for job in jobs if results[run_name(job)] is None]
    task = jobs[0]["task"] if jobs else "nothing"
    print(
        f"[{task}] {len(jobs)} runs, {len(jobs) - len(pending)} of them finished before; results in {folder}",
        flush=True,
    )
    start = time.monotonic()
    futures = {executor.submit(work, job): job for job in pending}
    running, failures = set(futures), []
    while running:
        done, running = wait(running, timeout=HEARTBEAT_S, return_when=FIRST_COMPLETED)
        for future in done:
            name = run_name(futures[future])
            try:
                results[name] = future.result()
            except Exception as error:
                failures.append(error)
                print(f"[{task}] {name}: FAILED: {error}", flush=True)
                continue
            write_run(folder, results[name])
            final = ", ".join(f"{key} {value:.4f}" for key, value in results[name]["final"].items())
            print(f"[{task}] {name}: {final}; {results[name]['seconds']:.0f} s", flush=True)
        share = (len(pending) - len(running) + sum(fraction(futures[future]) for future in running)) / len(pending)
        elapsed = time.monotonic() - start
        left = f", {clock(elapsed * (1 - share) / share)} left" if share > 0 else ""
        print(
            f"[{task}] {len(pending) - len(running)} of {len(pending)} runs, {clock(elapsed)} so far{left}", flush=True
        )
    if failures:
        raise failures[0]
    return [results[run_name(job)] for job in jobs]


def commit(sources: tuple[str, ...]) -> str:
    """Last commit that changed one of these sources, with "+" where they have been changed since."""

    def git(*arguments: str) -> str:
        done = subprocess.run(("git", "-C", str(ROOT)) + arguments, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("log", "-1", "--format=%h", "--", *sources)
    return (name or "unknown") + ("+" if git("status", "--porcelain", "--", *sources) else "")


def machine(device: str, threads: int, sources: tuple[str, ...]) -> dict:
    """Facts for beside the numbers; `sources`: what decides these, beside the library."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "device": device,
        "processor": f"{model}, {os.cpu_count()} cores",
        "threads": threads,
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "commit": commit(LIBRARY + sources),
    }
