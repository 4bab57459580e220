"""Measures what gradient release and its ways of clipping cost: time of a step, most bytes of gradients at a time.

usage: measure_release.py [cpu|cuda] [LAYERS] [WIDTH]
"""

import statistics
import sys
import time

import torch
from torch import nn

from flashoptim_native import FlashAdamW, enable_gradient_release

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
LAYERS, WIDTH = int((sys.argv[2:] or [12])[0]), int((sys.argv[3:] or [512])[0])
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # bf16 products are slow on many CPUs
TOKENS, STEPS = 256, 15
WAYS = ("no release", None, "parameter", "previous", "two_pass")


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(way):
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    model = nn.Sequential(*layers).to(DEVICE, DTYPE)
    params = list(model.parameters())
    optimizer = FlashAdamW(params, lr=1e-4)
    most = 0

    def count(_):
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in params if p.grad is not None))

    hooks = [p.register_post_accumulate_grad_hook(count) for p in params]
    handle = None
    if way != "no release":
        clip = {} if way is None else {"clip": way, "max_norm": 1.0}
        handle = enable_gradient_release(model, optimizer, **clip)
    x = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=DTYPE)
    times = []
    for step in range(STEPS):
        if step == 2:
            for hook in hooks:
                hook.remove()
        synchronize()
        start = time.perf_counter()
        loss = model(x).float().square().mean()
        if way == "two_pass":
            with handle.measure_norm():
                loss.backward(retain_graph=True)
        loss.backward()
        if way == "no release":
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]), most, sum(p.nbytes for p in params)


def main():
    torch.set_num_threads(1)
    print(f"{LAYERS} layers of {WIDTH}, {TOKENS} tokens, {DTYPE} on {DEVICE}, torch {torch.__version__}")
    for way in WAYS:
        seconds, most, whole = measure(way)
        name = (
            "release, no clipping" if way is None else f'clip="{way}"' if way != "no release" else "clip_grad_norm_()"
        )
        print(f"  {name:22} {1e3 * seconds:8.1f} ms a step, gradients {most / 2**20:8.2f} MiB of {whole / 2**20:.1f}")


if __name__ == "__main__":
    main()
