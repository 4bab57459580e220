"""Host time of `optimizer.step()` from Python: what a step costs before the device, or the CPU's arithmetic, is done.

    python benchmarks/step/host_time.py cuda                         this package
    python benchmarks/step/host_time.py cuda --package flashoptim    a build from before the package had its own name

Microseconds, the least of many steps and the median, of tensors of 8, 64 and, on CUDA, 512 x 512 elements, bf16 with
24 bits and 8-bit states: with the gradients of the step before, and with new ones. The device is idle when a step
begins. To compare two builds, run them in turns.
"""

import argparse
import importlib
import time

import torch


def host_time(step, repeat, before=lambda: None):
    """Least and median of `repeat` calls, in microseconds."""
    times = []
    for _ in range(repeat):
        before()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - start))
    times.sort()
    return f"{times[0]:8.1f} {times[repeat // 2]:8.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("device", choices=("cpu", "cuda", "meta"), help="meta: a step without arithmetic")
    parser.add_argument("--package", default="flashoptim_native")
    parser.add_argument("--steps", type=int, default=300)
    given = parser.parse_args()
    package = importlib.import_module(given.package)
    torch.set_num_threads(1)
    large = (512, 512) if given.device == "cuda" else (8,)
    print(f"{given.package}, torch {torch.__version__}, us: least, median")
    for count, shape in ((300, (8,)), (300, (64,)), (1000, large)):
        params = [
            torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=given.device)) for _ in range(count)
        ]

        def new_gradients(params=params):
            for p in params:
                p.grad = torch.empty_like(p).fill_(1.0)

        new_gradients()
        optimizer = package.FlashAdamW(params, min_quantized_numel=0)
        for _ in range(10):
            optimizer.step()
        same = host_time(optimizer.step, given.steps)
        new = host_time(optimizer.step, given.steps // 3, new_gradients)
        print(f"{given.device} {count:5} x {'x'.join(map(str, shape)):8} same gradients {same}   new gradients {new}")


if __name__ == "__main__":
    main()
