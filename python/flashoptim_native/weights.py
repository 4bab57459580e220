"""fp32 weights of a model in and out: parameter plus correction, and the functions they are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _ops
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
    """
    _check_narrow("param", param)
    if error_bits.dtype not in _MASTER_OF_DTYPE:
        raise ValueError(f"error_bits has dtype {error_bits.dtype}; allowed are torch.int8 and torch.int16")
    _check_same_shape("error_bits", error_bits, "param", param)
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
    """
    if fp32_param.dtype != torch.float32:
        raise ValueError(f"fp32_param has dtype {fp32_param.dtype}; allowed is torch.float32")
    _check_narrow("narrow_param", narrow_param)
    if master_bytewidth not in _MASTER_OF_BYTES:
        raise ValueError(
            f"master_bytewidth = {master_bytewidth!r} is not allowed; allowed are 3 (24 bit) and 4 (32 bit)"
        )
    _check_same_shape("fp32_param", fp32_param, "narrow_param", narrow_param)
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
    """
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
    rest. An optimizer that has taken no step gets its states made for it. Nothing changes if an entry does not fit.

    Args:
        strict: also raise where ``state_dict`` lacks an entry of the model or holds one that the model lacks.
    """
    correcting: list[Any] = list(optimizers)
    for optimizer in correcting:
        if not hasattr(optimizer, "_state_with_correction"):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")
    model = _unwrapped(model)
    targets = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    if strict and targets.keys() != state_dict.keys():
        missing, unexpected = sorted(targets.keys() - state_dict.keys()), sorted(state_dict.keys() - targets.keys())
        raise KeyError(f"state_dict lacks {missing} and holds {unexpected}, which the model lacks")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, target in targets.items():
        if key not in state_dict:
            continue
        value = state_dict[key]
        _check_same_shape(f"state_dict[{key!r}]", value, "the model's", target)
        if key in parameters and value.dtype != torch.float32:
            raise ValueError(f"state_dict[{key!r}] has dtype {value.dtype}; allowed for a parameter is torch.float32")

    owners = {id(p): optimizer for optimizer in correcting for group in optimizer.param_groups for p in group["params"]}
    for key, target in targets.items():
        if key not in state_dict:
            continue
        value = state_dict[key].detach().to(target.device)
        optimizer = owners.get(id(target))
        set_weights(target, value, optimizer)
    for optimizer in correcting:
        optimizer.recompute_param_stats()


@torch.no_grad()
def set_weights(target: Tensor, weights: Tensor, optimizer: Any) -> None:
    """New values of a parameter or buffer, their rest into the correction that ``optimizer`` keeps (None: nowhere)."""
    state = None if optimizer is None else optimizer._state_with_correction(target)
    if state is None:
        target.detach().copy_(weights)
        return
    correction = state[CORRECTION]
    exact = torch.empty_like(correction, dtype=torch.float32).copy_(weights)
    narrow = torch.empty_like(correction, dtype=target.dtype)
    _ops.split_weights_(exact, narrow, correction, int(_MASTER_OF_DTYPE[correction.dtype]))
    target.detach().copy_(narrow)


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


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is {other_name} shape, {tuple(other.shape)}")
