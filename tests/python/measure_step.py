"""What a step() costs on the host: run by hand, `python tests/python/measure_step.py [cuda]`.

Tensors of 8 elements leave nothing but overhead; 1,000 tensors of 512 x 512 (on the CPU, whose arithmetic would hide
all else, 64 x 64) are those of a model. Prints microseconds, the least of many runs and the median.
"""

from __future__ import annotations

import sys
import time

import torch

import flashoptim_native
from flashoptim_native import _ops

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


def cost(function, repeat=300, before=lambda: None):
    times = []
    for _ in range(repeat):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the queue is empty: host work alone
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    times.sort()
    return f"{times[0] * 1e6:9.1f} {times[repeat // 2] * 1e6:9.1f}"


def make(count, *shape):
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)) for _ in range(count)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def warmed_up(optimizer, steps=20):
    for _ in range(steps):
        optimizer.step()
    return optimizer


def measure_classes():
    makers = {
        "FlashAdamW, all quantized": lambda p: flashoptim_native.FlashAdamW(p, min_quantized_numel=0),
        "FlashAdamW, fp32 states": lambda p: flashoptim_native.FlashAdamW(p),
        "FlashSGD": lambda p: flashoptim_native.FlashSGD(p),
        "torch AdamW fused": lambda p: torch.optim.AdamW(p, fused=True),
        "torch AdamW foreach": lambda p: torch.optim.AdamW(p, foreach=True),
        "torch AdamW": lambda p: torch.optim.AdamW(p),
    }
    print(f"{'300 tensors of 8 elements':48}    least    median  us")
    for name, maker in makers.items():
        print(f"{name:48} {cost(warmed_up(maker(make(300, 8))).step)}")


def measure_parts(count, *shape):
    """A step, and what of it can be done alone."""
    optimizer = warmed_up(flashoptim_native.FlashAdamW(make(count, *shape), min_quantized_numel=0), 3)
    params = optimizer.param_groups[0]["params"]
    state = optimizer.state
    step_one = optimizer.step_param
    step_one(params[0])

    def new_gradients():
        for p in params:
            p.grad = torch.empty_like(p).fill_(1.0)

    def looked_at():
        # A scale that is no number is refused behind the look at all tensors, before anything is changed.
        records = optimizer._store.records
        controls = [(None,) * 5] * len(records.plans)
        try:
            _ops.store.step(records.handle, state, None, False, [], None, controls, float("nan"), 1)
        except RuntimeError:
            return
        raise AssertionError("the step was taken")

    def bump():
        torch.autograd.graph.increment_version(params)

    parts = {
        "read groups": lambda: optimizer._stepper.hyperparameters.read(optimizer.param_groups),
        "look at all tensors": looked_at,
        "version bump": bump,
        "optimizer.step()": optimizer.step,
        "optimizer.step_param() of one": lambda: step_one(params[0]),
    }
    what = f"FlashAdamW, {count} quantized tensors of {' x '.join(map(str, shape))}"
    print(f"\n{what:48}   the same gradients    new ones before each")
    with torch.no_grad():
        for name, part in parts.items():
            print(f"  {name:46} {cost(part, 100)}   {cost(part, 100, new_gradients)}")


def measure_odd(count, *shape):
    """A parameter whose gradient lies otherwise: what one costs beside many."""
    params = make(count, *shape)
    optimizer = warmed_up(flashoptim_native.FlashAdamW(params, min_quantized_numel=0), 3)
    params[0].grad = params[0].grad.t().contiguous().t()
    print(f"  {'optimizer.step(), one gradient transposed':46} {cost(optimizer.step, 100)}")


def main():
    torch.set_num_threads(1)
    measure_classes()
    side = 512 if DEVICE.startswith("cuda") else 64
    for count, shape in ((300, (8,)), (300, (64,)), (1000, (side, side))):
        measure_parts(count, *shape)
    measure_odd(1000, side, side)


if __name__ == "__main__":
    main()
