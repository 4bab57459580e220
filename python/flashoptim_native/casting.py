"""cast_model: a model's parameters and buffers in 16 bits, with the layers that need it left in fp32."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_map

from . import _validate

LayerSpec = str | nn.Module
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cast_model(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    selective: bool = True,
    full_precision_layers: Sequence[LayerSpec] | None = None,
    full_precision_recast_layers: Sequence[LayerSpec] | None = None,
) -> nn.Module:
    """Casts the floating-point parameters and buffers of ``model`` in place.

    Args:
        model: the model.
        dtype: torch.bfloat16 or torch.float16 (torch.float32 casts back).
        selective: leave normalization layers with running statistics (batch and instance norm) as they are.
        full_precision_layers: layers to keep in fp32, with everything inside them; their floating-point inputs are cast
            to fp32 and their outputs stay fp32. For the last layers of a model.
        full_precision_recast_layers: the same, but outputs are cast back to ``dtype``. For layers in the middle.

    A layer is a module of the model or a pattern (``fnmatch``) for its full dotted name: ``"head"`` is ``model.head``
    alone, ``"*.head"`` a head inside any other module. Parameters that several modules share stay shared; where one of
    those modules is kept in fp32, so is the parameter.

    Each tensor is cast with its gradient, or not at all; where an interrupt comes between, calling it again goes on.

    Returns:
        ``model``.

    Raises:
        TypeError: an argument is of another type than those above; nothing has changed then.
        ValueError: ``dtype`` is none of the three; nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")
    _validate.check_bool("selective", selective)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not allowed; allowed are {', '.join(map(str, _DTYPES))}")
    kept = _matching(model, full_precision_layers, "full_precision_layers")
    recast = _matching(model, full_precision_recast_layers, "full_precision_recast_layers")

    targets: dict[int, torch.dtype | None] = {}
    for module in (*kept, *recast):
        targets.update((id(tensor), torch.float32) for tensor in (*module.parameters(), *module.buffers()))
    if selective:
        for module in model.modules():
            if isinstance(module, _NormBase):
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                targets.update((id(tensor), None) for tensor in own if id(tensor) not in targets)

    # Views of one storage stay views of one storage, so they are cast together.
    together: dict[Any, list[tuple[Tensor, torch.dtype]]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        target = targets.get(id(tensor), dtype)
        if target is not None and tensor.is_floating_point() and tensor.dtype != target:
            has_memory = tensor.device.type != "meta" and tensor.numel() > 0
            key = tensor.untyped_storage().data_ptr() if has_memory else f"{id(tensor)}"
            together.setdefault((tensor.device, key), []).append((tensor, target))
    for tensors in together.values():
        _cast_together(tensors)

    for module in dict.fromkeys((*kept, *recast)):
        if _cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        is_cast_back = any(isinstance(hook, _CastOutput) for hook in module._forward_hooks.values())
        if module in recast and not is_cast_back:
            module.register_forward_hook(_CastOutput(dtype))
    return model


def _matching(model: nn.Module, specs: Sequence[LayerSpec] | None, argument: str) -> list[nn.Module]:
    if specs is None:
        return []
    if isinstance(specs, (str, nn.Module)) or not isinstance(specs, Iterable):
        raise TypeError(f"{argument} = {specs!r} is a {type(specs).__name__}; allowed is a list of names and modules")
    found: dict[nn.Module, None] = {}
    for index, spec in enumerate(specs):
        if not isinstance(spec, (str, nn.Module)):
            raise TypeError(
                f"{argument}[{index}] = {spec!r} is a {type(spec).__name__}; allowed are names, patterns and modules"
            )
        hits = list(_hits(model, spec))
        if not hits:
            what = spec if isinstance(spec, str) else type(spec).__name__
            warnings.warn(f"{argument}: {what!r} matches no module of the model", stacklevel=3)
        found.update(dict.fromkeys(hits))
    return list(found)


def _hits(model: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
    for name, module in model.named_modules(remove_duplicate=False):
        if (module is spec) if isinstance(spec, nn.Module) else fnmatchcase(name, spec):
            yield module


def _cast_together(tensors: Sequence[tuple[Tensor, torch.dtype]]) -> None:
    """Casts tensors that share memory, with their gradients: all or, where an interrupt comes between, none."""
    done: dict[Any, Tensor] = {}
    changes = [
        (tensor, _cast_once(tensor.data, target, done), None if tensor.grad is None else tensor.grad.to(target))
        for tensor, target in tensors
    ]
    before = [(tensor, tensor.data, tensor.grad) for tensor, _ in tensors]
    try:
        for change in changes:
            _replace(*change)
    except BaseException:
        for change in before:
            _replace(*change)
        raise


def _replace(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    tensor.data = data
    tensor.grad = grad


def _cast_once(data: Tensor, dtype: torch.dtype, done: dict[Any, Tensor]) -> Tensor:
    if data.device.type == "meta" or data.numel() == 0:
        return data.to(dtype)
    key = (data.device, data.data_ptr(), data.dtype, data.shape, data.stride(), dtype)
    if key not in done:
        done[key] = data.to(dtype)
    return done[key]


def _to(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value)


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _to(args, torch.float32), _to(kwargs, torch.float32)


class _CastOutput:
    """A forward hook that can be pickled and copied with its module."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return _to(output, self.dtype)
