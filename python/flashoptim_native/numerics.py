"""What ``check_numerics=True`` does, and the counts behind ``optimizer.numerics_report()``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._ops import MasterWeights
from ._states import ordered, storage_order

if TYPE_CHECKING:
    from ._plan import Call, Entry
    from ._prepared import Prepared

#: Explicit mantissa bits of a stored weight, by parameter dtype and way of keeping the rest.
_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
_CORRECTION_BITS = {MasterWeights.NONE: 0, MasterWeights.CORRECTION8_NEAREST: 8, MasterWeights.CORRECTION16_NEAREST: 16}
#: A step is said to move a weight for certain if it is this many spacings of its stored values or more.
_SPACINGS_NEEDED = 1 / 0.49
#: The share of lr that a step of Adam is taken to have at least; Lion's is lr exactly, SGD's is taken as lr.
_STEP_SHARE = {"adamw": 0.1, "adam": 0.1}
_SAMPLE_SIZE = 4096
#: Elements up to which check_numerics looks at every group, and the share it looks at beyond: 1 / stride.
_SMALL_MODEL = 1 << 20
_STRIDE = 64
_MOST_KEPT = 16


class NumericsError(RuntimeError):
    """The learning rate is too small for the precision of the weights: updates would round away."""


@dataclass(frozen=True)
class NumericsReport:
    """Counts since the optimizer was made or :meth:`reset_numerics` was called."""

    #: Elements of gradients that were NaN or infinite.
    nonfinite_gradients: int
    #: Weights looked at before and after a step, with a gradient other than zero (``check_numerics=True`` only).
    sampled_updates: int
    #: How many of them kept every bit. With nearest rounding such an update is lost; with unbiased rounding (the default
    #: codec's corrections, ``stochastic_rounding=True``) it is not: others round the other way.
    unchanged_weights: int
    #: States other than 0 that were stored as 0, in the sample. The default codec rounds small momentum up or down at random,
    #: without bias, and never a variance to 0; the paper's loses what it floors.
    floored_codes: int = 0
    #: States beyond the largest that their codec stores, in the sample.
    saturated_codes: int = 0
    #: The largest update in the sample over what the rule allows (Adam's and Lion's bounds: docs/numerics.md, "Telemetry").
    largest_update_ratio: float = 0.0
    #: The same for every parameter that was looked at, by name.
    parameters: dict[str, ParameterNumerics] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterNumerics:
    """One parameter's counts, in a sample of its groups (every one of them for small models)."""

    examined: int
    nonfinite_gradients: int
    lost_updates: int
    floored_codes: int
    saturated_codes: int
    largest_update_ratio: float


def smallest_certain_step(largest_weight: float, dtype: torch.dtype, master_weights: MasterWeights) -> float:
    """The step that surely changes a stored weight as large as ``largest_weight``, with rounding to nearest."""
    bits = _MANTISSA_BITS[dtype] + _CORRECTION_BITS[master_weights]
    _, exponent = math.frexp(largest_weight)
    return math.ldexp(_SPACINGS_NEEDED, exponent - 1 - bits)


class NumericsMonitor:
    """Counts non-finite gradients of every step and, if asked to check, lost updates on a sample."""

    def __init__(self) -> None:
        self.nonfinite: dict[torch.device, Tensor] = {}
        self.largest: dict[int, float] = {}
        self.turn = 0
        self.sampled = 0
        self.unchanged = 0
        self.kept: list[tuple[list[str], Tensor]] = []
        self.settled: dict[str, ParameterNumerics] = {}

    def counter(self, device: torch.device) -> Tensor:
        """What a step on ``device`` adds its count of non-finite gradient elements to."""
        counter = self.nonfinite.get(device)
        if counter is None:
            counter = self.nonfinite[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return counter

    def stride(self, prepared: Iterable[Prepared]) -> int:
        """Which share of the groups is looked at: all of a small model, every 64th of another, others at every step."""
        elements = sum(param.numel() for one in prepared for param in one.params)
        return 1 if elements <= _SMALL_MODEL else _STRIDE

    def keep(self, prepared: Prepared) -> None:
        """Takes over the telemetry of a Prepared that ends."""
        if prepared.telemetry is not None:
            self.kept.append(([entry.name for entry in prepared.entries], prepared.telemetry))
            if len(self.kept) > _MOST_KEPT:
                self.settled = self._parameters([])
                self.kept = []

    def _parameters(self, prepared: Iterable[Prepared]) -> dict[str, ParameterNumerics]:
        """Every parameter's counts so far. Waits for the device."""
        found = dict(self.settled)
        live = [([entry.name for entry in one.entries], one.telemetry) for one in prepared if one.telemetry is not None]
        for names, telemetry in [*self.kept, *live]:
            table = telemetry.cpu()
            ratios = table.view(torch.float32)[:, 10].tolist()
            for name, counts, ratio in zip(names, table[:, :5].tolist(), ratios):
                old = found.get(name, ParameterNumerics(0, 0, 0, 0, 0, 0.0))
                sums = [a + b for a, b in zip(counts, astuple(old)[:5])]
                found[name] = ParameterNumerics(*sums, max(ratio, old.largest_update_ratio))
        return found

    def report(self, prepared: Iterable[Prepared] = ()) -> NumericsReport:
        count = sum(int(counter.item()) for counter in self.nonfinite.values())
        parameters = self._parameters(prepared)
        each = parameters.values()
        return NumericsReport(
            count,
            self.sampled + sum(one.examined for one in each),
            self.unchanged + sum(one.lost_updates for one in each),
            sum(one.floored_codes for one in each),
            sum(one.saturated_codes for one in each),
            max((one.largest_update_ratio for one in each), default=0.0),
            parameters,
        )

    def check_learning_rates(self, kind: str, entries: Iterable[Entry], lrs: list[float]) -> None:
        """Raises NumericsError where a step of a group's lr may round away on a parameter's largest weight."""
        for entry in entries:
            lr, param = lrs[entry.group], entry.param
            if lr == 0.0 or param.numel() == 0 or entry.form.master_weights not in _CORRECTION_BITS:
                continue
            largest = self.largest.get(id(param))
            if largest is None:
                largest = self.largest[id(param)] = largest_magnitude(param)
            if largest == 0.0 or not math.isfinite(largest):
                continue
            needed = smallest_certain_step(largest, param.dtype, entry.form.master_weights)
            taken = lr * _STEP_SHARE.get(kind, 1.0)
            if needed > taken:
                bits = _CORRECTION_BITS[entry.form.master_weights]
                raise NumericsError(
                    f"lr = {lr:.3g} is too small for {entry.name}: its largest weight is {largest:.6g}, and of a "
                    f"{param.dtype} weight with {bits} bits of correction rounded to nearest only steps from {needed:.3g} up "
                    f"are sure to change it; this step counts on {taken:.3g}. Raise lr, or keep more bits "
                    "(master_weight_bits), or round without bias (state_codec='default'; stochastic_rounding=True where "
                    "master_weight_bits is None), or set check_numerics=False. Weights are measured at the first step, after "
                    "load_state_dict() and by recompute_param_stats()"
                )

    def sample_before(self, calls: list[Call]) -> _Sample | None:
        """A sample of one parameter, a different one at every step."""
        total = sum(len(call.entries) for call in calls)
        if total == 0:
            return None
        self.turn += 1
        index = self.turn % total
        for call in calls:
            if index < len(call.entries):
                return _Sample(call, index)
            index -= len(call.entries)
        return None

    def sample_after(self, sample: _Sample | None) -> None:
        if sample is None:
            return
        looked_at, unchanged = sample.compare()
        self.sampled += looked_at
        self.unchanged += unchanged


class _Sample:
    """Some weights of one tensor of a call, remembered over the step."""

    def __init__(self, call: Call, index: int) -> None:
        has_correction = call.entries[index].form.master_weights > MasterWeights.NONE_STOCHASTIC
        self.stored = [call.params[index]] + ([call.corrections[index]] if has_correction else [])
        self.before = [_pick(tensor).clone() for tensor in self.stored]
        self.moves = _pick(call.grads[index]) != 0

    def compare(self) -> tuple[int, int]:
        same = self.moves.clone()
        for before, stored in zip(self.before, self.stored):
            same &= before == _pick(stored)
        return int(self.moves.sum()), int(same.sum())


def _pick(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    flat = (tensor if tensor.is_contiguous() else ordered(tensor, storage_order(tensor))).reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE_SIZE)]


def largest_magnitude(param: Tensor) -> float:
    if param.numel() == 0:
        return 0.0
    smallest, largest = torch.aminmax(param.detach())
    return max(abs(float(smallest)), abs(float(largest)))


__all__ = ["NumericsError", "NumericsMonitor", "NumericsReport", "ParameterNumerics", "smallest_certain_step"]
