"""Items and time of a flat DCP checkpoint of an optimizer, beside torch's AdamW: 291 parameters as FSDP2 has them.

usage: save.py [ROUNDS] [PARAMETERS] [ROWS]

One gloo process; all in turns, the least of ROUNDS, in seconds of wall time and of the process's CPU time: taking the
state dict, and dcp.save of it. Matrices are ROWS x 64: from 64 rows on FlashAdamW's states are 8-bit. Parameters are
bfloat16; of torch's AdamW, whose states have the parameters' dtype, float32 ones, too.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from flashoptim_native import FlashAdamW


def made(kind: Any, count: int, rows: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(*(nn.Linear(64, rows, bias=False, dtype=dtype) for _ in range(count)))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = kind(model.parameters(), lr=1e-3)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def once(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> tuple[int, list[float]]:
    marks = [(time.perf_counter(), time.process_time())]
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    held = get_optimizer_state_dict(model, optimizer, options=options)
    marks.append((time.perf_counter(), time.process_time()))
    dcp.save({"optim": held}, checkpoint_id=folder)
    marks.append((time.perf_counter(), time.process_time()))
    shutil.rmtree(folder)
    (a, b), (c, d), (e, f) = marks
    return len(held), [c - a, d - b, e - c, f - d]


def main() -> None:
    rounds, count, rows = (int(value) for value in (sys.argv[1:] + ["20", "291", "64"][len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        kinds = (FlashAdamW, torch.bfloat16), (torch.optim.AdamW, torch.bfloat16), (torch.optim.AdamW, torch.float32)
        every = {f"{kind.__name__}, {dtype}": made(kind, count, rows, dtype) for kind, dtype in kinds}
        least: dict[str, list[float]] = {}
        items: dict[str, int] = {}
        for _ in range(rounds):
            for name, one in every.items():
                items[name], times = once(*one, folder + "/checkpoint")
                least[name] = [min(pair) for pair in zip(times, least.get(name, times))]
        for name, (take, take_cpu, save, save_cpu) in least.items():
            print(
                f"{name}: {items[name]} items; state dict {take:.3f} s (CPU {take_cpu:.3f}), "
                f"dcp.save {save:.3f} s (CPU {save_cpu:.3f})"
            )
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
