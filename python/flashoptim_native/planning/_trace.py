"""One training step on tensors without memory, and every allocation that it would make, by the lifetime of storages."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import _cuda_rules

#: CUDA's caching allocator hands out multiples of this.
ALLOCATION = 512


def rounded(size: int) -> int:
    """Bytes that CUDA's caching allocator counts for an allocation of ``size``."""
    return -(-size // ALLOCATION) * ALLOCATION


class Event(NamedTuple):
    """What happens to memory, in order.

    ``kind``: "allocate", "free", "workspace" (allocated and freed within one operator), "gradient" (the gradient of
    parameter ``size`` is complete, and lies in storage ``storage``), "backward" (the forward pass has ended).
    """

    kind: str
    storage: int
    size: int
    operator: str


class Trace(NamedTuple):
    """A training step's events, and what does not change over it."""

    events: list[Event]
    #: Kept from step to step by libraries: cuBLAS's workspaces.
    kept: int
    #: Bytes of the batch that the step was given.
    inputs: int
    #: Names of operators that ran, and how often.
    operators: dict[str, int]


class _Recorder(TorchDispatchMode):
    """Writes down storages as operators make them and as they die."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.operators: dict[str, int] = {}
        self.products = {"forward": False, "backward": False}
        self.phase = "forward"
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked for more often than all else
        result = func(*args, **(kwargs or {}))
        name = str(func).removesuffix(".default")
        self.operators[name] = self.operators.get(name, 0) + 1
        if _cuda_rules.is_matrix_product(func):
            self.products[self.phase] = True
        size = _cuda_rules.workspace(func, args)
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor) and leaf.fake_device.type != "meta":
                self._see(leaf, name)
        if size:
            self.events.append(Event("workspace", -1, rounded(size), name))
        return result

    def _see(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._live:
            return
        size = storage.nbytes()
        if size:
            self._count += 1
            self._live[key] = self._count
            self.events.append(Event("allocate", self._count, rounded(size), name))
            weakref.finalize(storage, self._free, key).atexit = False

    def _free(self, key: int) -> None:
        number = self._live.pop(key)
        self.events.append(Event("free", number, 0, ""))

    def gradient_is_complete(self, index: int, grad: Tensor) -> None:
        number = self._live.get(grad.untyped_storage()._cdata, -1)
        self.events.append(Event("gradient", number, index, ""))


def fake_copy(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives a module on the meta device fake CPU tensors, under a FakeTensorMode. ``dtype``: of what is floating-point.

    Parameters that are shared stay shared.
    """
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=kind, device="cpu")
            if isinstance(tensor, nn.Parameter):
                copy = nn.Parameter(copy, tensor.requires_grad)
            made[id(tensor)] = copy
        return made[id(tensor)]

    for module in model.modules():
        tables: Any = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = fake(tensor)


def trace_step(
    model: nn.Module, inputs: Any, loss_of: Callable[[nn.Module, Any], Tensor], device: _cuda_rules.Device
) -> Trace:
    """Runs forward and backward of a model of fake tensors; gradients stay, as at the end of ``loss.backward()``.

    Args:
        model: of fake CPU tensors. Nothing of it changes but ``.grad``, which is None again afterwards.
        inputs: its batch, fake tensors too.
        loss_of: of the model and the batch, the loss that ``backward()`` is called on.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    batch = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    recorder = _Recorder([*model.parameters(), *model.buffers(), *batch])

    def watch(index: int) -> Callable[[Tensor], None]:
        def complete(param: Tensor) -> None:
            if param.grad is not None:
                recorder.gradient_is_complete(index, param.grad)

        return complete

    hooks = [
        param.register_post_accumulate_grad_hook(watch(index))  # type: ignore[no-untyped-call]
        for index, param in enumerate(params)
    ]
    try:
        with _cuda_rules.as_on_cuda(device), recorder:
            loss = loss_of(model, inputs)
            recorder.events.append(Event("backward", -1, 0, ""))
            recorder.phase = "backward"
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
    finally:
        for hook in hooks:
            hook.remove()
    events = list(recorder.events)
    for param in params:
        param.grad = None
    kept = device.cublas_workspace * sum(recorder.products.values())
    return Trace(events, kept, sum(rounded(tensor.untyped_storage().nbytes()) for tensor in batch), recorder.operators)


__all__ = ["ALLOCATION", "Event", "Trace", "fake_copy", "rounded", "trace_step"]
