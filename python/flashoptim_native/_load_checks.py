"""What is checked of a state dict before anything of it is taken: its structure, its arrays, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from . import _ops, _parameters, _states
from ._parameters import Local
from ._states import CODES, CORRECTION, SCALE, STEP, Format

#: Numbers that every file of an optimizer that has them holds.
_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening")
_LARGEST_VARIANCE = 2.0**127
#: Rules that do not need the number of steps: torch's SGD and most packages' Lion keep a floating-point slot alone.
_UNCOUNTED = ("sgd", "sgdw", "lion")


def structure(state_dict: Any) -> list[Any]:
    """The names of all parameters in a state dict, in the order of its groups.

    Raises:
        TypeError: something is not of the type that ``state_dict()`` gives.
        ValueError: something is missing, or belongs to no parameter.
    """
    _check_type("state_dict", state_dict, Mapping, "a dict, as state_dict() gives it")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            held = ", ".join(sorted(map(repr, state_dict)))[:200]
            raise ValueError(f"the state dict lacks {key!r}; it holds {held or 'nothing'}")
    _check_type("state of the state dict", state_dict["state"], Mapping, "a dict")
    _check_type("param_groups of the state dict", state_dict["param_groups"], (list, tuple), "a list of dicts")
    numbers: dict[Any, None] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        where = f"param_groups[{index}] of the state dict"
        _check_type(where, group, Mapping, "a dict")
        if "params" not in group:
            raise ValueError(f"{where} lacks 'params'; allowed is a list of the numbers of its parameters")
        _check_type(f"'params' of {where}", group["params"], (list, tuple), "a list")
        for number in group["params"]:
            _check_type(f"'params' of {where}: {number!r}", number, (int, str), "a number, or a parameter's name")
            if number in numbers:
                raise ValueError(f"'params' of {where} hold {number!r} a second time; allowed is each one once")
            numbers[number] = None
    for number, held in state_dict["state"].items():
        if not isinstance(number, (int, str)) or number not in numbers:
            raise ValueError(
                f"state[{number!r}] of the state dict is no parameter's: its param_groups do not list it; allowed are "
                f"{_some(numbers)}"
            )
        if not isinstance(held, Mapping):
            raise ValueError(f"state[{number!r}] of the state dict is a {type(held).__name__}; allowed is a dict")
    return list(numbers)


def _check_type(what: str, value: Any, allowed: Any, said: str) -> None:
    if not isinstance(value, allowed):
        raise TypeError(f"{what} is a {type(value).__name__}; allowed is {said}")


def _some(names: Mapping[Any, None]) -> str:
    first = ", ".join(map(repr, list(names)[:8]))
    return first + (", ..." if len(names) > 8 else "") if names else "none"


def group(live: Mapping[str, Any], saved: Mapping[str, Any], index: int) -> None:
    """Raises ValueError where a saved group has other hyperparameters: it is another optimizer's, or damaged."""
    for name in _HYPERPARAMETERS:
        if name in live and name not in saved:
            raise ValueError(
                f"group {index} of the state dict lacks {name!r}, which this optimizer has: it is another optimizer's, "
                f"or incomplete; it holds {', '.join(sorted(map(str, saved)))}"
            )
        if name in saved and name not in live:
            raise ValueError(
                f"group {index} of the state dict holds {name!r}, which this optimizer does not have: it is another "
                f"optimizer's; allowed are {', '.join(one for one in _HYPERPARAMETERS if one in live)}"
            )


def copied(value: Any, what: str) -> Any:
    """A copy that shares nothing.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return value.detach().clone() if isinstance(value, Tensor) else deepcopy(value)
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(
            f"{what} of the state dict is a {type(value).__name__} that cannot be copied ({kind})"
        ) from error


def arrays(kind: str, saved: Mapping[Any, Any], param: Local, name: str) -> None:
    """Raises ValueError where what ought to be an array of numbers in memory is not, or is only a part of a state."""
    known = _states.known_keys(kind)
    present = {key for key, value in saved.items() if value is not None}
    for slot in _ops.state_names(kind, True):
        if slot in present and slot + CODES in present:
            raise ValueError(f"the state of {name} holds {slot} and {slot + CODES}; allowed is one of them")
        for key in (slot, slot + CODES, slot + SCALE, CORRECTION):
            is_uncounted = kind in _UNCOUNTED and key == slot
            if key in present and STEP not in present and not is_uncounted:
                raise ValueError(f"the state of {name} lacks {STEP}; it holds {', '.join(sorted(map(str, present)))}")
        if slot + SCALE in present and not present & {slot, slot + CODES}:
            raise ValueError(f"the state of {name} lacks {slot + CODES}, and holds {slot + SCALE}; allowed are both")
    for key, value in saved.items():
        if not isinstance(key, str):
            raise ValueError(f"the state of {name} holds {key!r}, a {type(key).__name__}; allowed are names")
        if key not in known or value is None or key == STEP:
            continue
        where = f"state {key!r} of {name}"
        if not isinstance(value, Tensor):
            if key == _states.STORAGE_ORDER:
                continue
            raise ValueError(f"{where} is a {type(value).__name__}; allowed is a tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise ValueError(f"{where} has layout {value.layout} and dtype {value.dtype}; allowed is a dense tensor")
        if _parameters.is_sharded(value):
            continue
        if value.device.type == "meta" and param.tensor.device.type != "meta":
            raise ValueError(f"{where} is on device meta, and has no values; allowed is a device with memory")
        if not _parameters.is_plain(value):
            raise ValueError(f"{where} is a {type(value).__name__}; allowed is a plain tensor")
        if value.device.type != "meta" and not _parameters.has_memory(value):
            raise ValueError(
                f"{where} of shape {tuple(value.shape)} needs more memory than its storage has, "
                f"{value.untyped_storage().nbytes()} bytes"
            )


def values(kind: str, held: Mapping[str, Any], param: Local, form: Format, name: str) -> None:
    """Raises ValueError where a state holds what no optimizer writes; its format has been found to be right.

    Not for states whose checksum says that they are as saved: a run that diverged is saved as it is.
    """
    if param.tensor.device.type == "meta":
        return
    correction = held.get(CORRECTION)
    if isinstance(correction, Tensor) and not correction.is_floating_point() and correction.numel():
        smallest = torch.iinfo(correction.dtype).min
        if correction.dtype in (torch.int8, torch.int16) and bool((_parameters.plain(correction) == smallest).any()):
            raise ValueError(f"state 'correction' of {name} holds {smallest}, which no encoder writes")
    slots = _states.slots_in(kind, held)
    if not slots and _states.slots_of(kind, form) and held.get(STEP):
        missing = ", ".join(_states.slots_of(kind, form))
        raise ValueError(f"the state of {name} lacks {missing}; it holds {', '.join(sorted(map(str, held)))}")
    for slot in slots:
        key = _states.key_of(held, slot)
        assert key is not None
        if key.endswith(CODES) or held.get(slot + SCALE) is not None:
            _check_codes(_parameters.plain(held[key]), _parameters.plain(held[slot + SCALE]), slot, name)
    try:
        decoded = _states.decode(kind, held, slots, param)
    except ValueError as error:
        raise ValueError(f"the state of {name} cannot be read: {error}") from error
    for slot, value in zip(slots, decoded):
        where = f"state {_states.key_of(held, slot)!r} of {name}"
        if value.numel() == 0:
            continue
        low, high = (float(one) for one in torch.aminmax(value))
        if not (low > -torch.inf and high < torch.inf):  # NaN, too
            raise ValueError(f"{where} holds values from {low} to {high}; allowed are finite numbers")
        if slot == "exp_avg_sq" and (low < 0.0 or (held.get(slot + SCALE) is not None and high > _LARGEST_VARIANCE)):
            raise ValueError(f"{where} holds values from {low} to {high}; allowed are 0 and more, up to 2^127")


def _check_codes(codes: Tensor, scale: Tensor, slot: str, name: str) -> None:
    where = f"state {slot + SCALE!r} of {name}"
    if scale.numel() == 0:
        return
    if scale.is_floating_point():
        low, high = (float(one) for one in torch.aminmax(scale.float()))
        if not (low >= 0.0 and high < torch.inf):
            raise ValueError(f"{where} holds scales from {low} to {high}; allowed are finite numbers >= 0")
        if codes.dtype == torch.int8 and bool((codes == -128).any()):
            raise ValueError(f"state {slot + CODES!r} of {name} holds -128, which no encoder writes")
    elif slot != "exp_avg_sq" and bool(((scale.to(torch.int32) & 0xFF00) == 0xFF00).any()):
        raise ValueError(f"{where} holds a header whose exponent is 255; allowed are those of finite scales")
