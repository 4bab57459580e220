"""Time of `optimizer.step_param()` of one parameter, among few and among many: it must not depend on their number.

    python benchmarks/step/step_param.py [cpu|cuda|meta] [--counts 1000 20000]

Microseconds of this thread's own time for each parameter, all of them stepped one after the other as gradient release
does it: the least of all stretches of 200 in several rounds, which take turns among the counts. Tensors of 8 elements,
bf16 with 24 bits and 8-bit states.
"""

import argparse
import gc
import statistics
import time

import torch

import flashoptim_native

STRETCH = 200


def make(count, device):
    params = [torch.nn.Parameter(torch.zeros(8, dtype=torch.bfloat16, device=device)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = flashoptim_native.FlashAdamW(params, min_quantized_numel=0)
    for _ in range(3):
        for p in params:
            optimizer.step_param(p)
    return params, optimizer


def time_each(params, step):
    start = time.thread_time()
    for p in params:
        step(p)
    return 1e6 * (time.thread_time() - start) / len(params)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda", "meta"))
    parser.add_argument("--counts", type=int, nargs="+", default=(1000, 20000))
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    made = {count: make(count, given.device) for count in sorted(given.counts)}
    gc.freeze()
    least = dict.fromkeys(made, float("inf"))
    every = {count: [] for count in made}
    for _ in range(given.rounds):
        for count, (params, optimizer) in made.items():
            for begin in range(0, count, STRETCH):
                us = time_each(params[begin : begin + STRETCH], optimizer.step_param)
                least[count] = min(least[count], us)
                every[count].append(us)
    few = min(made)
    for count, us in least.items():
        median = statistics.median(every[count])
        print(
            f"{given.device} {count:6} parameters: least {us:6.2f} us each, {us / least[few]:.2f} times; "
            f"median {median:6.2f}, {median / statistics.median(every[few]):.2f} times"
        )


if __name__ == "__main__":
    main()
