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

from . import _model_loads, _validate
from ._buffers import needs_its_precision
from ._parameters import is_sharded, plain
from .weights import set_weights

LayerSpec = str | nn.Module
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cast_model(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    selective: bool = True,
    full_precision_layers: Sequence[LayerSpec] | None = None,
    full_precision_recast_layers: Sequence[LayerSpec] | None = None,
    *,
    optimizer: Any = None,
    cast_buffers: Sequence[str] | None = None,
) -> nn.Module:
    """Casts the floating-point parameters and buffers of ``model`` in place.

    Args:
        model: the model.
        dtype: torch.bfloat16 or torch.float16 (torch.float32 casts back).
        selective: leave normalization layers with running statistics (batch and instance norm) as they are.
        full_precision_layers: layers to keep in fp32, with everything inside them; their floating-point inputs are cast
            to fp32 and their outputs stay fp32. For the last layers of a model.
        full_precision_recast_layers: the same, but outputs are cast back to ``dtype``. For layers in the middle.
        optimizer: the optimizer that holds the parameters, or a list of several: what a float32 parameter loses in 16
            bits goes into its correction, so that training starts from the float32 weights. None: every optimizer that
            is alive and holds some of them. An optimizer made after the cast starts from the rounded weights.
        cast_buffers: patterns for full names of buffers to cast though the rule below would leave them alone.

    A layer is a module of the model or a pattern (``fnmatch``) for its full dotted name: ``"head"`` is ``model.head``
    alone, ``"*.head"`` a head inside any other module. A pattern may also name parameters and buffers, which are kept
    in fp32 then, without casts of what goes in and out. Parameters that several modules share stay shared; where one of
    those modules is kept in fp32, so is the parameter.

    Buffers that hold positions, frequencies or schedules stay as they are: 16 bits would spoil them (a rotary
    embedding's ``inv_freq`` is 0.7 radians off at position 4,096 in bfloat16). They are told by the last part of their
    name (``EXACT_NAMES`` of _buffers.py: ``inv_freq``, ``position_bias``, ``alphas_cumprod``, ...) or by their values:
    sequences of 8 numbers or more that rise or fall all the way, whole numbers of which ``dtype`` lacks some, and
    numbers that would become infinite or 0. Where a model multiplies such a buffer with activations without casting it,
    name it in ``cast_buffers``.

    A model may be cast before fully_shard (FSDP2) or tensor parallelism spreads it, or after; by FSDP2 before its first
    forward pass, at which that settles what it gathers.

    Each tensor is cast with its gradient, and with all others that are the same view of the same memory, or not at all
    where an interrupt comes between.

    Returns:
        ``model``.

    Raises:
        RuntimeError: FSDP2 has run a forward pass.
        ValueError: ``dtype`` is not allowed, or ``optimizer`` holds no parameter of the model.
        TypeError: ``optimizer`` is not of this package, layers are not in a list, or another argument is of a wrong
            type. Nothing has changed where one of these is raised.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")
    _validate.check_bool("selective", selective)
    if dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r} is not allowed; allowed are {', '.join(map(str, _DTYPES))}")
    _check_not_gathered_yet(model)
    owners = _owners(model, optimizer)
    kept, kept_tensors = _matching(model, full_precision_layers, "full_precision_layers")
    recast, recast_tensors = _matching(model, full_precision_recast_layers, "full_precision_recast_layers")

    targets: dict[int, torch.dtype | None] = _exact_buffers(model, dtype, cast_buffers)
    targets.update((id(tensor), torch.float32) for tensor in (*kept_tensors, *recast_tensors))
    for module in (*kept, *recast):
        targets.update((id(tensor), torch.float32) for tensor in (*module.parameters(), *module.buffers()))
    if selective:
        for module in model.modules():
            if isinstance(module, _NormBase):
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                targets.update((id(tensor), None) for tensor in own if id(tensor) not in targets)

    # Tensors that are one view of one storage stay so: they are cast together.
    together: dict[Any, list[Tensor]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        target = targets.get(id(tensor), dtype)
        if target is not None and tensor.is_floating_point() and tensor.dtype != target:
            together.setdefault((target, *_view_of(tensor)), []).append(tensor)
    for (target, *_), tensors in together.items():
        exacts = [plain(tensor).detach() for tensor in tensors]
        if is_sharded(tensors[0]):
            _cast_sharded(tensors[0], target)
        else:
            _cast_plain(tensors, target)
        for tensor, exact in zip(tensors, exacts, strict=True):
            if exact.dtype == torch.float32 and tensor.requires_grad and exact.device.type != "meta":
                for owner in owners.get(id(tensor), ()):
                    set_weights(tensor, exact, owner)

    for module in dict.fromkeys((*kept, *recast)):
        if _cast_inputs not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        is_cast_back = any(isinstance(hook, _CastOutput) for hook in module._forward_hooks.values())
        if module in recast and not is_cast_back:
            module.register_forward_hook(_CastOutput(dtype))
    return model


def _owners(model: nn.Module, given: Any) -> dict[int, list[Any]]:
    """By id of a parameter, the optimizers whose corrections take what a cast cuts off."""
    chosen = None
    if given is not None:
        chosen = list(given) if isinstance(given, (list, tuple)) else [given]
        for one in chosen:
            if not hasattr(one, "_state_with_correction"):
                raise TypeError(f"optimizer is a {type(one).__name__}; allowed are flashoptim's optimizers and None")
    found: dict[int, list[Any]] = {}
    holding = set()
    for owner, param in _model_loads.owners(model):
        if chosen is None or any(owner is one for one in chosen):
            found.setdefault(id(param), []).append(owner)
            holding.add(id(owner))
    for one in chosen or ():
        if id(one) not in holding:
            raise ValueError(
                f"optimizer ({type(one).__name__}) holds no parameter of the model; allowed is one that does"
            )
    return found


def _exact_buffers(
    model: nn.Module, dtype: torch.dtype, cast_buffers: Sequence[str] | None
) -> dict[int, torch.dtype | None]:
    """By id, buffers to leave as they are."""
    if isinstance(cast_buffers, str) or not isinstance(cast_buffers, (Iterable, type(None))):
        raise TypeError(
            f"cast_buffers = {cast_buffers!r} is a {type(cast_buffers).__name__}; allowed is a list of patterns"
        )
    named = dict(model.named_buffers(remove_duplicate=False))
    cast = set()
    for index, pattern in enumerate(cast_buffers or ()):
        if not isinstance(pattern, str):
            raise TypeError(f"cast_buffers[{index}] = {pattern!r} is a {type(pattern).__name__}; allowed are patterns")
        hits = [name for name in named if fnmatchcase(name, pattern)]
        if not hits:
            warnings.warn(f"cast_buffers: {pattern!r} matches no buffer of the model", stacklevel=3)
        cast.update(hits)
    return {
        id(buffer): None
        for name, buffer in named.items()
        if name not in cast and needs_its_precision(name, buffer, dtype)
    }


def _matching(
    model: nn.Module, specs: Sequence[LayerSpec] | None, argument: str
) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules of the model that are named, and tensors."""
    if specs is None:
        return [], []
    if isinstance(specs, (str, nn.Module)) or not isinstance(specs, Iterable):
        raise TypeError(f"{argument} = {specs!r} is a {type(specs).__name__}; allowed is a list of names and modules")
    found: dict[nn.Module, None] = {}
    tensors: list[Tensor] = []
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for index, spec in enumerate(specs):
        if not isinstance(spec, (str, nn.Module)):
            raise TypeError(
                f"{argument}[{index}] = {spec!r} is a {type(spec).__name__}; allowed are names, patterns and modules"
            )
        hits = list(_hits(model, spec))
        own = [tensor for name, tensor in named if isinstance(spec, str) and fnmatchcase(name, spec)]
        if not hits and not own:
            what = spec if isinstance(spec, str) else type(spec).__name__
            warnings.warn(f"{argument}: {what!r} matches no module, parameter or buffer of the model", stacklevel=3)
        found.update(dict.fromkeys(hits))
        tensors += own
    return list(found), tensors


def _hits(model: nn.Module, spec: LayerSpec) -> Iterable[nn.Module]:
    for name, module in model.named_modules(remove_duplicate=False):
        if (module is spec) if isinstance(spec, nn.Module) else fnmatchcase(name, spec):
            yield module


def _view_of(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors that are one view of one storage."""
    if is_sharded(tensor) or tensor.device.type == "meta" or tensor.numel() == 0:
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _cast_plain(tensors: list[Tensor], dtype: torch.dtype) -> None:
    """Tensors of one memory, all with their gradients or, where an interrupt comes between, none."""
    before = [(tensor.data, tensor.grad) for tensor in tensors]
    grads = [None if tensor.grad is None else tensor.grad.to(dtype) for tensor in tensors]
    data = tensors[0].data.to(dtype)
    try:
        for tensor, grad in zip(tensors, grads, strict=True):
            _replace(tensor, data, grad)
    except BaseException:
        for tensor, (old_data, old_grad) in zip(tensors, before, strict=True):
            _replace(tensor, old_data, old_grad)
        raise


def _replace(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    tensor.grad = None
    tensor.data = data
    tensor.grad = grad


def _check_not_gathered_yet(model: nn.Module) -> None:
    for name, module in model.named_modules():
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        if getattr(state, "_is_root", None) is not None:
            raise RuntimeError(
                f"module {name!r} is sharded by fully_shard and has run a forward pass, which settles the dtype that "
                "it gathers; allowed is cast_model() before the first one, or before fully_shard"
            )


def _cast_sharded(tensor: Tensor, dtype: torch.dtype) -> None:
    """A DTensor in another dtype, the same object: its ``data`` cannot be set, since its memory is another tensor's."""
    cast: Tensor = tensor.detach().to(dtype)
    if isinstance(tensor, nn.Parameter):
        cast = nn.Parameter(cast, requires_grad=tensor.requires_grad)
    for name, value in vars(tensor).items():
        if name not in vars(cast):
            setattr(cast, name, value)
    if tensor.grad is not None:
        cast.grad = tensor.grad.to(dtype)
        tensor.grad = None
    torch.utils.swap_tensors(tensor, cast)  # type: ignore[no-untyped-call]


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
