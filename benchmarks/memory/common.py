"""What this folder's benchmarks share: the loss, clocks, memory figures, facts about the machine, a JSON file a run.

A run is a dict:
    benchmark, variant    which run it is
    config                everything that decides its numbers
    machine               where it ran
    command               how to run it again
    results               its numbers; None where the run did not fit into memory
"""

import gc
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_FOLDER = ROOT / "build" / "memory"
SOURCES = ("include", "src", "libtorch", "python", "benchmarks/memory")
WARM_UP = 2  # steps that count for the peak, but for no time
GIB = 2**30


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Both gradients are made in the forward pass, chunk by chunk, while the chunk's logits are there."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk, wants_grad):
        dtype = hidden.dtype
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
        head, count = weight.to(dtype), len(targets)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = torch.zeros_like(weight) if wants_grad else None
        products = torch.empty(min(chunk, count), len(weight), dtype=dtype, device=hidden.device)
        logits = torch.empty_like(products, dtype=torch.float32)
        for start in range(0, count, chunk):
            rows = hidden[start : start + chunk].to(dtype)
            labels = targets[start : start + chunk].unsqueeze(1)
            product, values = products[: len(rows)], logits[: len(rows)]
            torch.mm(rows, head.t(), out=product)
            values.copy_(product)
            wanted = values.gather(1, labels)
            largest = values.amax(1, keepdim=True)
            sums = values.sub_(largest).exp_().sum(1, keepdim=True)
            loss += (largest + sums.log() - wanted).sum() / count
            if wants_grad:
                slopes = values.div_(sums)
                slopes.scatter_add_(1, labels, torch.full_like(sums, -1.0))
                product.copy_(slopes.div_(count))
                grad_hidden[start : start + chunk] = product @ head
                if weight.dtype == dtype:
                    grad_weight.addmm_(product.t(), rows)
                else:
                    grad_weight += product.t() @ rows
        ctx.grads = (grad_hidden, grad_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None, None


def chunked_cross_entropy(hidden, weight, targets, chunk=256):
    """Mean cross entropy in fp32 of ``hidden @ weight.T``: logits exist for ``chunk`` rows at a time.

    Beside the result it holds 4 + 2 bytes for each of ``chunk`` x vocabulary logits, and the gradient of ``weight`` (in
    its dtype) from the forward pass on, instead of logits for all rows.
    """
    return _ChunkedCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), chunk, torch.is_grad_enabled() and weight.requires_grad
    )


class Clock:
    """Points in time on a device, read at the end: CUDA events, or the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        if self.device.type != "cuda":
            return 1e3 * (end - start)
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)


class StepTimes:
    """Milliseconds of the parts of steps: medians without the first steps."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clock(device)
        self.marks: list[tuple] = []

    def add(self, *marks) -> None:
        """Marks before forward(), before backward(), before optimizer.step() and after it."""
        self.marks.append(marks)

    def medians(self) -> dict[str, float]:
        marks = self.marks[WARM_UP:] or self.marks
        parts = {"forward_ms": (0, 1), "backward_ms": (1, 2), "optimizer_ms": (2, 3), "step_ms": (0, 3)}
        return {
            name: round(statistics.median(self.clock.milliseconds(times[a], times[b]) for times in marks), 4)
            for name, (a, b) in parts.items()
        }


def start_measuring(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict:
    """Since start_measuring(); on a CPU the process's largest resident set since its start, which is only a hint."""
    if device.type != "cuda":
        return {
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "peak_is": "the process's largest resident set",
        }
    return {
        "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "peak_is": "torch.cuda.max_memory_allocated's",
    }


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, gradients: int) -> dict:
    """Bytes per parameter of weights, states and the gradients that were alive after backward()."""
    count = sum(p.numel() for p in model.parameters())
    weights = sum(p.nbytes for p in model.parameters())
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    states = sum(tensor.nbytes for tensor in tensors)
    return {
        "parameters": count,
        "weight_bytes_per_parameter": weights / count,
        "state_bytes_per_parameter": states / count,
        "gradient_bytes_per_parameter": gradients / count,
        "bytes_per_parameter": (weights + states + gradients) / count,
    }


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """Last commit that changed the sources, with "+" where they have been changed since."""
    name = _output_of("git", "log", "-1", "--format=%h", "--", *SOURCES)
    return (name or "unknown") + ("+" if _output_of("git", "status", "--porcelain", "--", *SOURCES) else "")


def machine(device: torch.device, commit_name: str | None) -> dict:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        driver = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
        driver = ""
    return {
        "device": name,
        "driver": driver,
        "cuda": torch.version.cuda or "",
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "commit": commit_name or commit(),
    }


def add_options(parser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model and batch that a CPU takes a second for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder of results (default: build/memory)")
    parser.add_argument("--commit", help="name of the commit, where there is no git to ask")


def write_run(args, benchmark: str, variant: str, config: dict, results: dict | None) -> dict:
    run = {
        "benchmark": benchmark,
        "variant": variant,
        "config": config,
        "machine": machine(torch.device(args.device), args.commit),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    shape = "-tiny" if args.tiny else "" if config.get("full_depth", True) else f"-{config['layers']}layers"
    path = args.out / f"{benchmark}{shape}-{variant}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(f"[{benchmark}] {variant}: written to {path}", flush=True)
    return run


def say(benchmark: str, start: float, text: str) -> None:
    print(f"[{benchmark}] {time.monotonic() - start:6.1f} s  {text}", flush=True)
