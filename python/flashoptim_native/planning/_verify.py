"""A plan held against real steps on the CUDA device that is there."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import gradient_release
from . import _choices, _models
from ._choices import Choice
from ._cuda_rules import Device
from ._models import Model, PlanError
from ._plan import Planner, Setting

#: The first makes states, the second is like all that follow.
_STEPS = 3


class Verification(NamedTuple):
    """Predicted and measured. Bytes."""

    choice: Choice
    predicted: int
    #: torch.cuda.max_memory_allocated's, from the second step on.
    measured: int
    #: What the allocator held for it, gaps included.
    reserved: int
    #: What the device had in use besides: the context, libraries, other processes.
    outside: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted / self.measured - 1


def verify(planner: Planner, choice: Choice, setting: Setting) -> Verification:
    """Runs steps on the current CUDA device and measures their peak.

    Raises:
        PlanError: there is no CUDA device, the choice is another library's that is not there, only weights are known,
            or several ranks are asked for.
        torch.OutOfMemoryError: the step does not fit.
    """
    if not torch.cuda.is_available():
        raise PlanError("--verify needs a CUDA device, and torch finds none here")
    if not isinstance(planner.model, Model):
        raise PlanError("--verify needs a model that can run; of a file of weights nothing but the weights is known")
    if setting.ranks > 1:
        raise PlanError("--verify runs one process; leave --ranks out")
    predicted = planner.row(choice, setting._replace(device=Device.current())).total
    measured, reserved, outside = measure(planner.model, choice, setting)
    return Verification(choice, predicted, measured, reserved, outside)


def measure(model: Model, choice: Choice, setting: Setting, steps: int = _STEPS) -> tuple[int, int, int]:
    """Peak bytes allocated and reserved by steps behind the first, and what else the device has in use."""
    _clear()
    module, step = prepare(model, choice, setting)
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(steps - 1):
        step()
    torch.cuda.synchronize()
    free, whole = torch.cuda.mem_get_info()
    result = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    outside = whole - free - torch.cuda.memory_reserved()
    del module, step
    _clear()
    return *result, outside


def prepare(model: Model, choice: Choice, setting: Setting, device: str = "cuda") -> tuple[nn.Module, Any]:
    """A model on a device and a function that takes one training step."""
    torch.manual_seed(0)
    with torch.device(device), _models.default_dtype(choice.dtype):
        module = model.make()
        if any(tensor.device.type == "meta" for tensor in (*module.parameters(), *module.buffers())):
            module = _filled(module, device)
        if setting.checkpoint:
            model.checkpoint(module)
        batch = model.batch_of(module, setting.batch, setting.length)
    optimizer = _optimizer(module, choice)
    if choice.releases:
        gradient_release.enable_gradient_release(module, optimizer)
    is_mixed = setting.autocast and choice.dtype == torch.float32

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if is_mixed else contextlib.nullcontext():
            loss = _models.loss_of(module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        optimizer.step()
        optimizer.zero_grad()

    return module, step


@torch.no_grad()
def _filled(module: nn.Module, device: str) -> nn.Module:
    """A module of the meta device with memory: random weights, and zeros for buffers."""
    module = module.to_empty(device=device)
    for param in module.parameters():
        param.normal_(0.0, 0.02)
    for buffer in module.buffers():
        buffer.zero_()
    return module


def _optimizer(module: nn.Module, choice: Choice) -> Any:
    params = [param for param in module.parameters() if param.requires_grad]
    if choice.kind is not None:
        return _choices.class_of(choice.kind)(params, lr=1e-5, **choice.options)
    if choice.title.startswith("bitsandbytes"):
        try:
            import bitsandbytes
        except ImportError as error:
            raise PlanError("--verify of bitsandbytes needs it: pip install bitsandbytes") from error
        return bitsandbytes.optim.AdamW8bit(params, lr=1e-5)
    names = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}
    kind = choice.title.split()[1].rstrip(",")
    if kind not in names:
        raise PlanError(f"--verify of {choice.title!r}: torch has no fused {kind}")
    options = {"momentum": 0.9} if kind == "sgd" else {}
    return getattr(torch.optim, names[kind])(params, lr=1e-5, fused=True, **options)


def _clear() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


__all__ = ["Verification", "measure", "prepare", "verify"]
