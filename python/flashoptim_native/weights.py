"""fp32 weights of a model in and out: parameter plus correction, and the functions they are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops, _parameters, _validate
from ._ops import CORRECTION_DTYPES, CorrectionFate, MasterWeights
from ._states import CORRECTION, warn_of_correction

_NARROW_DTYPES = (torch.bfloat16, torch.float16)
_MASTER_OF_DTYPE = {torch.int8: MasterWeights.CORRECTION8, torch.int16: MasterWeights.CORRECTION16}
_MASTER_OF_BYTES = {3: MasterWeights.CORRECTION8, 4: MasterWeights.CORRECTION16}


@torch.no_grad()
def reconstruct_fp32_param(param: Tensor, error_bits: Tensor) -> Tensor:
    """The fp32 weights that a 16-bit parameter and its correction stand for.

    Args:
        param: bfloat16 or float16 tensor.
        error_bits: int8 or int16 tensor of the same shape: ``optimizer.state[p]["correction"]``.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a dtype, shape or device is not allowed, or a tensor has no memory of its own.
    """
    _check_tensor("param", param)
    _check_tensor("error_bits", error_bits)
    _check_narrow("param", param)
    if error_bits.dtype not in _MASTER_OF_DTYPE:
        raise ValueError(f"error_bits has dtype {error_bits.dtype}; allowed are torch.int8 and torch.int16")
    _check_same_shape("error_bits", error_bits, "param's", param)
    weights: Tensor = _ops.merge_weights(
        param.detach().contiguous(), error_bits.contiguous(), int(_MASTER_OF_DTYPE[error_bits.dtype])
    )
    return weights


@torch.no_grad()
def compute_ecc_bits(fp32_param: Tensor, narrow_param: Tensor, master_bytewidth: int = 4) -> Tensor:
    """The correction that makes a 16-bit parameter stand for fp32 weights, as far as it can.

    Where ``narrow_param`` is not the weight rounded to nearest, the correction is the largest towards the weight.

    Args:
        fp32_param: float32 tensor, the weights.
        narrow_param: bfloat16 or float16 tensor of the same shape.
        master_bytewidth: 3 for an int8 correction ("24 bit"), 4 for int16 ("32 bit").

    Raises:
        TypeError: an argument is no tensor, or ``master_bytewidth`` no integer.
        ValueError: a dtype, shape, device or width is not allowed, or a tensor has no memory of its own.
    """
    _check_tensor("fp32_param", fp32_param)
    _check_tensor("narrow_param", narrow_param)
    _validate.check_integer("master_bytewidth", master_bytewidth, 3, 4)
    if fp32_param.dtype != torch.float32:
        raise ValueError(f"fp32_param has dtype {fp32_param.dtype}; allowed is torch.float32")
    _check_narrow("narrow_param", narrow_param)
    _check_same_shape("fp32_param", fp32_param, "narrow_param's", narrow_param)
    master = _MASTER_OF_BYTES[master_bytewidth]
    weights = fp32_param.detach().contiguous()
    narrow = narrow_param.detach().contiguous()
    nearest = torch.empty_like(narrow)
    correction = torch.empty(narrow.shape, dtype=CORRECTION_DTYPES[master], device=narrow.device)
    _ops.split_weights_(weights, nearest, correction, int(master))
    differs = nearest != narrow
    if bool(differs.any()):
        towards = torch.sign(weights - narrow.float()).nan_to_num_(0.0) * torch.iinfo(correction.dtype).max
        correction = torch.where(differs, towards.to(correction.dtype), correction)
    return correction


@torch.no_grad()
def get_fp32_model_state_dict(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Tensor]:
    """``model.state_dict()`` with every floating-point entry in fp32, corrections of the optimizers' states applied.

    Entries that are not floating-point stay as they are. The result shares no memory with the model.

    Raises:
        TypeError: ``model`` is no module, or an optimizer is none.
        ValueError: a correction does not go with its parameter.
    """
    _check_model(model)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are torch.optim.Optimizers")
    model = _unwrapped(model)
    states = _states_by_parameter(optimizers)
    dtypes = _dtypes_by_parameter(optimizers)
    result = {
        key: value.detach().to(torch.float32, copy=True) if value.is_floating_point() else value.detach().clone()
        for key, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    for name, param in model.named_parameters(remove_duplicate=False):
        state = states.get(id(param))
        if name in result and state is not None and CORRECTION in state:
            result[name] = _with_correction(name, param, state[CORRECTION], dtypes.get(id(param), param.dtype))
    return result


@torch.no_grad()
def set_fp32_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], *optimizers: torch.optim.Optimizer, strict: bool = False
) -> None:
    """Loads fp32 weights into a model and into the corrections of the optimizers that step it.

    The inverse of :func:`get_fp32_model_state_dict`: parameters get the nearest values of their dtype, corrections the
    rest. An optimizer that has taken no step gets its states made for it. Everything is checked, for all optimizers,
    before anything changes. An interrupt leaves every entry loaded or as it was; calling it again goes on.

    Args:
        strict: also raise where ``state_dict`` lacks an entry of the model or holds one that the model lacks.

    Raises:
        TypeError: an argument or an entry is of a wrong type; nothing has changed then.
        ValueError: an entry does not fit (shape, dtype, no memory), or is missing or left over with ``strict=True``, or
            a state of an optimizer is in no known format; nothing has changed then.
        RuntimeError: a parameter cannot be stepped by its optimizer; nothing has changed then.
    """
    correcting: list[Any] = list(optimizers)
    _check_optimizers(correcting)
    _validate.check_bool("strict", strict)
    _check_model(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; allowed is a dict of names and tensors")
    model = _unwrapped(model)
    targets = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if strict and targets.keys() != state_dict.keys():
        missing = sorted(targets.keys() - state_dict.keys())
        unexpected = sorted(map(str, state_dict.keys() - targets.keys()))
        raise ValueError(f"state_dict lacks {missing} and holds {unexpected}, which the model lacks; allowed with "
                         "strict=True are the model's own entries")  # fmt: skip
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = {key: target for key, target in targets.items() if key in state_dict}
    for key, target in targets.items():
        _check_entry(key, state_dict[key], target, key in parameters)
    owners = {id(p): optimizer for optimizer in correcting for group in optimizer.param_groups for p in group["params"]}
    owned = {id(target): (owners[id(target)], target) for target in targets.values() if id(target) in owners}
    states = _states_for_new_weights(list(owned.values()))
    for key, target in targets.items():
        state = states.get(id(target))
        _set_weights(target.detach(), state_dict[key].detach(), None if state is None else state[CORRECTION])
    for optimizer in correcting:
        optimizer.recompute_param_stats()


def _check_optimizers(optimizers: Sequence[Any]) -> None:
    for optimizer in optimizers:
        if not hasattr(optimizer, "_state_with_correction"):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")


def _check_entry(key: str, value: Any, target: Tensor, is_parameter: bool) -> None:
    name = f"state_dict[{key!r}]"
    _check_tensor(name, value)
    _check_same_shape(name, value, "the model's", target)
    if is_parameter and value.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {value.dtype}; allowed for a parameter is torch.float32")
    if value.is_complex() and not target.is_complex():
        raise ValueError(f"{name} has dtype {value.dtype}; allowed is a real one, as the model's {target.dtype}")
    if target.device.type == "meta":
        raise ValueError(f"the model's {key!r} is on device meta, and has no values; allowed is a device with memory")
    if _parameters.is_sharded(value) and not _parameters.is_sharded(target):
        raise ValueError(f"{name} is a DTensor; allowed for a plain tensor of the model is a plain tensor")


def _states_for_new_weights(owned: Sequence[tuple[Any, Tensor]]) -> dict[int, dict[str, Any] | None]:
    """By id of a parameter, its state, ready to take a new correction; as they were where one cannot be made so."""
    before = []
    states: dict[int, dict[str, Any] | None] = {}
    try:
        for optimizer, param in owned:
            store, held = optimizer._store, optimizer.state.get(param)
            dtype = store.dtype_of(param)
            values = None if dtype == param.dtype else param.detach().clone()
            before.append((optimizer, param, held, dict(held) if isinstance(held, dict) else None, dtype, values))
            states[id(param)] = optimizer._state_with_correction(param)
    except BaseException:
        for optimizer, param, held, entries, dtype, values in reversed(before):
            if held is None:
                optimizer.state.pop(param, None)
            elif entries is not None:
                held.clear()
                held.update(entries)
                optimizer.state[param] = held
            if values is not None:
                param.detach().copy_(values)
            optimizer._store.remember_dtype(param, dtype)
        raise
    return states


def _set_weights(target: Tensor, value: Tensor, correction: Tensor | None) -> None:
    """Both or, where an interrupt comes between, neither."""
    value = value.to(target.device)
    if correction is None:
        target.copy_(value)
        return
    weights = torch.empty_like(correction, dtype=torch.float32).copy_(value)
    narrow = torch.empty_like(correction, dtype=target.dtype)
    rest = torch.empty_like(correction)
    _ops.split_weights_(weights, narrow, rest, int(_MASTER_OF_DTYPE[correction.dtype]))
    before = target.clone(), correction.clone()
    try:
        target.copy_(narrow)
        correction.copy_(rest)
    except BaseException:
        target.copy_(before[0])
        correction.copy_(before[1])
        raise


def _states_by_parameter(optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[int, dict[str, Any]]:
    return {id(param): state for optimizer in optimizers for param, state in optimizer.state.items()}


def _dtypes_by_parameter(optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[int, torch.dtype]:
    """The dtypes that parameters had when their corrections were made, as far as optimizers know them."""
    found: dict[int, torch.dtype] = {}
    for optimizer in optimizers:
        if hasattr(optimizer, "_dtypes_of_corrections"):
            found.update(optimizer._dtypes_of_corrections())
    return found


def _with_correction(name: str, param: Tensor, correction: Tensor, belongs_to: torch.dtype) -> Tensor:
    """The fp32 weights of a parameter whose correction was made for a dtype: those that the next step goes on from."""
    if belongs_to == param.dtype:
        return reconstruct_fp32_param(param, correction)
    before = param.detach().to(belongs_to)
    if param.dtype == torch.bfloat16 or not torch.equal(before.to(param.dtype), param):
        warn_of_correction(CorrectionFate.LOST, f"parameter {name!r}", param.dtype, belongs_to)
        return param.detach().float()
    return reconstruct_fp32_param(before, correction)


def _unwrapped(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        wrapped: nn.Module = model.module
        return wrapped
    return model


def _check_narrow(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _NARROW_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are torch.bfloat16 and torch.float16")


def _check_tensor(name: str, value: Any) -> None:
    """Raises where something is no tensor with values in dense memory."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed is a torch.Tensor")
    if _parameters.is_sharded(value):
        return
    if value.layout != torch.strided or value.device.type == "meta" or not _parameters.is_plain(value):
        raise ValueError(
            f"{name} is a {type(value).__name__} of layout {value.layout} on {value.device}; allowed is a plain, dense "
            "tensor on a device with memory"
        )
    if not _parameters.has_memory(value):
        raise ValueError(f"{name} of shape {tuple(value.shape)} needs more memory than its storage has; allowed is a "
                         "tensor whose storage holds all of it")  # fmt: skip


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is {other_name} shape, {tuple(other.shape)}")
