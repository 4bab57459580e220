"""Our own format (docs/state_format.md), from ``state_dict()`` of this version and of format 1, and to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checksums, _groups, _load_checks, _model_loads, _ops, _packing, _parameters, _state_dict, _states
from .._groups import Stored
from .._ops import MasterWeights
from .._parameters import Local
from .._states import CODES, CORRECTION, SCALE, STORAGE_ORDER, Format
from ..weights import compute_ecc_bits
from ._checkpoint import Checkpoint, State, optimizer_class

NAME = "flashoptim"


def matches(state_dict: Mapping[str, Any]) -> bool:
    if any(str(key).startswith(_groups.PREFIX) for group in state_dict["param_groups"] for key in group):
        return True
    return any(
        str(key).endswith((CODES, SCALE)) or key == CORRECTION for held in state_dict["state"].values() for key in held
    )


def has_checksums(state_dict: Mapping[str, Any]) -> bool:
    """Files of the C++ front end have none: theirs are over the whole file."""
    return _checksums.KEY in state_dict


def _kind_of(state_dict: Mapping[str, Any]) -> str | None:
    for group in state_dict["param_groups"]:
        for key in group:
            if isinstance(key, str) and key.startswith(_groups.PREFIX):
                return key.removeprefix(_groups.PREFIX).rpartition(".")[0]
    return None


def read(state_dict: Mapping[str, Any], optimizer: str | None = None, verify: bool = True) -> Checkpoint:
    """
    Raises:
        ValueError: it is damaged, of a later format, or of DTensors.
    """
    numbers = _load_checks.structure(state_dict)
    vouched = _checksums.verify(state_dict, numbers) if verify else frozenset()
    kind = _kind_of(state_dict)
    candidates = () if kind else ("adamw", "adam", "sgd", "sgdw", "lion")
    if kind is not None and kind not in _ops.optimizer_names():
        raise ValueError(f"the checkpoint is of {kind!r}; allowed are {', '.join(_ops.optimizer_names())}")
    groups: list[dict[str, Any]] = []
    stored: dict[Any, Stored] = {}
    for index, group in enumerate(state_dict["param_groups"]):
        description = _groups.read_description(kind or optimizer or "adamw", group, index)
        options = _options_of(group)
        for position, number in enumerate(group["params"]):
            count = len(group["params"])
            stored[number] = Stored() if description is None else description.of(position, count)
        others = {key: value for key, value in group.items() if not str(key).startswith(_groups.PREFIX)}
        groups.append({**options, **others, "params": list(group["params"])})
    more = {key: state_dict[key] for key in (_model_loads.KEY,) if key in state_dict}
    return Checkpoint(
        NAME, kind, groups, _reader(state_dict, kind or optimizer or "adamw", stored), candidates, more, vouched
    )


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a group's description names, which a writer goes on with where it is not told otherwise."""
    said = _groups.description_text(group) or {}
    return {name: said[name] for name in _groups.PACKED_OPTIONS if name in said}


def _reader(state_dict: Mapping[str, Any], kind: str, stored: Mapping[Any, Stored]) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = state_dict["state"].get(number)
        if not saved:
            return None
        name = f"parameter {number!r} of the checkpoint"
        if any(_parameters.is_sharded(value) for value in saved.values()):
            raise ValueError(
                f"the state of {name} holds DTensors; allowed are whole tensors: gather them first (get_optimizer_"
                "state_dict with full_state_dict=True)"
            )
        shape = _shape_of(kind, saved, name)
        local = Local(torch.empty(shape, device="meta"), shape)
        _load_checks.arrays(kind, saved, local, name)
        none = Format(MasterWeights.NONE, _ops.StateCodec.FLOAT32, True)
        held = _packing.unpacked(kind, saved, local, none, stored[number], name)
        said = stored[number].dtype
        return State(held, shape, None if said is None else getattr(torch, said))

    return read_state


def _shape_of(kind: str, saved: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The parameter's shape, which its arrays have, but for those that lie in another order and are shown permuted."""
    arrays = [saved.get(slot + suffix) for slot in _ops.state_names(kind, True) for suffix in (CODES, "")]
    array = next((one for one in arrays if isinstance(one, Tensor)), None)
    if array is None:
        array = saved.get(CORRECTION)
        if not isinstance(array, Tensor):
            return ()
        if array.dtype == torch.uint8:  # two bytes an element
            return _unpermuted(saved, tuple(array.shape[:-1]), array.is_contiguous())
    return _unpermuted(saved, tuple(array.shape), array.is_contiguous())


def _unpermuted(saved: Mapping[str, Any], shape: tuple[int, ...], is_permuted: bool) -> tuple[int, ...]:
    order = saved.get(STORAGE_ORDER)
    if order is None or not is_permuted:
        return shape
    order = order.tolist() if isinstance(order, Tensor) else list(order)
    if sorted(order) != list(range(len(shape))):
        return shape  # refused where it is unpacked
    return tuple(shape[order.index(d)] for d in range(len(shape)))


# To our format


class Options(NamedTuple):
    """How a target stores what it is given."""

    #: Of a constructor: quantize, state_codec, master_weight_bits, min_quantized_numel, stochastic_rounding, seed, ...
    options: Mapping[str, Any]
    #: fp32 weights by number, of which corrections are made.
    weights: Mapping[Any, Tensor] | None
    #: The 16-bit dtype of parameters with corrections.
    dtype: torch.dtype | None


def write(checkpoint: Checkpoint, kind: str, how: Options, keep: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """What ``state_dict()`` of an optimizer that was loaded with this checkpoint would give.

    Args:
        keep: takes every tensor of the result, and gives it back, in other memory perhaps.
    """
    groups = live_groups(checkpoint, kind, how.options)
    states: dict[Any, Any] = {}
    stored: dict[Any, Stored] = {}
    weights: dict[Any, int] = {}
    for group in groups:
        for number in group["params"]:
            made = converted_state(checkpoint, kind, group, number, how)
            if made is None:
                continue
            held, dtype, narrow = made
            codec = _state_dict._CODEC_NAMES.get(_states.stored_codec(kind, held, _states.slots_in(kind, held)))
            has_correction = held.get(CORRECTION) is not None
            stored[number] = Stored(codec, str(dtype).removeprefix("torch.") if has_correction else None)
            if narrow is not None:
                weights[number] = int(_checksums.of_states({0: {"weight": narrow}}, 1)[0])
            shown = _packing.packed(held)
            states[number] = {key: keep(one) if isinstance(one, Tensor) else one for key, one in shown.items()}
    numbers = checkpoint.numbers
    shown_groups = []
    for group in groups:
        key = _groups.description_key(kind)
        options = {name: group[name] for name in _groups.PACKED_OPTIONS}
        said = _groups.describe(kind, options, [stored.get(number, Stored()) for number in group["params"]])
        shown_groups.append({**group, key: said})
    result: dict[str, Any] = {"state": states, "param_groups": shown_groups}
    result[_model_loads.KEY] = _weights_entry(checkpoint, numbers, weights, stored)
    result[_checksums.KEY] = _checksums.of_state_dict(_by_position(result, numbers), len(numbers))
    return result


def live_groups(checkpoint: Checkpoint, kind: str, options: Mapping[str, Any]) -> list[Any]:
    """Groups as an optimizer of this kind has them, its parameters' numbers in the place of the parameters."""
    cls = optimizer_class(kind)
    stubs = [
        {
            **{name: group[name] for name in _groups.PACKED_OPTIONS if name in group},
            "params": [torch.nn.Parameter(torch.empty(0, device="meta")) for _ in group["params"]],
            **options,
        }
        for group in checkpoint.groups
    ]
    optimizer = cls(stubs, **options)
    saved = [
        {key: value for key, value in group.items() if key not in options and key not in _groups.PACKED_OPTIONS}
        for group in checkpoint.groups
    ]
    merged = _state_dict.merged_groups(kind, optimizer.param_groups, saved)
    for group, old in zip(merged, checkpoint.groups):
        dict.__setitem__(group, "params", list(old["params"]))
    return merged


def converted_state(
    checkpoint: Checkpoint, kind: str, group: Mapping[str, Any], number: Any, how: Options
) -> tuple[dict[str, Any], torch.dtype, Tensor | None] | None:
    """A parameter's state in the group's formats, its dtype, and its 16-bit weights where there are fp32 ones."""
    state = checkpoint.read(number)
    fp32 = None if how.weights is None else how.weights.get(number)
    if state is None and fp32 is None:
        return None
    name = checkpoint.name_of(number)
    if state is None:
        assert fp32 is not None
        state = State({}, tuple(fp32.shape))
    if fp32 is not None and tuple(fp32.shape) != state.shape:
        raise ValueError(
            f"weights of {name} have shape {tuple(fp32.shape)}; allowed is that of its state, {state.shape}"
        )
    held = dict(state.held)
    belongs_to = state.dtype
    narrow = None
    correction = held.get(CORRECTION)
    if fp32 is not None:
        belongs_to = how.dtype or belongs_to or torch.bfloat16
        narrow = fp32.to(belongs_to)
        held.pop(CORRECTION, None)
    elif correction is not None and belongs_to is None:
        belongs_to = how.dtype
        if belongs_to is None:
            raise ValueError(
                f"the state of {name} has a correction, and nothing says which 16-bit dtype its weights have; give it "
                "as dtype="
            )
    # A parameter without correction: of which dtype it is changes nothing of its state.
    dtype = torch.float32 if belongs_to is None else belongs_to
    form = _states.format_of(torch.empty(state.shape, dtype=dtype, device="meta"), group)
    _check_correction(held, form, name)
    stub = torch.empty_strided(state.shape, _strides_of(kind, held, state.shape), dtype=dtype)
    local = Local(stub, state.shape)
    result = _states.converted(kind, held, local, form, name, belongs_to).state
    if number not in checkpoint.vouched:
        _load_checks.values(kind, result, local, form, name)
    if narrow is not None and form.master_weights in _ops.CORRECTION_DTYPES:
        assert fp32 is not None
        width = 2 + _ops.CORRECTION_DTYPES[form.master_weights].itemsize
        result[CORRECTION] = compute_ecc_bits(fp32.contiguous(), narrow.contiguous(), width)
    return result, dtype, narrow


def _strides_of(kind: str, held: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a state's first array, which are the parameter's: in another order than its dimensions, perhaps."""
    keys = (_states.key_of(held, slot) for slot in _ops.state_names(kind, True))
    for array in (held[key] for key in (*keys, CORRECTION) if key is not None and key in held):
        if tuple(array.shape) == shape and torch.ops.aten.is_non_overlapping_and_dense(array):
            return tuple(array.stride())
    return tuple(torch.empty(shape, device="meta").stride())


def _check_correction(held: Mapping[str, Any], form: Format, name: str) -> None:
    """Raises where a correction would have to be made of another one: that takes the weights."""
    correction = held.get(CORRECTION)
    if correction is None:
        return
    wanted = _ops.CORRECTION_DTYPES.get(form.master_weights)
    if wanted is not None and correction.dtype != wanted:
        raise ValueError(
            f"the correction of {name} is {correction.dtype}, and master_weight_bits asks for {wanted}; give the fp32 "
            "weights (fp32_weights()) as weights=, or keep master_weight_bits"
        )


def _weights_entry(
    checkpoint: Checkpoint, numbers: Sequence[Any], made: Mapping[Any, int], stored: Mapping[Any, Stored]
) -> Tensor:
    """Checksums of the 16-bit weights that corrections belong to; 0: not known."""
    saved = checkpoint.more.get(_model_loads.KEY)
    known = saved.tolist() if isinstance(saved, Tensor) and saved.shape == (len(numbers),) else [0] * len(numbers)
    sums = []
    for number, old in zip(numbers, known):
        has_correction = number in stored and stored[number].dtype is not None
        sums.append(made.get(number, old) if has_correction else 0)
    return torch.tensor(sums, dtype=torch.int64)


def _by_position(result: Mapping[str, Any], numbers: Sequence[Any]) -> dict[str, Any]:
    """The same with states by their parameters' places, as checksums count them."""
    states = {place: result["state"][number] for place, number in enumerate(numbers) if number in result["state"]}
    return {**result, "state": states}


__all__ = ["NAME", "Options", "converted_state", "has_checksums", "live_groups", "matches", "read", "write"]
