"""Host time of a step of DTensors beside plain tensors: what FSDP2's parameters cost more, ours and torch's AdamW.

usage: host_time.py [ROUNDS] [PARAMETERS]

One gloo process, one thread, parameters of 8 x 8 in bfloat16, all in turns; milliseconds, the least of ROUNDS steps (of
a tenth as many of torch's) and their median.
"""

from __future__ import annotations

import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flashoptim_native import FlashAdamW


def made(kind: Any, count: int, is_sharded: bool, **options: Any) -> torch.optim.Optimizer:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False, dtype=torch.bfloat16) for _ in range(count)))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=1e-3, **options)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.step()
    return optimizer


def main() -> None:
    rounds, count = (int(value) for value in (sys.argv[1:] + ["1500", "291"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        ways: list[tuple[str, Any, dict[str, Any]]] = [
            ("FlashAdamW", FlashAdamW, {}),
            ("torch's AdamW, fused", torch.optim.AdamW, {"fused": True}),
            ("torch's AdamW, foreach", torch.optim.AdamW, {"foreach": True}),
        ]
        every = {
            (name, is_sharded): made(kind, count, is_sharded, **options)
            for name, kind, options in ways
            for is_sharded in (False, True)
        }
        times: dict[tuple[str, bool], list[float]] = {which: [] for which in every}
        for number in range(rounds):
            for which, optimizer in every.items():
                if which[0] == "FlashAdamW" or number % 10 == 0:
                    start = time.perf_counter()
                    optimizer.step()
                    times[which].append(1e3 * (time.perf_counter() - start))
        print(f"{count} parameters, torch {torch.__version__}; ms: least (median)")
        for name, _, _ in ways:
            plain, sharded = (sorted(times[name, is_sharded]) for is_sharded in (False, True))
            print(
                f"{name}: plain {plain[0]:.3f} ({plain[len(plain) // 2]:.3f}), "
                f"DTensors {sharded[0]:.3f} ({sharded[len(sharded) // 2]:.3f}), more {sharded[0] - plain[0]:.3f}"
            )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
