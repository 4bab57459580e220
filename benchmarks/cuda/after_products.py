"""Times a step alone and right behind matrix products, as behind a backward pass: a chip that was busy is slower.

    python benchmarks/cuda/after_products.py        268 M parameters in bf16, some 15 seconds

Milliseconds by CUDA events, medians; "untouched": gradients of 0 and states that never saw another.
"""

import statistics

import torch

import flashoptim_native

ROWS, COLUMNS = 65536, 4096
PRODUCTS = 200  # of 8192 x 8192 matrices before every step: about 0.3 s
STEPS = 8  # the first is left out: it makes the states


def milliseconds(optimizer: torch.optim.Optimizer, products: int, matrix: torch.Tensor) -> float:
    spans = []
    for _ in range(STEPS):
        for _ in range(products):
            matrix @ matrix
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        optimizer.step()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans[1:])


def main() -> None:
    matrix = torch.randn(8192, 8192, device="cuda").bfloat16()
    param = torch.nn.Parameter((0.02 * torch.randn(ROWS, COLUMNS, device="cuda")).bfloat16())
    dense = (1e-3 * torch.randn(ROWS, COLUMNS, device="cuda")).bfloat16()
    makers = {
        "FlashAdamW": (lambda: flashoptim_native.FlashAdamW([param], lr=1e-5), dense),
        "FlashAdamW, untouched": (lambda: flashoptim_native.FlashAdamW([param], lr=1e-5), torch.zeros_like(dense)),
        "torch AdamW fused, bf16": (lambda: torch.optim.AdamW([param], lr=1e-5, fused=True), dense),
    }
    print(
        f"{torch.cuda.get_device_name()}, {ROWS * COLUMNS / 1e6:.1f} M parameters\n"
        f"{'':24}    alone   behind products   ms"
    )
    for name, (make, grad) in makers.items():
        param.grad = grad
        optimizer = make()
        alone = milliseconds(optimizer, 0, matrix)
        print(f"{name:24} {alone:8.3f} {milliseconds(optimizer, PRODUCTS, matrix):17.3f}")


if __name__ == "__main__":
    main()
