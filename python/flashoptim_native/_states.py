"""A parameter's state as a dict of tensors: its names, and the ways between the dict and the operators.

What is stored, in which format and order, is decided in C++ (libtorch/store); this module knows the dict.
"""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops
from ._ops import CorrectionFate, Fit, MasterWeights, StateCodec
from ._parameters import Local, check_cut, has_memory, has_momentum, is_sharded, plain, whole_shape, wrap

CODES = "_codes"
SCALE = "_scale"
CORRECTION = "correction"
STEP = "step"
#: Of parameters that do not lie in the order of their dimensions: the dimensions, the outermost in memory first.
STORAGE_ORDER = "storage_order"
#: Slots of any optimizer: a state that holds one that its optimizer lacks is another optimizer's.
ALL_SLOTS = frozenset({"exp_avg", "exp_avg_sq", "momentum_buffer"})
#: Keys of other libraries, whose checkpoints are converted first.
_BITSANDBYTES = ("__bnb_optimizer_quant_state__", "state1", "state2")
_FOREIGN = ("error_bits", "ecc_bits", *_BITSANDBYTES)
_CODECS = {"paper": StateCodec.PAPER, "default": StateCodec.DEFAULT}
_MOST_STEPS = 2**53
_NO_PLACE: tuple[int, ...] = ()


class Format(NamedTuple):
    """How one parameter's weight and states are stored."""

    master_weights: MasterWeights
    codec: StateCodec
    has_momentum: bool
    #: Where states are between steps: None: beside the parameter; "states": on the host.
    offload: str | None = None


def format_of(param: Tensor, group: Mapping[str, Any]) -> Format:
    """What a parameter group's options mean for one parameter."""
    master_weights, codec = _ops.format_of(
        _ops.DTYPES[param.dtype],
        whole_shape(param),
        group["quantize"],
        _CODECS[group["state_codec"]],
        group["master_weight_bits"] or 0,
        group["stochastic_rounding"],
        group["min_quantized_numel"],
    )
    return Format(master_weights, codec, has_momentum(group), group.get("offload"))


def loses_small_updates(group: Mapping[str, Any]) -> bool:
    """Whether a group keeps 16-bit parameters without anything below them, rounded to nearest."""
    if group["master_weight_bits"] is not None or group["stochastic_rounding"]:
        return False
    return any(param.dtype != torch.float32 for param in group["params"])


def slots_of(kind: str, form: Format) -> tuple[str, ...]:
    """Names of a parameter's slots."""
    return _ops.state_names(kind, form.has_momentum)


def key_of(state: Mapping[str, Any], slot: str) -> str | None:
    """The key under which a state holds a slot: its codes, or its fp32 values (and codes in format 1)."""
    for key in (slot + CODES, slot):
        if state.get(key) is not None:
            return key
    return None


def slots_in(kind: str, state: Mapping[str, Any]) -> tuple[str, ...]:
    """The slots that a state has."""
    return tuple(slot for slot in _ops.state_names(kind, True) if key_of(state, slot) is not None)


def order_of(tensor: Tensor) -> list[int] | None:
    """The dimensions of a dense tensor from the outermost in memory to the innermost; None: in their own order."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return None
    return sorted(range(tensor.dim()), key=lambda d: -int(tensor.stride()[d]))


def _named(
    names: Sequence[str], arrays: Sequence[Tensor], param: Local, form: Format, step: int, name: str
) -> dict[str, Any]:
    """A state of arrays that the operators made, in their order."""
    if form.codec != StateCodec.FLOAT32:
        check_cut(param, name)
    state: dict[str, Any] = {STEP: step}
    for key, array in zip(names, arrays):
        whole = _ops.scale_sizes(param.whole) if key.endswith(SCALE) else param.whole
        state[key] = wrap(param, array, whole, name)
    order = order_of(arrays[0]) if arrays else None
    if order is not None:
        state[STORAGE_ORDER] = torch.tensor(order, dtype=torch.int64)
    return state


def new_states(kind: str, items: Sequence[tuple[Local, Format, str]]) -> list[dict[str, Any]]:
    """States of parameters of one device that have taken no step: zeros, which every codec stores as zero bytes.

    Each is given with its name for messages.
    """
    return _new_states(kind, items, _ops.new_states)


def host_states(kind: str, items: Sequence[tuple[Local, Format, str]], pin: bool) -> list[dict[str, Any]]:
    """The same on the host, in one stretch of memory of their own, pinned where asked.

    Raises:
        RuntimeError: the host does not give or pin it; the message says how much was wanted, and the limits.
    """
    return _new_states(kind, items, functools.partial(_ops.host_states, pin=pin))


def _new_states(
    kind: str, items: Sequence[tuple[Local, Format, str]], make: Callable[..., list[Tensor]]
) -> list[dict[str, Any]]:
    if not items:
        return []
    for param, form, name in items:
        if form.codec != StateCodec.FLOAT32:
            check_cut(param, name)
    places: list[int] = []
    if any(param.place is not None for param, _, _ in items):
        for param, _, _ in items:
            places += param.place or (0,) * 6
    arrays = make(
        kind,
        [param.tensor.detach() for param, _, _ in items],
        [int(form.has_momentum) for _, form, _ in items],
        [int(form.master_weights) for _, form, _ in items],
        [int(form.codec) for _, form, _ in items],
        places,
    )
    states = []
    first = 0
    for param, form, name in items:
        names = _ops.array_names(kind, form.has_momentum, form.master_weights, form.codec)
        states.append(_named(names, arrays[first : first + len(names)], param, form, 0, name))
        first += len(names)
    return states


class _Arrays(NamedTuple):
    """What of a state the operators take, by their arguments' names."""

    states: list[Tensor]
    scales: list[Tensor]
    correction: Tensor | None

    @classmethod
    def of(cls, state: Mapping[str, Any], slots: Sequence[str]) -> _Arrays:
        keys = [key_of(state, slot) for slot in slots]
        states = [plain(state[key]).detach() for key in keys if key is not None]
        scales = [plain(state[slot + SCALE]).detach() for slot in slots if state.get(slot + SCALE) is not None]
        correction = state.get(CORRECTION)
        return cls(states, scales, None if correction is None else plain(correction).detach())


def fit(
    kind: str, state: Mapping[str, Any], param: Local, form: Format, name: str, belongs_to: torch.dtype | None
) -> Fit:
    """Whether a step can run on a state as it is. ``belongs_to``: the parameter's dtype when it was made, if known.

    Raises:
        RuntimeError: a tensor's storage is too small for it.
    """
    slots = slots_of(kind, form)
    names = _ops.array_names(kind, form.has_momentum, form.master_weights, form.codec)
    if not all(isinstance(state[key], Tensor) for key in names if key in state):
        return Fit.NO
    if any(state.get(key) is None or is_sharded(state[key]) != (param.spec is not None) for key in names):
        return Fit.NO
    if form.codec != StateCodec.FLOAT32 and any(slot in state for slot in slots):
        return Fit.NO  # values beside codes
    arrays = _Arrays.of(state, slots)
    if len(arrays.states) != len(slots) or (arrays.scales and len(arrays.scales) != len(slots)):
        return Fit.NO
    return Fit(
        _ops.fit_state(
            optimizer=kind,
            has_momentum=form.has_momentum,
            param=param.tensor.detach(),
            **arrays._asdict(),
            correction_of=_belongs_to(belongs_to),
            master_weights=int(form.master_weights),
            codec=int(form.codec),
            place=param.place or _NO_PLACE,
            name=name,
            on_host=form.offload is not None,
        )
    )


def _belongs_to(dtype: torch.dtype | None) -> int:
    return int(_ops.DTYPES.get(dtype, 0)) if dtype is not None else 0


class Converted(NamedTuple):
    """A state in another format."""

    state: dict[str, Any]
    #: The parameter's values, where they must change with the correction (it has changed its dtype).
    param: Tensor | None


def converted(
    kind: str,
    saved: Mapping[str, Any],
    param: Local,
    form: Format,
    name: str,
    belongs_to: torch.dtype | None = None,
) -> Converted:
    """A state as a step on ``param`` needs it, from one in any format: another codec's, an older one's, PyTorch's.

    Nothing of ``saved`` is changed or shared. What it holds beyond the known entries is kept, as a copy.

    Raises:
        ValueError: the state is another optimizer's, lacks something, or is in no known format.
    """
    saved = {key: value for key, value in saved.items() if value is not None}
    slots = slots_of(kind, form)
    check_owner(kind, saved, name)
    present = [slot for slot in slots if key_of(saved, slot) is not None]
    if len(present) < len(slots) and (present or (not kind.startswith("sgd") and saved.get(STEP))):
        missing = ", ".join(slot for slot in slots if slot not in present)
        raise ValueError(f"the state of {name} lacks {missing}; it holds {', '.join(sorted(map(str, saved)))}")
    if present and kind.startswith("adam") and STEP not in saved:
        raise ValueError(f"the state of {name} lacks {STEP}; it holds {', '.join(sorted(map(str, saved)))}")
    keys = {slot: key_of(saved, slot) or slot for slot in present}
    for key in (*keys.values(), *(slot + SCALE for slot in present), CORRECTION):
        if key in saved and not isinstance(saved[key], Tensor):
            raise ValueError(f"state {key!r} of {name} is a {type(saved[key]).__name__}; allowed is a tensor")
    arrays = _Arrays.of(saved, present)
    if arrays.scales and len(arrays.scales) != len(present):
        raise ValueError(
            f"the states of {name} are in different formats: there are scales for some of {', '.join(present)}; "
            "allowed are scales for all (8-bit codes) or none (floating-point values)"
        )
    try:
        made = _ops.convert_state(
            optimizer=kind,
            has_momentum=form.has_momentum,
            param=dense(param.tensor.detach()),
            **arrays._asdict(),
            correction_of=_belongs_to(belongs_to),
            master_weights=int(form.master_weights),
            codec=int(form.codec),
            place=param.place or _NO_PLACE,
            name=name,
        )
    except RuntimeError as error:
        said = _said(error)
        raise ValueError(said if name in said else f"the state of {name} cannot be converted: {said}") from error
    names = _ops.array_names(kind, form.has_momentum, form.master_weights, form.codec)
    # Where a buffer is new (SGD whose momentum was 0 so far), the next step is its first.
    has_stepped = bool(present) or not slots
    step = whole_number(saved.get(STEP, 1 if present else 0), name) if has_stepped else 0
    state = _named(names, made.arrays, param, form, step, name)
    unknown = {key: value for key, value in saved.items() if key not in known_keys(kind)}
    for key, value in unknown.items():
        state[key] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    warn_of_correction(made.fate, name, param.tensor.dtype, belongs_to)
    return Converted(state, made.param)


@functools.lru_cache(maxsize=16)
def known_keys(kind: str) -> frozenset[str]:
    """Everything that a state of this optimizer can hold."""
    slots = _ops.state_names(kind, True)
    suffixed = (slot + suffix for slot in slots for suffix in ("", CODES, SCALE))
    return frozenset((STEP, CORRECTION, STORAGE_ORDER, *suffixed))


def check_owner(kind: str, saved: Mapping[str, Any], name: str) -> None:
    """Raises ValueError for a state that is another optimizer's, or in a format that only its own library reads."""
    foreign = sorted(
        str(key)
        for key in set(saved) - known_keys(kind)
        if isinstance(key, str) and re.sub(f"({CODES}|{SCALE})$", "", key) in ALL_SLOTS
    )
    if foreign:
        raise ValueError(
            f"the state of {name} holds {', '.join(foreign)}, which {kind} does not have: it is another optimizer's"
        )
    coded = sorted(str(key) for key in saved if "::" in str(key) or key in _FOREIGN)
    if coded:
        theirs = any(key in _BITSANDBYTES for key in coded)
        raise ValueError(
            f"the state of {name} holds {', '.join(coded)}: it was written by "
            f"{'bitsandbytes' if theirs else 'the reference implementation (flashoptim)'}; allowed is what "
            "flashoptim_native.convert.state_dict() makes of the checkpoint"
        )


def warn_of_correction(fate: CorrectionFate, name: str, dtype: torch.dtype, before: torch.dtype | None) -> None:
    """Says what of a correction does not go on; nothing where all does."""
    if fate == CorrectionFate.DROPPED:
        warnings.warn(
            f"the state of {name} has a correction, which a {dtype} parameter with these options does not keep: its "
            "weights lose the bits below their own precision",
            stacklevel=5,
        )
    elif fate == CorrectionFate.LOST:
        warnings.warn(
            f"the correction of {name} belongs to {before} weights, whose last bits are lost in {dtype}: it goes on "
            "from the weights as they are. To keep what corrections hold, take get_fp32_model_state_dict() before the "
            "cast and give it to set_fp32_model_state_dict() after it",
            stacklevel=5,
        )


def warn_of_lost_digits(name: str, dtype: torch.dtype) -> None:
    """Says that float32 weights have been cast to 16 bits where no correction could take what was cut off."""
    warnings.warn(
        f"{name} was torch.float32 at its last step and is {dtype} now: what its weights had beyond {dtype} is lost, "
        "and its correction begins with zeros. cast_model() keeps it, as does set_fp32_model_state_dict() with what "
        "get_fp32_model_state_dict() gave before the cast; reset_corrections() behind the cast says that it is meant",
        stacklevel=5,
    )


def decode(kind: str, state: Mapping[str, Any], slots: Sequence[str], param: Local | None = None) -> list[Tensor]:
    """fp32 values of every slot, contiguous, in the parameter's shape."""
    arrays = _Arrays.of(state, slots)
    codec = stored_codec(kind, state, slots)
    if codec == StateCodec.FLOAT32:
        return [values.to(torch.float32).contiguous() for values in arrays.states]
    place = _NO_PLACE if param is None or param.place is None else param.place
    states = [dense(codes) for codes in arrays.states]
    try:
        values = _ops.decode_states(kind, states, [scale.contiguous() for scale in arrays.scales], int(codec), place)
    except RuntimeError as error:
        raise ValueError(_said(error)) from error
    return [value.contiguous() for value in values]


def _said(error: RuntimeError) -> str:
    """What an operator said, without its name."""
    return re.sub(r"^flashoptim::\w+: ", "", str(error))


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a dense copy in the same order of dimensions."""
    return tensor if torch.ops.aten.is_non_overlapping_and_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def stored_codec(kind: str, state: Mapping[str, Any], slots: Sequence[str]) -> StateCodec:
    """The codec that a state's scales belong to; the operators check the rest."""
    scales = [state.get(slot + SCALE) for slot in slots]
    if not slots or scales[0] is None:
        return StateCodec.FLOAT32
    return StateCodec.PAPER if scales[0].dtype == torch.float16 else StateCodec.DEFAULT


def is_count(step: Any) -> bool:
    """Whether a step count can stay as it is: an int, or an int64 tensor of one element (counted on the device)."""
    if type(step) is int:
        return 0 <= step < _MOST_STEPS
    return isinstance(step, Tensor) and step.dtype == torch.int64 and step.numel() == 1 and has_memory(step)


def whole_number(value: Any, name: str) -> int:
    """A step count as an int.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.numel() != 1 or value.device.type == "meta" or not has_memory(value):
            held = f"a storage of {value.untyped_storage().nbytes()} bytes" if value.layout == torch.strided else "none"
            raise ValueError(
                f"state 'step' of {name} has layout {value.layout}, shape {tuple(value.shape)}, device {value.device} "
                f"and {held}; allowed is one integer >= 0"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"state 'step' of {name} is {value!r}, a {type(value).__name__}; allowed is an integer >= 0")
    if not (0 <= value < _MOST_STEPS and value == int(value)):
        raise ValueError(f"state 'step' of {name} is {value!r}; allowed is an integer >= 0 and below 2^53")
    return int(value)
