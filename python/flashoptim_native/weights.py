"""fp32 weights of a model in and out: parameter plus correction, and the functions they are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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
    if _parameters.is_sharded(param):
        weights = reconstruct_fp32_param(_parameters.plain(param), _parameters.plain(error_bits))
        return _parameters.wrap(_parameters.local(param), weights, tuple(param.shape), "param")
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
    _check_model(model)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are torch.optim.Optimizers")
    _validate.check_bool("full_state_dict", full_state_dict)
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
            # (One that is offloaded is on the host.)
            correction = _parameters.beside(state[CORRECTION], param)
            value = _with_correction(key, param, correction, dtypes.get(id(param), param.dtype))
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
        TypeError: an argument or an entry is of a wrong type, an optimizer is none of this package, or the model is
            wrapped in FullyShardedDataParallel (FSDP1).
        ValueError: an entry's shape is not the model's, a parameter's is not float32 or has no memory; ``strict=True``,
            and there are such keys; two entries have one name; a state of an optimizer is in no known format.
        RuntimeError: a parameter cannot be stepped by its optimizer. After each of these errors nothing has changed, in
            any of the optimizers. An interrupt leaves every entry loaded or as it was.
    """
    correcting: list[Any] = list(optimizers)
    _check_optimizers(correcting)
    _validate.check_bool("strict", strict)
    _validate.check_bool("broadcast_from_rank0", broadcast_from_rank0)
    _check_model(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; allowed is a dict of names and tensors")
    clean = _names_without_wrappers(model)
    held = model.state_dict(keep_vars=True).items()
    targets = {clean(key): value for key, value in held if isinstance(value, Tensor)}
    state_dict = _by_names_of(state_dict, targets)
    known = _described_by_rank_0(state_dict) if broadcast_from_rank0 else state_dict
    missing, unexpected = sorted(targets.keys() - known.keys()), sorted(known.keys() - targets.keys())
    if strict and (missing or unexpected):
        raise ValueError(
            f"state_dict lacks {missing} and holds {unexpected}, which the model lacks; allowed with strict=True are "
            "the model's own names"
        )
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
        _check_entry(key, known[key], target, key in parameters, broadcast_from_rank0)

    owners = {id(p): optimizer for optimizer in correcting for group in optimizer.param_groups for p in group["params"]}
    owned = {id(p): (owners[id(p)], p) for key, p in targets.items() if key in known and id(p) in owners}
    states = _states_for_new_weights(list(owned.values()))
    for key, target in targets.items():
        if key not in known:
            continue
        value = _from_rank_0(state_dict.get(key), known[key], target) if broadcast_from_rank0 else state_dict[key]
        value = _parameters.part_for(value.detach(), target)
        _set_local(target, value, states.get(id(target)))
    for optimizer in correcting:
        optimizer.recompute_param_stats()
    return IncompatibleKeys(missing, unexpected)


@torch.no_grad()
def set_weights(target: Tensor, weights: Tensor, optimizer: Any) -> None:
    """New values of a parameter or buffer, their rest into the correction that ``optimizer`` keeps (None: nowhere).

    Of a sharded parameter, ``weights`` are this process's part.
    """
    _set_local(target, weights, None if optimizer is None else optimizer._state_with_correction(target))


def _set_local(target: Tensor, weights: Tensor, state: Mapping[str, Any] | None) -> None:
    """Parameter and correction or, where an interrupt comes between, neither."""
    local = _parameters.plain(target).detach()
    if state is None:
        local.copy_(weights)
        return
    correction = _parameters.plain(state[CORRECTION])
    exact = torch.empty_like(correction, dtype=torch.float32).copy_(weights)
    narrow, rest = torch.empty_like(correction, dtype=target.dtype), torch.empty_like(correction)
    _ops.split_weights_(exact, narrow, rest, int(_MASTER_OF_DTYPE[correction.dtype]))
    before = local.clone(), correction.clone()
    try:
        local.copy_(narrow)
        correction.copy_(rest)
    except BaseException:
        local.copy_(before[0])
        correction.copy_(before[1])
        raise


def _check_optimizers(optimizers: Sequence[Any]) -> None:
    for optimizer in optimizers:
        if not hasattr(optimizer, "_state_with_correction"):
            raise TypeError(f"an optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")


def _check_entry(key: str, value: Any, target: Tensor, is_parameter: bool, is_described: bool) -> None:
    name = f"state_dict[{key!r}]"
    if isinstance(value, Tensor) and value.device.type == "meta" and is_described:
        pass  # rank 0's, of which the others know as much
    else:
        _check_tensor(name, value)
    _check_same_shape(name, value, "the model's", target)
    if is_parameter and value.dtype != torch.float32:
        raise ValueError(f"{name} has dtype {value.dtype}; allowed for a parameter is torch.float32")
    if value.is_complex() and not target.is_complex():
        raise ValueError(f"{name} has dtype {value.dtype}; allowed is a real one, as the model's {target.dtype}")
    if target.device.type == "meta":
        raise ValueError(f"the model's {key!r} is on device meta, and has no values; allowed is a device with memory")


def _states_for_new_weights(owned: Sequence[tuple[Any, Tensor]]) -> dict[int, dict[str, Any] | None]:
    """By id of a parameter, its state, ready to take a new correction; as they were where one cannot be made so."""
    before = []
    states: dict[int, dict[str, Any] | None] = {}
    try:
        for optimizer, param in owned:
            records, held = optimizer._store.records, optimizer.state.get(param)
            dtype = records.dtype_of(param)
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
            optimizer._store.records.remember_dtype(param, dtype)
        raise
    return states


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
            raise ValueError(f"state_dict holds {name!r} twice, once as {key!r}; allowed is one entry")
        result[name] = value
    return result


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
