"""What one parameter's state holds: formats, storage order, creation, decoding, encoding and conversion.

``state[p]`` is a dict of plain tensors and one integer::

    step                              int, the number of steps taken
    exp_avg, exp_avg_sq, momentum_buffer   int8 or uint8 codes (or fp32 values) of the parameter's shape
    <slot>_scale                      16-bit group headers [rows, groups_per_row]; absent where the slot is fp32
    correction                        int8 or int16 of the parameter's shape; absent where the weight has none

Codes, corrections and the parameter share one storage order. For a contiguous parameter that is the usual one; for a
dense permuted layout (channels_last, a transposed matrix) it is the order of the parameter's memory, and groups are cut
along it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._ops import CORRECTION_DTYPES, MasterWeights, StateCodec

SCALE = "_scale"
CORRECTION = "correction"
STEP = "step"
SCALE_DTYPES = {StateCodec.PAPER: torch.float16, StateCodec.DEFAULT: torch.int16}
SIGNED_SLOTS = ("exp_avg", "momentum_buffer")
ALL_SLOTS = {"exp_avg", "exp_avg_sq", "momentum_buffer"}


class Format(NamedTuple):
    """How one parameter's weight and states are stored."""

    master_weights: MasterWeights
    codec: StateCodec


def format_of(param: Tensor, group: Mapping[str, Any]) -> Format:
    """What a parameter group's options mean for one parameter."""
    quantized = group["quantize"] and param.numel() >= group["min_quantized_numel"]
    is_paper = group["state_codec"] == "paper"
    codec = StateCodec.FLOAT32 if not quantized else StateCodec.PAPER if is_paper else StateCodec.DEFAULT
    bits = group["master_weight_bits"]
    if param.dtype == torch.float32:
        master = MasterWeights.NONE
    elif bits is None:
        master = MasterWeights.NONE_STOCHASTIC if group["stochastic_rounding"] else MasterWeights.NONE
    elif is_paper:
        master = MasterWeights.CORRECTION8_NEAREST if bits == 24 else MasterWeights.CORRECTION16_NEAREST
    else:
        master = MasterWeights.CORRECTION8 if bits == 24 else MasterWeights.CORRECTION16
    return Format(master, codec)


def code_dtype(slot: str, codec: StateCodec) -> torch.dtype:
    if codec == StateCodec.FLOAT32:
        return torch.float32
    return torch.int8 if codec == StateCodec.PAPER and slot in SIGNED_SLOTS else torch.uint8


# Storage order


def storage_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The permutation that makes a dense tensor contiguous; None where it is already."""
    if tensor.is_contiguous():
        return None
    stride = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda d: (-stride[d], d)))


def ordered(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """A view whose row-major order is the storage order."""
    return tensor if order is None else tensor.permute(order)


def rows_of(sizes: Sequence[int], order: tuple[int, ...] | None) -> tuple[int, int]:
    """(rows, groups per row) of a tensor of these sizes, grouped along its storage order."""
    in_order = tuple(sizes) if order is None else tuple(sizes[d] for d in order)
    rows, _, groups = _ops.group_layout(in_order)
    return rows, groups


def from_storage_order(array: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The view with the parameter's sizes of an array that lies in storage order: the inverse of :func:`ordered`."""
    return array if order is None else array.permute(sorted(range(len(order)), key=order.__getitem__))


def state_order(state: Mapping[str, Any], slots: Sequence[str], param: Tensor) -> tuple[int, ...] | None:
    """The storage order of a state: that of its tensors; the parameter's where it has none."""
    for name in (*slots, CORRECTION):
        if name in state:
            return storage_order(state[name])
    return storage_order(param)


# Creation and conversion


class Array(NamedTuple):
    """One tensor of a state."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # as it lies in memory
    order: tuple[int, ...] | None


def arrays_of(param: Tensor, slots: Sequence[str], form: Format) -> list[Array]:
    """The tensors that the state of a parameter consists of."""
    order = storage_order(param)
    shape = tuple(ordered(param, order).shape)
    arrays = []
    for slot in slots:
        arrays.append(Array(slot, code_dtype(slot, form.codec), shape, order))
        if form.codec != StateCodec.FLOAT32:
            arrays.append(Array(slot + SCALE, SCALE_DTYPES[form.codec], rows_of(param.shape, order), None))
    if form.master_weights in CORRECTION_DTYPES:
        arrays.append(Array(CORRECTION, CORRECTION_DTYPES[form.master_weights], shape, order))
    return arrays


def new_state(param: Tensor, slots: Sequence[str], form: Format) -> dict[str, Any]:
    """The state of a parameter that has taken no step: zeros, which every codec stores as zero bytes."""
    if _zeroes_in_one_launch(param.device):
        return new_states([(param, slots, form)])[0]
    state: dict[str, Any] = {STEP: 0}
    for name, dtype, shape, order in arrays_of(param, slots, form):
        state[name] = from_storage_order(torch.zeros(shape, dtype=dtype, device=param.device), order)
    return state


#: Bytes of one allocation that the states of several parameters share: an 8B model's states take 25. It stays allocated as long
#: as any state in it, and must find room in one piece, so it is not larger.
_CHUNK_BYTES = 1 << 30
_ALIGNMENT = 256


def _zeroes_in_one_launch(device: torch.device) -> bool:
    return device.type == "cuda" and _ops.has_cuda()


def new_states(items: Sequence[tuple[Tensor, Sequence[str], Format]]) -> list[dict[str, Any]]:
    """As new_state() for many parameters, in a few allocations: per dtype, arrays lie one behind the other in a chunk.

    One chunk for all dtypes would do, but torch.save refuses tensors of several dtypes that share a storage. On CUDA one launch
    zeroes all chunks of a device.
    """
    wanted: dict[tuple[torch.device, torch.dtype], list[tuple[dict[str, Any], Array]]] = {}
    states: list[dict[str, Any]] = []
    for param, slots, form in items:
        state: dict[str, Any] = {STEP: 0}
        for array in arrays_of(param, slots, form):
            state[array.name] = None  # entries in new_state()'s order
            wanted.setdefault((param.device, array.dtype), []).append((state, array))
        states.append(state)
    to_zero: dict[torch.device, list[Tensor]] = {}
    for (device, dtype), places in wanted.items():
        allocate = torch.empty if _zeroes_in_one_launch(device) else torch.zeros
        step = _ALIGNMENT // dtype.itemsize
        lengths = [-(-math.prod(array.shape) // step) * step for _, array in places]
        first = 0
        while first < len(places):
            end, total = first + 1, lengths[first]
            while end < len(places) and (total + lengths[end]) * dtype.itemsize <= _CHUNK_BYTES:
                total += lengths[end]
                end += 1
            chunk = allocate(total, dtype=dtype, device=device)
            if allocate is torch.empty:
                to_zero.setdefault(device, []).append(chunk)
            offset = 0
            for (state, array), length in zip(places[first:end], lengths[first:end]):
                values = chunk[offset : offset + math.prod(array.shape)].view(array.shape)
                state[array.name] = from_storage_order(values, array.order)
                offset += length
            first = end
    for chunks in to_zero.values():
        _ops.zero_(chunks)
    return states


def stored_codec(state: Mapping[str, Any], slots: Sequence[str]) -> StateCodec:
    """The codec that a state's tensors are in, from the dtypes of its scales. Raises ValueError for a mixture."""
    if not slots:
        return StateCodec.FLOAT32
    found = set()
    for slot in slots:
        scale = state.get(slot + SCALE)
        codec = StateCodec.FLOAT32
        if scale is not None:
            codec = next((c for c, dtype in SCALE_DTYPES.items() if dtype == scale.dtype), StateCodec.FLOAT32)
        expected = [code_dtype(slot, codec)]
        if scale is None:
            expected += [torch.bfloat16, torch.float16, torch.float64]
        if (scale is not None and codec == StateCodec.FLOAT32) or state[slot].dtype not in expected:
            scale_dtype = None if scale is None else scale.dtype
            raise ValueError(
                f"state {slot!r} of dtype {state[slot].dtype} with scales of dtype {scale_dtype} is no known format; allowed "
                "are floating-point values without scales, 8-bit codes with torch.int16 scales (state_codec 'default') "
                "and with torch.float16 scales (state_codec 'paper')"
            )
        found.add(codec)
    if len(found) > 1:
        raise ValueError(f"the states {', '.join(slots)} of one parameter are in different formats: {sorted(found)}")
    return found.pop()


def is_count(step: Any) -> bool:
    """Whether a step count can stay as it is: an int, or an int64 tensor of one element (counted on the device)."""
    return type(step) is int or (isinstance(step, Tensor) and step.dtype == torch.int64 and step.numel() == 1)


def conforms(state: Mapping[str, Any], param: Tensor, slots: Sequence[str], form: Format) -> bool:
    """Whether a step can run on a state as it is."""
    if not is_count(state.get(STEP)) or any(slot not in state for slot in slots):
        return False
    order = state_order(state, slots, param)
    scale_dtype = SCALE_DTYPES.get(form.codec)
    for slot in slots:
        scale = state.get(slot + SCALE)
        if state[slot].dtype != code_dtype(slot, form.codec) or (None if scale is None else scale.dtype) != scale_dtype:
            return False
        if state[slot].shape != param.shape or not ordered(state[slot], order).is_contiguous():
            return False
        if scale is not None and (tuple(scale.shape) != rows_of(param.shape, order) or not scale.is_contiguous()):
            return False
    correction = state.get(CORRECTION)
    if (None if correction is None else correction.dtype) != CORRECTION_DTYPES.get(form.master_weights):
        return False
    return correction is None or (correction.shape == param.shape and ordered(correction, order).is_contiguous())


def decode(kind: str, state: Mapping[str, Any], slots: Sequence[str]) -> list[Tensor]:
    """fp32 values of every slot, contiguous, in the parameter's shape."""
    codec = stored_codec(state, slots)
    if codec == StateCodec.FLOAT32:
        return [state[slot].detach().to(torch.float32).contiguous() for slot in slots]
    order = storage_order(state[slots[0]])
    codes = [ordered(state[slot], order).contiguous() for slot in slots]
    scales = [state[slot + SCALE].contiguous() for slot in slots]
    rows, groups = rows_of(state[slots[0]].shape, order)
    for slot, scale in zip(slots, scales):
        if tuple(scale.shape) != (rows, groups):
            raise ValueError(
                f"state {slot + SCALE!r} has shape {tuple(scale.shape)}; allowed for codes of shape "
                f"{tuple(state[slot].shape)} is {(rows, groups)}"
            )
    values = _ops.decode_states(kind, codes, scales, int(codec), rows)
    if order is None:
        return list(values)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return [v.view(codes[0].shape).permute(inverse).contiguous() for v in values]


def encode(
    kind: str, values: Sequence[Tensor], state: Mapping[str, Any], slots: Sequence[str], codec: StateCodec
) -> None:
    """Stores fp32 values in the tensors of a state made by new_state()."""
    if codec == StateCodec.FLOAT32:
        for slot, value in zip(slots, values):
            state[slot].copy_(value)
        return
    order = storage_order(state[slots[0]])
    codes = [ordered(state[slot], order) for slot in slots]
    scales = [state[slot + SCALE] for slot in slots]
    in_order = [ordered(value, order).contiguous() for value in values]
    rows, _ = rows_of(state[slots[0]].shape, order)
    _ops.encode_states_(kind, in_order, codes, scales, int(codec), rows)


def convert_correction(correction: Tensor, target: Tensor, name: str) -> None:
    """Writes a correction into one of another width or storage order."""
    largest = {torch.int8: 127, torch.int16: 32767}
    if correction.dtype not in largest:
        raise ValueError(
            f"state 'correction' of {name} has dtype {correction.dtype}; allowed are torch.int8 and torch.int16"
        )
    if correction.dtype == target.dtype:
        target.copy_(correction)
        return
    ratio = largest[target.dtype] / largest[correction.dtype]
    target.copy_(correction.to(torch.float64).mul_(ratio).round_().to(target.dtype))


def converted_state(
    kind: str, saved: Mapping[str, Any], param: Tensor, slots: Sequence[str], form: Format, name: str
) -> dict[str, Any]:
    """A state as a step on ``param`` needs it, from one in any format: a checkpoint's, another codec's, plain PyTorch's.

    Nothing of ``saved`` is changed or shared. What it holds beyond the known entries is kept as it is.
    """
    saved = {key: value for key, value in saved.items() if value is not None}
    known = {STEP, CORRECTION, *slots, *(slot + SCALE for slot in slots)}
    foreign = sorted(set(saved) & ALL_SLOTS - set(_ops.state_names(kind, True)))
    if foreign:
        raise ValueError(
            f"the state of {name} holds {', '.join(foreign)}, which {kind} does not have: it is another optimizer's"
        )
    present = [slot for slot in slots if slot in saved]
    if len(present) < len(slots) and (present or (not kind.startswith("sgd") and saved.get(STEP))):
        missing = ", ".join(slot for slot in slots if slot not in saved)
        raise ValueError(f"the state of {name} lacks {missing}; it holds {', '.join(sorted(map(str, saved)))}")
    for key in (*present, CORRECTION):
        if key in saved and saved[key].shape != param.shape:
            raise ValueError(
                f"state {key!r} of {name} has shape {tuple(saved[key].shape)}; allowed is the parameter's, {tuple(param.shape)}"
            )

    state = new_state(param, slots, form)
    if present:
        local = {key: saved[key].detach().to(param.device) for key in saved if key in known - {STEP, CORRECTION}}
        scales = [slot + SCALE for slot in slots if slot + SCALE in state]
        if (
            stored_codec(local, slots) == form.codec
            and storage_order(local[slots[0]]) == storage_order(state[slots[0]])
            and all(local[scale].shape == state[scale].shape for scale in scales)
        ):
            for key in (*slots, *scales):
                state[key].copy_(local[key])
        else:
            encode(kind, decode(kind, local, slots), state, slots, form.codec)
    # Where a buffer is new (SGD whose momentum was 0 so far), the next step is its first.
    state[STEP] = _whole_number(saved.get(STEP, 1 if present else 0), name) if present or not slots else 0
    if CORRECTION in saved:
        if CORRECTION in state:
            convert_correction(saved[CORRECTION].detach().to(param.device), state[CORRECTION], name)
        else:
            warnings.warn(
                f"the state of {name} has a correction, which a {param.dtype} parameter with these options does not keep: "
                "its weights lose the bits below their own precision",
                stacklevel=4,
            )
    for key, value in saved.items():
        if key not in known:
            state[key] = value.detach().clone() if isinstance(value, Tensor) else value
    return state


def _whole_number(value: Any, name: str) -> int:
    number = float(value.item() if isinstance(value, Tensor) else value)
    if not (number >= 0 and number == int(number) and number < 2**53):
        raise ValueError(f"state 'step' of {name} is {number!r}; allowed is an integer >= 0")
    return int(number)
