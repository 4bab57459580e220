"""A picture per case of flashoptim_fidelity's JSON: error over time, and distribution of update / exact update.

flashoptim_fidelity --out result.json
python plot.py result.json pictures/ [--optimizer adamw] [--case spread] [--codec default,paper]
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The library's rows and bitsandbytes stand out, candidates stay in the background.
STYLES = {
    "fp32": {"color": "black", "linewidth": 1.0},
    "default": {"color": "tab:green", "linewidth": 2.2},
    "paper": {"color": "tab:red", "linewidth": 1.8},
    "dynamic8": {"color": "tab:blue", "linewidth": 1.4},
}
CANDIDATE = {"linewidth": 0.8, "alpha": 0.6}


def style(codec: str) -> dict:
    return STYLES.get(codec, CANDIDATE)


def plot_error(axis, case: dict, codecs: list[str]) -> None:
    for codec in codecs:
        errors = case["results"][codec]["error_over_time"]
        points = [(t, e) for t, e in zip(case["weight_steps"], errors) if e is not None and e > 0]
        if points:
            axis.plot(*zip(*points), label=codec, **style(codec))
    if case["figure"] is not None:
        axis.axhline(case["figure"], color="gray", linestyle="--", linewidth=0.8, label="figure to reach")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("|w - w64| / |w64 - w0|")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=7, ncol=2)


def plot_ratios(axis, case: dict, codecs: list[str], bins: dict) -> None:
    centres = [bins["first"] + (k + 0.5) * bins["width"] for k in range(bins["count"])]
    for codec in codecs:
        counts = case["results"][codec]["ratios"]
        total = sum(counts)
        if total:
            density = [c / total / bins["width"] for c in counts]
            axis.step(centres, [max(d, 1e-7) for d in density], where="mid", label=codec, **style(codec))
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-5)
    axis.set_xlabel("update / exact update (the ends hold all beyond)")
    axis.set_ylabel("density")
    axis.grid(True, which="major", alpha=0.3)


def plot_case(path: pathlib.Path, optimizer: str, case: dict, codecs: list[str], bins: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    figure.suptitle(f"{optimizer}: {case['name']} ({case['what']}; {case['elements']} weights)", fontsize=10)
    plot_error(axes[0], case, codecs)
    plot_ratios(axes[1], case, codecs, bins)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=pathlib.Path, help="JSON written by flashoptim_fidelity --out")
    parser.add_argument("folder", type=pathlib.Path, help="where the pictures go")
    parser.add_argument("--optimizer", help="only this one")
    parser.add_argument("--case", default="", help="only cases whose names contain this")
    parser.add_argument("--codec", help="only these rows, separated by commas")
    arguments = parser.parse_args()

    result = json.loads(arguments.result.read_text())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for optimizer, report in result.get("optimizers", {}).items():
        if arguments.optimizer not in (None, optimizer):
            continue
        codecs = [c["name"] for c in report["codecs"]]
        if arguments.codec:
            codecs = [c for c in codecs if c in arguments.codec.split(",")]
        for case in report["cases"]:
            if arguments.case in case["name"]:
                plot_case(
                    arguments.folder / f"{optimizer}.{case['name']}.png", optimizer, case, codecs, result["ratio_bins"]
                )
                count += 1
    print(f"{count} pictures in {arguments.folder}")


if __name__ == "__main__":
    main()
