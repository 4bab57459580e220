"""What a step() of 300 tensors costs on the host: run by hand, `python tests/python/measure_step.py`.

Tensors of 8 elements leave nothing but overhead. Prints microseconds, the least of many runs and the median.
"""

from __future__ import annotations

import time

import torch

import flashoptim


def cost(function, repeat=1000):
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    times.sort()
    return f"{times[0] * 1e6:8.1f} {times[repeat // 2] * 1e6:8.1f}"


def make(count=300, numel=8):
    params = [torch.nn.Parameter(torch.randn(numel, dtype=torch.bfloat16)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def main():
    torch.set_num_threads(1)
    makers = {
        "FlashAdamW, all quantized": lambda p: flashoptim.FlashAdamW(p, min_quantized_numel=0),
        "FlashAdamW, fp32 states": lambda p: flashoptim.FlashAdamW(p),
        "FlashSGD": lambda p: flashoptim.FlashSGD(p),
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

    optimizer = flashoptim.FlashAdamW(make(), min_quantized_numel=0)
    optimizer.step()
    optimizer.step()
    with torch.no_grad():
        hypers = optimizer._read_groups()
        plan = optimizer._current_plan()
        calls = plan.gather(optimizer.state, hypers)
        parts = {
            "read groups": optimizer._read_groups,
            "check plan": optimizer._current_plan,
            "gather": lambda: plan.gather(optimizer.state, hypers),
            "operator call": lambda: calls[0].run(optimizer.kind, 1.0, None, None),
            "commit": lambda: calls[0].commit(optimizer.state),
        }
        print("FlashAdamW, all quantized, in parts:")
        for name, part in parts.items():
            print(f"  {name:30} {cost(part)}")


if __name__ == "__main__":
    main()
