"""The paper's reference implementation (flashoptim 0.1.3 and 0.1.4).

    <state>               bf16 (0.1.3) or fp32 (0.1.4): states that were not compressed
    <state>::quantized    int8 (momentum), uint8 (root of the variance); in the parameter's dtype where torch cast them
    <state>::scales       fp16, one for every 32 elements in memory; 0.1.4: their bytes as bf16 beside bf16 parameters
    error_bits            8 bits as whole numbers in the parameter's dtype, 16 bits as bytes in it; or int8, int16
    step                  AdamW, Adam: float tensor (0.1.3) or int64 (0.1.4)
    groups                `master_bytewidth`: 3, 4 or None

Its codes are those of our `paper` codec and its error bits our corrections, so that both go on bit for bit where its
groups of 32 are ours: where the rows of a parameter are multiples of 32 elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _ops, _states
from .._ops import StateCodec
from .._states import CODES, CORRECTION, SCALE, STEP
from ._checkpoint import Checkpoint, State, check_known, group_of, missing, step_in, tensor

NAME = "reference"
_CODES, _SCALES, _ERRORS = "::quantized", "::scales", "error_bits"
_GROUP = 32
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SLOTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_KNOWN = {STEP, _ERRORS, *(slot + suffix for slot in _SLOTS for suffix in ("", _CODES, _SCALES))}


def matches(state_dict: Mapping[str, Any]) -> bool:
    if any("master_bytewidth" in group for group in state_dict["param_groups"]):
        return True
    return any("::" in str(key) or key == _ERRORS for held in state_dict["state"].values() for key in held)


def read(state_dict: Mapping[str, Any], optimizer: str | None = None) -> Checkpoint:
    """
    Raises:
        ValueError: a state holds what this format does not.
    """
    groups = []
    widths: dict[Any, Any] = {}
    for group in state_dict["param_groups"]:
        groups.append(group_of(group, "betas", "eps", "momentum", "dampening", "nesterov", "decouple_lr"))
        width = group.get("master_bytewidth")
        widths |= dict.fromkeys(group["params"], width)
        if width in (3, 4):
            groups[-1]["master_weight_bits"] = 8 * width
    return Checkpoint(NAME, None, groups, _reader(state_dict, widths), _candidates(state_dict))


def _candidates(state_dict: Mapping[str, Any]) -> tuple[str, ...]:
    if all("betas" not in group for group in state_dict["param_groups"]):
        return ("sgd", "sgdw")
    keys = {str(key).partition("::")[0] for held in state_dict["state"].values() for key in held}
    if "exp_avg" in keys and "exp_avg_sq" not in keys:
        return ("lion",)
    return ("adamw", "adam") if "exp_avg_sq" in keys else ("adamw", "adam", "lion")


def _reader(state_dict: Mapping[str, Any], widths: Mapping[Any, Any]) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = state_dict["state"].get(number)
        if not saved:
            return None
        check_known(saved, _KNOWN, number, "the reference")
        held: dict[str, Any] = {}
        shape: tuple[int, ...] | None = None
        for slot in _SLOTS:
            if slot + _CODES in saved:
                codes = _codes(saved, slot, number)
                shape = tuple(codes.shape)
                held |= _decoded(slot, codes, _scales(saved, slot, number), number)
            elif slot in saved:
                value = tensor(saved[slot], slot, number, _FLOATS)
                held[slot], shape = value.to(torch.float32), tuple(value.shape)
        _settle(held)
        dtype = None
        if saved.get(_ERRORS) is not None:
            held[CORRECTION], dtype = _correction(saved[_ERRORS], widths[number], number)
            shape = tuple(held[CORRECTION].shape)
        if shape is None:
            raise missing("exp_avg or momentum_buffer", number, saved)
        if STEP in saved:
            held[STEP] = step_in(saved, number)
        return State(held, shape, dtype)

    return read_state


def _codes(saved: Mapping[str, Any], slot: str, number: Any) -> Tensor:
    key = slot + _CODES
    codes = tensor(saved[key], key, number, (torch.int8, torch.uint8, *_FLOATS))
    wanted = torch.uint8 if slot == "exp_avg_sq" else torch.int8
    if codes.is_floating_point():  # torch casts states to the parameter's dtype; whole numbers up to 255 survive it
        values = codes.to(torch.float32)
        low, high = (0, 255) if wanted == torch.uint8 else (-127, 127)
        if not bool(((values == values.round()) & (values >= low) & (values <= high)).all()):
            raise ValueError(f"state {key!r} of parameter {number!r} holds other numbers than {low} to {high}")
        return values.to(wanted)
    return codes if codes.dtype == wanted else codes.view(wanted)


def _scales(saved: Mapping[str, Any], slot: str, number: Any) -> Tensor:
    key = slot + _SCALES
    if key not in saved:
        raise missing(key, number, saved)
    scales = tensor(saved[key], key, number, (torch.float16, torch.bfloat16, torch.float32))
    if scales.dtype == torch.bfloat16:  # 0.1.4's view of the bytes, as bf16 parameters' states are not cast
        return scales.contiguous().view(torch.float16)
    narrow = scales.to(torch.float16)
    if not torch.equal(narrow.to(scales.dtype), scales):
        raise ValueError(f"state {key!r} of parameter {number!r} holds numbers that no fp16 scale is")
    return narrow


def _decoded(slot: str, codes: Tensor, scales: Tensor, number: Any) -> dict[str, Tensor]:
    """Codes and scales of ours where the groups are the same ones, else fp32 values."""
    shape = tuple(codes.shape)
    if scales.numel() != -(-codes.numel() // _GROUP):
        raise ValueError(
            f"state {slot + _SCALES!r} of parameter {number!r} has {scales.numel()} elements for {codes.numel()} "
            f"codes; allowed is one for every {_GROUP} codes"
        )
    sizes = _ops.scale_sizes(shape)
    row = math.prod(shape[len(sizes) - 1 :])
    if codes.is_contiguous() and (len(sizes) == 1 or row % _GROUP == 0):
        return {slot + CODES: codes, slot + SCALE: scales.reshape(sizes)}
    dense = _states.dense(codes)
    in_memory = dense.as_strided((dense.numel(),), (1,))
    kind = "sgd" if slot == "momentum_buffer" else "adamw"
    flat = [in_memory.view(torch.int8 if slot != "exp_avg_sq" else torch.uint8)]
    if slot == "exp_avg_sq":  # decoded beside a momentum, which AdamW's state has too
        momentum = torch.zeros(dense.numel(), dtype=torch.int8)
        values = _ops.decode_states(kind, [momentum, *flat], [scales.clone(), scales], int(StateCodec.PAPER), ())[1]
    elif kind == "adamw":
        variance = torch.zeros(dense.numel(), dtype=torch.uint8)
        values = _ops.decode_states(kind, [*flat, variance], [scales, scales.clone()], int(StateCodec.PAPER), ())[0]
    else:
        values = _ops.decode_states(kind, flat, [scales], int(StateCodec.PAPER), ())[0]
    result = torch.empty_strided(dense.shape, dense.stride(), dtype=torch.float32)
    result.as_strided((dense.numel(),), (1,)).copy_(values)
    return {slot: result.contiguous()}


def _settle(held: dict[str, Any]) -> None:
    """All slots of a state in one format."""
    coded = [slot for slot in _SLOTS if slot + CODES in held]
    if coded and any(slot in held for slot in _SLOTS):
        raise ValueError("states of one parameter are in different formats; allowed are codes for all, or none")


def _correction(errors: Any, width: Any, number: Any) -> tuple[Tensor, torch.dtype | None]:
    """Our correction, and the parameter's dtype where the way it was stored tells it."""
    value = tensor(errors, _ERRORS, number, (torch.int8, torch.int16, *_FLOATS))
    if value.dtype in (torch.int8, torch.int16):
        return value, None
    if value.dtype == torch.float32 or width not in (3, 4):
        raise ValueError(
            f"state {_ERRORS!r} of parameter {number!r} has dtype {value.dtype}, in a group of master_bytewidth "
            f"{width!r}; allowed are torch.bfloat16 and torch.float16 with 3 or 4"
        )
    if width == 4:
        return value.contiguous().view(torch.int16), value.dtype
    whole = value.to(torch.float32)
    if not bool(((whole == whole.round()) & (whole.abs() <= 127)).all()):
        raise ValueError(f"state {_ERRORS!r} of parameter {number!r} holds other numbers than -127 to 127")
    return whole.to(torch.int8), value.dtype


__all__ = ["NAME", "matches", "read"]
