"""What a rank holds and how long a step takes, on paper: AdamW, 24 bit, default states, beside torch's in fp32.

usage: scale.py

Bytes are exact, from every parameter's shards; the largest rank's. Steps are a rank's elements at the measured rate of
one GPU (benchmarks/results/h100.md: 268.4 M elements in 1.154 ms, torch's fused AdamW in 2.80 ms), without what FSDP2
gathers and reduces, which is the same for both but for its bytes: 2 an element instead of 4.
"""

from __future__ import annotations

import argparse
import math

from shard_map import MODELS, boxes, state_bytes

OURS_MS, THEIRS_MS, MEASURED = 1.154, 2.80, 268.435456e6
GPUS = (8, 64, 256, 1024)


def row(model: str, ranks: int) -> list[str]:
    elements = [0] * ranks
    states = [0] * ranks
    whole = whole_states = 0
    for weight in MODELS[model]:
        for rank, box in enumerate(boxes(weight.shape, ranks, 1, None)):
            elements[rank] += weight.count * math.prod(box.sizes)
            states[rank] += weight.count * state_bytes(weight.shape, box)
        whole += weight.count * math.prod(weight.shape)
    whole_states = sum(states)
    most = max(range(ranks), key=lambda rank: elements[rank])
    ours = 4 * elements[most] + states[most]
    gib = 2.0**30
    return [
        model,
        str(ranks),
        f"{ours / gib:.3f}",
        f"{16 * elements[most] / gib:.3f}",
        f"{elements[most] / MEASURED * OURS_MS:.3f}",
        f"{elements[most] / MEASURED * THEIRS_MS:.3f}",
        f"{(2 * whole + whole_states) / 1e9:.1f}",
        f"{12 * whole / 1e9:.1f}",
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| model | GPUs | GiB a rank | fp32 | step, ms | fp32 | checkpoint, GB | fp32 |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for model in ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B"):
        for ranks in GPUS:
            print("| " + " | ".join(row(model, ranks)) + " |", flush=True)


if __name__ == "__main__":
    main()
