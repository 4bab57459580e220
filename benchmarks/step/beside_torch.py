"""Times one optimizer step on the CPU beside torch's fused AdamW, through the Python packages alone.

usage: beside_torch.py [--numel 67108864] [--threads N] [--turns 15]

For machines without what step_benchmark is built of. One tensor; the steps take turns; least and median milliseconds.
Prints flashoptim's instruction set and the bandwidth of a copy in the same run (bytes read and written).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

import flashoptim_native


def steps(numel: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name. Weights and gradients are random, and the gradients stay."""

    def parameter(dtype: torch.dtype) -> torch.nn.Parameter:
        param = torch.nn.Parameter((torch.randn(numel) * 0.02).to(dtype))
        param.grad = (torch.randn(numel) * 1e-3).to(dtype)
        return param

    options = {"lr": 1e-5, "weight_decay": 0.01}
    narrow = torch.bfloat16
    source, target = torch.randn(numel), torch.empty(numel)
    return {
        "torch fused fp32": torch.optim.AdamW([parameter(torch.float32)], fused=True, **options).step,
        "torch fused bf16": torch.optim.AdamW([parameter(narrow)], fused=True, **options).step,
        "flashoptim default 24 bit": flashoptim_native.FlashAdamW([parameter(narrow)], **options).step,
        "flashoptim paper 24 bit": flashoptim_native.FlashAdamW(
            [parameter(narrow)], state_codec="paper", **options
        ).step,
        "copy": lambda: target.copy_(source),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=1 << 26, help="elements (default: 64 Mi)")
    parser.add_argument("--threads", type=int, help="threads (default: torch's choice)")
    parser.add_argument("--turns", type=int, default=15, help="timed steps of each (default: 15)")
    args = parser.parse_args()
    if min(args.numel, args.turns) < 1 or (args.threads is not None and args.threads < 1):
        parser.error("--numel, --threads and --turns are 1 or more")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    timed = steps(args.numel)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(args.turns + 3):
        for name, step in timed.items():
            start = time.perf_counter()
            step()
            if turn >= 3:  # the first make states and threads
                times[name].append((time.perf_counter() - start) * 1e3)
        print(f"turn {turn + 1} of {args.turns + 3}", end="\r", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    copy = 8 * args.numel / min(times["copy"]) / 1e6
    print(
        f"{args.numel} elements, {torch.get_num_threads()} threads, {flashoptim_native.cpu_isa()}, "
        f"copy {copy:.1f} GB/s, ",
        end="",
    )
    print(f"torch {torch.__version__}")
    reference = times["torch fused fp32"]
    print(f"{'step':28s} {'least ms':>9s} {'median ms':>10s} {'speed-up: least':>16s} {'median':>7s}")
    for name, values in times.items():
        least, median = min(values), statistics.median(values)
        speed_ups = (
            f"{min(reference) / least:16.2f} {statistics.median(reference) / median:7.2f}" if name != "copy" else ""
        )
        print(f"{name:28s} {least:9.4g} {median:10.4g} {speed_ups}")


if __name__ == "__main__":
    main()
