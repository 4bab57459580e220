"""A state as ``state_dict()`` shows it, and back: bytes that any copy, file or collective carries
(docs/state_format.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _ops, _parameters, _states
from ._groups import Stored
from ._ops import MasterWeights, StateCodec
from ._parameters import Local
from ._states import CODES, CORRECTION, SCALE, STEP, STORAGE_ORDER, Format

_SCALE_DTYPES = {"default": torch.int16, "paper": torch.float16}
_TWO_BYTES = (torch.int16, torch.uint16, torch.float16)


# To a state dict


def packed(state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``state_dict()`` shows of one state: no array is copied."""
    is_array = (key == CORRECTION or key.endswith(CODES) or key in _states.ALL_SLOTS for key in state)
    array = next(
        (value for value, is_one in zip(state.values(), is_array) if is_one and isinstance(value, Tensor)), None
    )
    order = None if array is None else _states.order_of(array)
    result: dict[str, Any] = {}
    for key, value in state.items():
        if key == STEP:
            value = _count(value)
        elif key == CORRECTION or key.endswith(SCALE):
            value = _as_bytes(value, order if key == CORRECTION else None)
        elif order is not None and (key.endswith(CODES) or key in _states.ALL_SLOTS):
            value = value.permute(order).contiguous()
        elif key == STORAGE_ORDER:
            continue
        result[key] = value
    if order is not None and array is not None:
        result[STORAGE_ORDER] = torch.tensor(order, dtype=torch.int64, device=array.device)
    return result


def _count(step: Any) -> Any:
    if isinstance(step, Tensor):
        return step.detach().to("cpu", torch.int64, copy=True).reshape(())
    return torch.tensor(step, dtype=torch.int64)


def _as_bytes(value: Any, order: list[int] | None) -> Any:
    """Two-byte elements as uint8 [..., 2]: neither gloo nor NCCL can move them otherwise."""
    if not isinstance(value, Tensor):
        return value
    if order is not None:
        value = value.permute(order).contiguous()
    if value.dtype not in _TWO_BYTES:
        return value
    if not _parameters.is_sharded(value):
        return value.contiguous().unsqueeze(-1).view(torch.uint8)
    spec = value._spec
    local = Local(_parameters.plain(value), tuple(value.shape), spec=spec)
    return _parameters.wrap(local, local.tensor.unsqueeze(-1).view(torch.uint8), (*value.shape, 2), "a state")


def expanded(kind: str, state: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """The same with fp32 values, as plain PyTorch optimizers keep them, in the order of dimensions."""
    local = _parameters.local(param)
    slots = _states.slots_in(kind, state)
    values = dict(zip(slots, _states.decode(kind, state, slots, local)))
    result: dict[str, Any] = {}
    for key, value in state.items():
        slot = key.removesuffix(CODES)
        if slot in values:
            result[slot] = _parameters.wrap(local, values[slot], local.whole, slot)
        elif key == CORRECTION:
            result[key] = _as_bytes(value if _parameters.is_sharded(value) else value.contiguous(), None)
        elif key == STEP:
            result[key] = _count(value)
        elif not key.endswith(SCALE) and key != STORAGE_ORDER:
            result[key] = value
    return result


# From a state dict


def unpacked(
    kind: str, saved: Mapping[str, Any], param: Local, form: Format, stored: Stored, name: str
) -> dict[str, Any]:
    """A saved state as ``optimizer.state`` holds it: arrays of the local shape, with their own dtypes and order.

    Nothing of ``saved`` changes; arrays may be shared with it.

    Raises:
        ValueError: something does not fit.
    """
    state = {key: value for key, value in saved.items() if value is not None}
    slots = _ops.state_names(kind, True)
    arrays = [key for slot in slots for key in (slot + CODES, slot, slot + SCALE) if isinstance(state.get(key), Tensor)]
    if isinstance(state.get(CORRECTION), Tensor):
        arrays.append(CORRECTION)
    are_sharded = [_parameters.is_sharded(state[key]) for key in arrays]
    if param.spec is not None and all(are_sharded):
        for key in arrays:
            state[key] = _local_like(state[key], param)
        is_whole = False
    else:
        for key, is_sharded in zip(arrays, are_sharded):
            if is_sharded:
                state[key] = _gathered(state[key])
        is_whole = True
    codec = _codec_of(kind, state, stored)
    for key in arrays:
        if key.endswith(SCALE):
            state[key] = _scale_of(state[key], codec, name, key)
        elif key.endswith(CODES) and stored.codec is not None:
            state[key] = _codes_of(state[key], kind, slots.index(key.removesuffix(CODES)), stored.codec)
        elif key == CORRECTION and state[key].dtype == torch.uint8 and state[key].dim() == len(param.whole) + 1:
            state[key] = _from_bytes(state[key], torch.int16, name, key)
    if STORAGE_ORDER in state:
        order = _order(state.pop(STORAGE_ORDER), len(param.whole), name)
        for key in arrays:
            if not key.endswith(SCALE):
                if state[key].dim() != len(order):
                    raise ValueError(
                        f"state {key!r} of {name} has shape {tuple(state[key].shape)}, and storage_order {order}; "
                        f"allowed is "
                        "one entry a dimension"
                    )
                if _states.order_of(state[key]) is None:  # as state_dict() shows it, not as optimizer.state has it
                    state[key] = state[key].permute([order.index(d) for d in range(len(order))])
    if is_whole and param.offsets is not None and arrays:
        return _cut(kind, state, param, form, name)
    return state


def _order(value: Any, dimensions: int, name: str) -> list[int]:
    order = value.tolist() if isinstance(value, Tensor) else value
    if not isinstance(order, list) or sorted(order) != list(range(dimensions)):
        raise ValueError(
            f"state 'storage_order' of {name} is {order!r}; allowed is every dimension from 0 to {dimensions - 1}, once"
        )
    return order


def _local_like(value: Tensor, param: Local) -> Tensor:
    spec = value._spec  # type: ignore[attr-defined]
    if spec.mesh == param.spec.mesh and spec.placements == param.spec.placements:
        return _parameters.plain(value)
    moved = _as_bytes(value, None).redistribute(param.spec.mesh, param.spec.placements)
    local = _parameters.plain(moved)
    return local if value.dtype not in _TWO_BYTES else local.contiguous().view(value.dtype).squeeze(-1)


def _gathered(value: Tensor) -> Tensor:
    whole: Tensor = _as_bytes(value, None).full_tensor()
    return whole if value.dtype not in _TWO_BYTES else whole.contiguous().view(value.dtype).squeeze(-1)


def _from_bytes(value: Tensor, dtype: torch.dtype, name: str, key: str) -> Tensor:
    if value.shape[-1:] != (2,):
        raise ValueError(
            f"state {key!r} of {name} has shape {tuple(value.shape)}; allowed is two bytes an element, [..., 2]"
        )
    return value.contiguous().view(dtype).squeeze(-1)


def _codec_of(kind: str, state: Mapping[str, Any], stored: Stored) -> str | None:
    """What is said of the codec, or what the codes of a signed slot show: int8 is the paper's alone."""
    if stored.codec is not None:
        return stored.codec
    for number, slot in enumerate(_ops.state_names(kind, True)):
        codes = state.get(slot + CODES)
        if isinstance(codes, Tensor) and codes.dtype in (torch.int8, torch.uint8) and _is_signed(kind, number):
            return "paper" if codes.dtype == torch.int8 else "default"
    return None


def _scale_of(value: Tensor, codec: str | None, name: str, key: str) -> Tensor:
    if value.dtype != torch.uint8:
        return value
    if codec not in _SCALE_DTYPES:
        raise ValueError(
            f"state {key!r} of {name} is bytes without codes of a known codec; allowed are both, as they were saved"
        )
    return _from_bytes(value, _SCALE_DTYPES[codec], name, key)


def _codes_of(value: Tensor, kind: str, slot: int, codec: str) -> Tensor:
    """Codes whose bytes have gone through a tensor of the other 8-bit dtype."""
    wanted = torch.int8 if codec == "paper" and _is_signed(kind, slot) else torch.uint8
    return value.view(wanted) if value.dtype in (torch.int8, torch.uint8) else value


def _is_signed(kind: str, slot: int) -> bool:
    return _ops.state_names(kind, True)[slot] != "exp_avg_sq"


def _cut(kind: str, state: dict[str, Any], param: Local, form: Format, name: str) -> dict[str, Any]:
    """This rank's part of a whole state, in the format of ``form`` but for the correction, which stays as it is."""
    slots = tuple(slot for slot in _states.slots_of(kind, form) if _states.key_of(state, slot) is not None)
    result = {key: value for key, value in state.items() if key == STEP or key not in _states.known_keys(kind)}
    assert param.offsets is not None
    box = tuple(slice(o, o + n) for o, n in zip(param.offsets, param.tensor.shape))
    if len(slots) == len(_states.slots_of(kind, form)) and slots:
        device = next(state[key].device for slot in slots if (key := _states.key_of(state, slot)) is not None)
        whole = Local(torch.empty(param.whole, dtype=param.tensor.dtype, device=device), param.whole)
        plain_form = Format(MasterWeights.NONE, form.codec, form.has_momentum)
        held = {key: value for key, value in state.items() if key != CORRECTION}
        made = _states.converted(kind, held, whole, plain_form, name).state
        scale_box = _scale_box(param, name) if form.codec != StateCodec.FLOAT32 else ()
        for key, value in made.items():
            if isinstance(value, Tensor) and key in _states.known_keys(kind) and key != STORAGE_ORDER:
                result[key] = value[scale_box if key.endswith(SCALE) else box].contiguous()
    else:  # another optimizer's, or incomplete: the conversion says so
        result.update(state)
    correction = state.get(CORRECTION)
    if isinstance(correction, Tensor):
        if tuple(correction.shape) != param.whole:
            raise ValueError(
                f"state 'correction' of {name} has shape {tuple(correction.shape)}; allowed is the parameter's, "
                f"{param.whole}"
            )
        result[CORRECTION] = correction[box].contiguous()
    return result


def _scale_box(param: Local, name: str) -> tuple[slice, ...]:
    _parameters.check_cut(param, name)
    assert param.offsets is not None
    leading, sizes = param.leading, tuple(param.tensor.shape)
    inner = math.prod(param.whole[leading + 1 :])
    box = [slice(o, o + n) for o, n in zip(param.offsets[:leading], sizes)]
    first = -(-param.offsets[leading] * inner // _parameters.GROUP)
    box.append(slice(first, first - (-math.prod(sizes[leading:]) // _parameters.GROUP)))
    return tuple(box)
