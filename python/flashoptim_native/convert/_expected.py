"""What a conversion would give, without writing it: bytes, and how far values would be from those of the source."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _packing, _states
from .._states import CORRECTION
from ..weights import reconstruct_fp32_param
from . import _files, ours, torch_optim, weights
from ._checkpoint import Checkpoint


class SlotError(NamedTuple):
    """The error of one state of all parameters, or of the weights (``"weights"``)."""

    slot: str
    elements: int
    #: Root mean square of the differences over that of the source's values; 0: every value stays as it is.
    rms: float
    #: Largest |difference| over |value|, of values other than 0 that do not become 0.
    largest: float
    #: Values other than 0 that become 0.
    zeroed: int
    #: Finite values that become infinite.
    overflowed: int


class Expected(NamedTuple):
    """What a conversion would give."""

    #: Whose the source is: "torch", "bitsandbytes", ..., or "weights".
    source: str
    #: The optimizer's kind; empty for weights.
    optimizer: str
    parameters: int
    #: Of the tensors of source and target. A file has some more: names, groups, checksums.
    source_bytes: int
    target_bytes: int
    errors: list[SlotError]


class _ErrorSum:
    """The error of a slot, parameter by parameter."""

    def __init__(self) -> None:
        self.elements = self.zeroed = self.overflowed = 0
        self.differences = self.squares = self.largest = 0.0

    def add(self, before: Tensor, after: Tensor) -> None:
        before, after = before.flatten().to(torch.float32), after.flatten().to(torch.float32)
        self.elements += before.numel()
        lost = torch.isinf(after) & torch.isfinite(before)
        self.overflowed += int(lost.sum())
        is_finite = torch.isfinite(before) & torch.isfinite(after)
        before, after = before[is_finite], after[is_finite]
        difference = before.double() - after.double()
        self.differences += float(difference.square().sum())
        self.squares += float(before.double().square().sum())
        is_zeroed = (before != 0) & (after == 0)
        self.zeroed += int(is_zeroed.sum())
        kept = (before != 0) & ~is_zeroed
        if kept.any():
            self.largest = max(self.largest, float((difference[kept].abs() / before[kept].double().abs()).max()))

    def result(self, slot: str) -> SlotError:
        rms = math.sqrt(self.differences / self.squares) if self.squares else 0.0
        return SlotError(slot, self.elements, rms, self.largest, self.zeroed, self.overflowed)


def of_states(checkpoint: Checkpoint, kind: str, to: str, how: ours.Options, source_bytes: int) -> Expected:
    """Every state is read, converted and compared in turn, so that one parameter's memory is enough.

    Raises:
        TypeError, ValueError: as the conversion.
    """
    if to == "torch":
        torch_optim.check_kind(kind)
    sums: dict[str, _ErrorSum] = {}
    target_bytes = 0
    for group in ours.live_groups(checkpoint, kind, how.options):
        for number in group["params"]:
            state = checkpoint.read(number)
            held = {} if state is None else state.held
            slots = _states.slots_in(kind, held)
            values = dict(zip(slots, _states.decode(kind, held, slots)))
            if to == "torch":
                if state is None:
                    continue
                target_bytes += _files.bytes_in(torch_optim.state_of(kind, {**held, **values}, ""))
                after = values
            else:
                converted = ours.converted_state(checkpoint, kind, group, number, how)
                if converted is None:
                    continue
                made: dict[str, Any] = converted[0]
                narrow = converted[2]
                target_bytes += _files.bytes_in(_packing.packed(made))
                after = dict(zip(slots, _states.decode(kind, made, slots)))
                fp32 = None if how.weights is None else how.weights.get(number)
                if narrow is not None and fp32 is not None:
                    _add_weights(sums, fp32, narrow, made.get(CORRECTION))
            for slot in slots:
                sums.setdefault(slot, _ErrorSum()).add(values[slot], after[slot])
    errors = [one.result(slot) for slot, one in sums.items()]
    return Expected(checkpoint.source, kind, len(checkpoint.numbers), source_bytes, target_bytes, errors)


def _add_weights(sums: dict[str, _ErrorSum], fp32: Tensor, narrow: Tensor, correction: Tensor | None) -> None:
    kept = narrow if correction is None else reconstruct_fp32_param(narrow.contiguous(), correction.contiguous())
    sums.setdefault("weights", _ErrorSum()).add(fp32, kept)


def of_weights(
    loaded: Mapping[str, Tensor],
    checkpoint: Checkpoint | None,
    names: Any,
    dtype: torch.dtype | None,
    keep_fp32: Callable[[str], bool],
    done: Callable[[int], None],
) -> Expected:
    """Weights rounded to ``dtype``, or (None) merged with the corrections of a checkpoint, which is exact.

    Raises:
        TypeError, ValueError: as the conversion.
    """
    total = _ErrorSum()
    target_bytes = 0
    if dtype is not None:
        items = weights.narrowed(loaded, dtype, keep_fp32)
    else:
        assert checkpoint is not None
        items = weights.merged(loaded, checkpoint, names)
    for name, value in items:
        target_bytes += value.nbytes
        if dtype is not None and loaded[name].is_floating_point():
            total.add(loaded[name], value)
        done(loaded[name].nbytes)
    errors = [] if dtype is None else [total.result("weights")]
    return Expected("weights", "", len(loaded), _files.bytes_in(dict(loaded)), target_bytes, errors)


__all__ = ["Expected", "SlotError", "of_states", "of_weights"]
