"""Times one optimizer step on this machine beside torch's and, where installed, bitsandbytes' and torchao's."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import optimizers

_COMMON: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}


class StepTime(NamedTuple):
    """What one optimizer's step took. Milliseconds; the middle of all timed steps."""

    title: str
    step_ms: float
    #: Until step() returned: on CUDA the device may work on.
    host_ms: float
    #: The first, with states made and, for some, kernels compiled.
    first_ms: float
    #: Of weights, states, corrections, scales and gradients.
    bytes_held: int
    #: Bytes that a step must read and write at least, over its time, as a share of a copy's bandwidth here.
    share_of_copy: float


def candidates(device: torch.device) -> dict[str, Callable[[list[Tensor]], Any]]:
    """Optimizers by title: each is made over parameters, bf16 ones but where the title says fp32."""
    torch_adamw = torch.optim.AdamW
    found: dict[str, Callable[[list[Tensor]], Any]] = {
        "FlashAdamW 24 bit": lambda params: optimizers.FlashAdamW(params, **_COMMON),
        "FlashAdamW 24 bit, paper codec": lambda params: optimizers.FlashAdamW(params, state_codec="paper", **_COMMON),
        "torch fused, fp32": lambda params: torch_adamw(params, fused=True, **_COMMON),
        "torch fused, bf16": lambda params: torch_adamw(params, fused=True, **_COMMON),
        "torch foreach, fp32": lambda params: torch_adamw(params, foreach=True, **_COMMON),
    }
    if importlib.util.find_spec("bitsandbytes") is not None:
        import bitsandbytes

        found["bitsandbytes 8-bit, bf16"] = lambda params: bitsandbytes.optim.AdamW8bit(params, **_COMMON)
    if importlib.util.find_spec("torchao") is not None and device.type == "cuda":
        from torchao.optim import AdamW8bit

        found["torchao 8-bit, bf16"] = lambda params: AdamW8bit(params, **_COMMON)
    return found


def time_steps(
    make: Callable[[list[Tensor]], Any],
    title: str,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
    steps: int,
    copy_bandwidth: float,
) -> StepTime:
    """Times ``steps`` steps over parameters of ``shapes``, after the first and one more.

    Args:
        copy_bandwidth: bytes a second, read and written, of copy_bandwidth_of().
    """
    dtype = torch.float32 if title.endswith("fp32") else torch.bfloat16
    params: list[Tensor] = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = 1e-3 * torch.randn_like(param)
    optimizer = make(params)

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        optimizer.step()
        host = time.perf_counter() - start
        _wait(device)
        return 1e3 * host, 1e3 * (time.perf_counter() - start)

    _wait(device)
    first = step()[1]
    step()
    hosts, wholes = zip(*(step() for _ in range(steps)))
    held = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    weights = sum(param.nbytes for param in params)
    states = sum(_bytes(one) for one in held)
    moved = 2 * weights + 2 * states + weights  # gradients are read alone
    whole = statistics.median(wholes)
    return StepTime(
        title,
        whole,
        statistics.median(hosts),
        first,
        2 * weights + states,
        moved / (1e-3 * whole) / copy_bandwidth,
    )


def _bytes(tensor: Tensor) -> int:
    """Of a plain tensor or of one that is made of several (torchao's)."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(_bytes(getattr(tensor, name)) for name in names)


def copy_bandwidth_of(device: torch.device, size: int = 1 << 28, turns: int = 7) -> float:
    """Bytes a second that a copy reads and writes; the best of ``turns``."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    best = float("inf")
    for _ in range(turns):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


__all__ = ["StepTime", "candidates", "copy_bandwidth_of", "time_steps"]
