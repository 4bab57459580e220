"""Times torch's fused AdamW with fp32 weights on the models of step_benchmark.cpp, for the same table.

    python benchmarks/cuda/torch_adamw.py

Medians of 40 steps by CUDA events, the next ones queued behind; wall time of a step that is waited for.
"""

import itertools
import statistics
import time

import torch


def gpt2() -> list[tuple[int, ...]]:
    layer = [
        (768,),
        (768,),
        (768, 2304),
        (2304,),
        (768, 768),
        (768,),
        (768,),
        (768,),
        (768, 3072),
        (3072,),
        (3072, 768),
        (768,),
    ]
    return [(50257, 768), (1024, 768), *(12 * layer), (768,), (768,)]


def llama_layer() -> list[tuple[int, ...]]:
    matrices = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    return [*matrices, (4096,), (4096,)]


def resnet50() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    def conv(out: int, inputs: int, kernel: int) -> None:
        shapes.extend([(out, inputs, kernel, kernel), (out,), (out,)])

    conv(64, 3, 7)
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            conv(width, inputs, 1)
            conv(width, width, 3)
            conv(4 * width, width, 1)
            if block == 0:
                conv(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


MODELS = {
    "256Mi, one tensor": [(1 << 28,)],
    "Llama-3.1-8B layer": llama_layer(),
    "GPT-2 124M": gpt2(),
    "ResNet-50": resnet50(),
}


def main() -> None:
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for name, shapes in MODELS.items():
        params = [torch.nn.Parameter(0.01 * torch.randn(shape, device="cuda")) for shape in shapes]
        for param in params:
            param.grad = 0.01 * torch.randn_like(param)
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        for _ in range(12):
            optimizer.step()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(41)]
        events[0].record()
        for event in events[1:]:
            optimizer.step()
            event.record()
        torch.cuda.synchronize()
        ms = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
        wall = []
        for _ in range(20):
            start = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            wall.append(1e3 * (time.perf_counter() - start))
        count = sum(param.numel() for param in params)
        print(
            f"{name:28} {'torch AdamW fused, fp32':32} {count / 1e6:10.1f} {ms:8.4f} "
            f"{min(wall):8.4f} {statistics.median(wall):9.4f}"
        )


if __name__ == "__main__":
    main()
