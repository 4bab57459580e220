"""fp32 weights of a model in and out: parameter plus correction, and the functions they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, _parameters
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
    if _parameters.is_sharded(param):
        weights = reconstruct_fp32_param(_parameters.plain(param), _parameters.plain(error_bits))
        return _parameters.wrap(_parameters.local(param), weights, tuple(param.shape), "param")
    if error_bits.dtype not in _MASTER_OF_DTYPE:
        raise ValueError(f"error_bits has dtype {error_bits.dtype}; allowed are torch.int8 and torch.int16")
    _check_same_shape("error_bits", error_bits, "param", param)
    merged: Tensor = _ops.merge_weights(
        param.detach().contiguous(), error_bits.contiguous(), int(_MASTER_OF_DTYPE[error_bits.dtype])
    )
    return merged


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
def get_fp32_model_state_dict(
    model: nn.Module, *optimizers: torch.optim.Optimizer, full_state_dict: bool = False
) -> dict[str, Tensor]:
    """``model.state_dict()`` with every floating-point entry in fp32, corrections of the optimizers' states applied.

    Entries that are not floating-point stay as they are. The result shares no memory with the model. Parameters that
    are DTensors give DTensors, spread as they are, which torch.distributed.checkpoint saves. Names are those of the
    model without wrappers: torch.compile's ``_orig_mod.`` and DistributedDataParallel's ``module.`` are left out.

    Args:
        full_state_dict: gather the whole of every entry, on the host of rank 0; other ranks get an empty dict. All
            processes call this.

    Raises:
        TypeError: the model is wrapped in FullyShardedDataParallel (FSDP1).
    """
    clean = _names_without_wrappers(model)
    states = _states_by_parameter(optimizers)
    dtypes = _dtypes_by_parameter(optimizers)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue
        state = states.get(id(parameters[key])) if key in parameters else None
        if state is not None and CORRECTION in state:
            param = parameters[key]
            value = _with_correction(key, param, state[CORRECTION], dtypes.get(id(param), param.dtype))
        elif value.is_floating_point():
            value = value.detach().to(torch.float32, copy=True)
        else:
            value = value.detach().clone()
        if full_state_dict:
            value = _parameters.gathered(value)
            if not _is_rank_0():
                continue
            value = value.cpu()
        result[clean(key)] = value
    return result


@torch.no_grad()
def set_fp32_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *optimizers: torch.optim.Optimizer,
    strict: bool = False,
    broadcast_from_rank0: bool = False,
) -> IncompatibleKeys:
    """Loads fp32 weights into a model and into the corrections of the optimizers that step it.

    The inverse of :func:`get_fp32_model_state_dict`: parameters get the nearest values of their dtype, corrections the
    rest. An optimizer that has taken no step gets its states made for it. Nothing changes if an entry does not fit. Of
    sharded parameters, entries may be DTensors or whole tensors.

    Args:
        state_dict: fp32 tensors by name; wrappers' ``_orig_mod.`` and ``module.`` in names do not matter.
        strict: also raise where ``state_dict`` lacks an entry of the model or holds one that the model lacks.
        broadcast_from_rank0: rank 0 alone has ``state_dict``, of whole tensors, which it sends to the others.

    Returns:
        ``missing_keys`` of the model that ``state_dict`` lacks and ``unexpected_keys`` that the model lacks. The latter
        are also warned of: they were not loaded.

    Raises:
        KeyError: ``strict=True``, and there are such keys; or two entries have one name.
        TypeError: an optimizer is none of this package, or the model is wrapped in FullyShardedDataParallel (FSDP1).
        ValueError: an entry's shape is not the model's, or that of a parameter is not float32.
    """
    correcting: list[Any] = list(optimizers)
    for optimizer in correcting:
        if not hasattr(optimizer, "_state_with_correction"):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")
    clean = _names_without_wrappers(model)
    held = model.state_dict(keep_vars=True).items()
    targets = {clean(key): value for key, value in held if isinstance(value, Tensor)}
    state_dict = _by_names_of(state_dict, targets)
    known = _described_by_rank_0(state_dict) if broadcast_from_rank0 else state_dict
    missing, unexpected = sorted(targets.keys() - known.keys()), sorted(known.keys() - targets.keys())
    if strict and (missing or unexpected):
        raise KeyError(f"state_dict lacks {missing} and holds {unexpected}, which the model lacks")
    if unexpected:
        warnings.warn(
            f"{len(unexpected)} of {len(known)} entries of state_dict are not loaded, as the model lacks them: "
            f"{', '.join(unexpected[:4])}{', ...' if len(unexpected) > 4 else ''}",
            stacklevel=3,
        )
    parameters = {clean(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for key, target in targets.items():
        if key not in known:
            continue
        value = known[key]
        _check_same_shape(f"state_dict[{key!r}]", value, "the model's", target)
        if key in parameters and value.dtype != torch.float32:
            raise ValueError(f"state_dict[{key!r}] has dtype {value.dtype}; allowed for a parameter is torch.float32")

    owners = {id(p): optimizer for optimizer in correcting for group in optimizer.param_groups for p in group["params"]}
    for key, target in targets.items():
        if key not in known:
            continue
        value = _from_rank_0(state_dict.get(key), known[key], target) if broadcast_from_rank0 else state_dict[key]
        value = _parameters.part_for(value.detach(), target)
        optimizer = owners.get(id(target))
        set_weights(target, value, optimizer)
    for optimizer in correcting:
        optimizer.recompute_param_stats()
    return IncompatibleKeys(missing, unexpected)


@torch.no_grad()
def set_weights(target: Tensor, weights: Tensor, optimizer: Any) -> None:
    """New values of a parameter or buffer, their rest into the correction that ``optimizer`` keeps (None: nowhere).

    Of a sharded parameter, ``weights`` are this process's part.
    """
    local = _parameters.plain(target).detach()
    state = None if optimizer is None else optimizer._state_with_correction(target)
    if state is None:
        local.copy_(weights)
        return
    correction = _parameters.plain(state[CORRECTION])
    exact = torch.empty_like(correction, dtype=torch.float32).copy_(weights)
    narrow = torch.empty_like(correction, dtype=target.dtype)
    _ops.split_weights_(exact, narrow, correction, int(_MASTER_OF_DTYPE[correction.dtype]))
    local.copy_(narrow)


def _is_rank_0() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _described_by_rank_0(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of rank 0's dict without memory: what all processes check before any of them changes something."""
    import torch.distributed as dist

    said: list[Any] = [{key: (tuple(value.shape), value.dtype) for key, value in state_dict.items()}]
    dist.broadcast_object_list(said, src=0)
    return {key: torch.empty(shape, dtype=dtype, device="meta") for key, (shape, dtype) in said[0].items()}


def _from_rank_0(value: Tensor | None, described: Tensor, target: Tensor) -> Tensor:
    """One whole entry of rank 0's dict."""
    import torch.distributed as dist

    device = torch.device("cuda") if dist.get_backend() == "nccl" else _parameters.plain(target).device
    if not _is_rank_0() or value is None:
        held = torch.empty(described.shape, dtype=described.dtype, device=device)
    else:
        held = _parameters.plain(value).detach().to(device).contiguous()
    dist.broadcast(held, src=0)
    return held


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
    local, held = _parameters.plain(param).detach(), _parameters.plain(correction)
    before = local.to(belongs_to)
    if belongs_to == param.dtype:
        weights = reconstruct_fp32_param(local, held)
    elif param.dtype == torch.bfloat16 or not torch.equal(before.to(param.dtype), local):
        warn_of_correction(CorrectionFate.LOST, f"parameter {name!r}", param.dtype, belongs_to)
        weights = local.float()
    else:
        weights = reconstruct_fp32_param(before, held)
    return _parameters.wrap(_parameters.local(param), weights, tuple(param.shape), f"parameter {name!r}")


class IncompatibleKeys(NamedTuple):
    """What did not fit when weights were loaded, as ``torch.nn.Module.load_state_dict()`` gives it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _names_without_wrappers(model: nn.Module) -> Callable[[str], str]:
    """From a name in ``model.state_dict()`` to the one that it has without wrappers, wherever in the model they are.

    Raises:
        TypeError: the model is wrapped in FullyShardedDataParallel (FSDP1).
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise TypeError(
            "the model is wrapped in FullyShardedDataParallel (FSDP1), whose flat parameters are pieces of several of "
            "the model's; allowed is FSDP2 (torch.distributed.fsdp.fully_shard)"
        )
    wrapped = set()  # names of what wrappers hold
    for name, module in model.named_modules(remove_duplicate=False):
        inner = _wrapped_attribute(module)
        if inner is not None:
            wrapped.add(f"{name}.{inner}" if name else inner)

    def clean(key: str) -> str:
        if not wrapped:
            return key
        parts = key.split(".")
        kept = (part for position, part in enumerate(parts, 1) if ".".join(parts[:position]) not in wrapped)
        return ".".join(kept)

    return clean


def _wrapped_attribute(module: nn.Module) -> str | None:
    """Under which name a wrapper holds what it wraps; None: it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    # By name: importing torch._dynamo takes seconds.
    return "_orig_mod" if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod") else None


def _by_names_of(state_dict: Mapping[str, Tensor], targets: Mapping[str, Any]) -> dict[str, Tensor]:
    """Entries under the names of ``targets``, where they have them but for wrappers."""
    result: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        name = key
        if name not in targets:
            name = ".".join(part for part in key.split(".") if part != "_orig_mod")
            while name not in targets and name.startswith("module."):
                name = name.removeprefix("module.")
            if name not in targets:
                name = key
        if name in result:
            raise KeyError(f"state_dict holds {name!r} twice, once as {key!r}; allowed is one entry")
        result[name] = value
    return result


def _check_narrow(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _NARROW_DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}; allowed are torch.bfloat16 and torch.float16")


def _check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.shape != other.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed is {other_name} shape, {tuple(other.shape)}")
