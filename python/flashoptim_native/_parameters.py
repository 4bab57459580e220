"""How a parameter becomes a local tensor and its place in the whole: the one module that knows kinds of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops

PARAMETER_DTYPES = tuple(_ops.DTYPES)


_PLAIN_TYPES: set[type] = {Tensor, torch.nn.Parameter}


class Local(NamedTuple):
    """A parameter as the store sees it."""

    tensor: Tensor  # plain
    whole_numel: int  # elements of all its shards
    #: first_element, run, stride, rows and row size of the whole (Place of include/flashoptim/step.h); None: the whole
    place: tuple[int, int, int, int, int] | None = None


def local(param: Tensor) -> Local:
    """The tensor whose memory a step reads and writes."""
    return Local(param, param.numel())


def check_parameter(param: Any, name: str) -> None:
    """Raises where a tensor cannot be stepped at all; whether its device can is said when it is stepped.

    Raises:
        TypeError: no dense tensor of an allowed dtype.
        ValueError: its elements share memory.
    """
    if not isinstance(param, Tensor):
        return  # torch.optim.Optimizer.add_param_group names this error
    if hasattr(param, "device_mesh"):
        raise TypeError(f"{name} is a DTensor, which this version does not step; allowed are plain tensors")
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; allowed is torch.strided")
    _check_type(param, name)
    if param.dtype not in PARAMETER_DTYPES:
        allowed = ", ".join(map(str, PARAMETER_DTYPES))
        raise TypeError(f"{name} has dtype {param.dtype}; allowed are {allowed}")
    if param.device.type != "meta" and overlaps(param):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} and stride {param.stride()} may refer to one element of memory "
            "twice; allowed are tensors whose elements are distinct"
        )


def check_gradient(param: Tensor, grad: Tensor, name: str) -> None:
    """Raises RuntimeError where a gradient does not go with its parameter."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} has layout {grad.layout}; allowed is torch.strided (for an embedding, "
            "sparse=False)"
        )
    _check_type(grad, f"the gradient of {name}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)}; allowed is the parameter's, {tuple(param.shape)}"
        )
    storage = grad.untyped_storage().nbytes() // grad.element_size() - grad.storage_offset()
    if grad.numel() > 0 and storage <= sum((size - 1) * stride for size, stride in zip(grad.shape, grad.stride())):
        raise RuntimeError(
            f"the gradient of {name} of shape {tuple(grad.shape)} and dtype {grad.dtype} needs more memory than its storage "
            f"has, {grad.untyped_storage().nbytes()} bytes: the storage has been resized"
        )
    if grad.device != param.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}; allowed is the parameter's, {param.device}")
    if grad.dtype not in (param.dtype, torch.float32):
        allowed = " and ".join(dict.fromkeys((str(param.dtype), "torch.float32")))
        raise RuntimeError(
            f"the gradient of {name} has dtype {grad.dtype}; allowed are the parameter's dtype and torch.float32 "
            f"({allowed})"
        )


def _check_type(tensor: Tensor, name: str) -> None:
    """Makes a subclass of torch.Tensor known to the store; raises TypeError where its memory is not its own."""
    kind = type(tensor)
    if kind in _PLAIN_TYPES:
        return
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(
            f"{name} is a {kind.__name__}, which has a __torch_dispatch__ of its own; allowed are plain tensors and "
            "subclasses without"
        )
    _ops.store.plain(kind)
    _PLAIN_TYPES.add(kind)


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory, judged by strides (exact for all layouts that PyTorch itself makes)."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def name_of(groups: list[dict[str, Any]], group: int, position: int) -> str:
    """How messages call a parameter."""
    names = groups[group].get("param_names")
    if names is not None and position < len(names):
        return f"parameter {names[position]!r}"
    return f"parameter {position} of group {group}"


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Whether parameters of a group have the slots that momentum needs: all but SGD's do always."""
    return "momentum" not in group or group["momentum"] != 0
