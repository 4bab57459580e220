"""What a step() of 300 tensors costs on the host: run by hand, `python tests/python/measure_step.py [cuda]`.

Tensors of 8 elements leave nothing but overhead. Prints microseconds, the least of many runs and the median.
"""

from __future__ import annotations

import sys
import time

import torch
from flashoptim_native._prepared import Controls

import flashoptim_native
from flashoptim_native import _ops


def cost(function, repeat=1000, before=lambda: None):
    times = []
    for _ in range(repeat):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the queue is empty: host work alone
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    times.sort()
    return f"{times[0] * 1e6:8.1f} {times[repeat // 2] * 1e6:8.1f}"


def make(count=300, numel=8, device=None):
    device = device or (sys.argv[1] if len(sys.argv) > 1 else "cpu")
    params = [torch.nn.Parameter(torch.randn(numel, dtype=torch.bfloat16, device=device)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def main():
    torch.set_num_threads(1)
    makers = {
        "FlashAdamW, all quantized": lambda p: flashoptim_native.FlashAdamW(p, min_quantized_numel=0),
        "FlashAdamW, fp32 states": lambda p: flashoptim_native.FlashAdamW(p),
        "FlashSGD": lambda p: flashoptim_native.FlashSGD(p),
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW": lambda p: torch.optim.AdamW(p),
    }
    print(f"{'300 tensors of 8 elements':32}    least   median  us")
    for name, maker in makers.items():
        optimizer = maker(make())
        for _ in range(20):
            optimizer.step()
        print(f"{name:32} {cost(optimizer.step, 300)}")

    for numel in (8, 64):
        measure_parts(numel)


def measure_parts(numel):
    optimizer = flashoptim_native.FlashAdamW(make(numel=numel), min_quantized_numel=0)
    for _ in range(3):
        optimizer.step()
    prepared = optimizer._prepared[0]
    params = prepared.params

    def new_gradients():
        for p in params:
            p.grad = torch.empty_like(p).fill_(1.0)

    with torch.no_grad():
        hypers = optimizer._read_groups()
        counter = optimizer._monitor.counter(prepared.device)
        parts = {
            "read groups": optimizer._read_groups,
            "check that nothing changed": optimizer._make_prepared,
            "step": lambda: prepared.step(hypers, [None], Controls(), counter, 0),
            "  of it, gradients": prepared._gradients,
            "  the same through the operator": lambda: _ops.plan_check(prepared.plan, [p.grad for p in params]),
            "  of it, versions": lambda: torch.autograd.graph.increment_version(prepared.params),
            "  of it, counts": lambda: prepared._count([], set()),
            "optimizer.step()": optimizer.step,
        }
        print(
            f"FlashAdamW, 300 quantized tensors of {numel}, in parts:     the same gradients      new ones before each"
        )
        for name, part in parts.items():
            print(f"  {name:50} {cost(part, 300)}    {cost(part, 300, new_gradients)}")


if __name__ == "__main__":
    main()
