"""A picture of one step: what the device computed and copied, from what llama_shape.py --trace has written.

python benchmarks/memory/timeline.py TRACE.json --out benchmarks/results/offload_timeline.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LANES = ("states up", "states down", "optimizer's kernels", "other kernels")
COLORS = ("tab:blue", "tab:orange", "tab:red", "tab:gray")


def lane_of(name: str) -> str | None:
    if name.startswith("Memcpy HtoD"):
        return LANES[0]
    if name.startswith("Memcpy DtoH"):
        return LANES[1]
    if name.startswith(("Memcpy", "Memset")):
        return None
    return LANES[2] if "flashoptim" in name else LANES[3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    events = json.loads(args.trace.read_text())
    begin = min(start for _, _, start, _ in events)
    spans: dict[str, list[tuple[float, float]]] = {lane: [] for lane in LANES}
    for _, name, start, duration in events:
        lane = lane_of(name)
        if lane is not None:
            spans[lane].append(((start - begin) / 1e3, duration / 1e3))
    figure, axes = pyplot.subplots(figsize=(11, 2.6), constrained_layout=True)
    for row, (lane, color) in enumerate(zip(LANES, COLORS)):
        axes.broken_barh(spans[lane], (row - 0.4, 0.8), facecolors=color)
        busy = sum(duration for _, duration in spans[lane])
        print(f"{lane}: {len(spans[lane])} pieces, {busy:.1f} ms")
    axes.set_yticks(range(len(LANES)), LANES)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
