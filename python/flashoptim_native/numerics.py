"""What ``check_numerics=True`` does, and the counts behind ``optimizer.numerics_report()``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _collectives, _ops, _parameters
from ._ops import MasterWeights
from ._states import Format

#: Explicit mantissa bits of a stored weight, by parameter dtype and way of keeping the rest.
_MANTISSA_BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}
_CORRECTION_BITS = {MasterWeights.NONE: 0, MasterWeights.CORRECTION8_NEAREST: 8, MasterWeights.CORRECTION16_NEAREST: 16}
#: A step is said to move a weight for certain if it is this many spacings of its stored values or more.
_SPACINGS_NEEDED = 1 / 0.49
#: The share of lr that a step of a rule with a variance (Adam) is taken to have at least. Lion's is lr exactly, and
#: SGD's is taken as lr.
_STEP_SHARE = 0.1
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
    #: How many of them kept every bit. With nearest rounding such an update is lost; with unbiased rounding (the
    #: default codec's corrections, ``stochastic_rounding=True``) it is not: others round the other way.
    unchanged_weights: int
    #: States other than 0 that were stored as 0, in the sample. The default codec rounds small momentum up or down at
    #: random, without bias, and never a variance to 0; the paper's loses what it floors.
    floored_codes: int = 0
    #: States beyond the largest that their codec stores, in the sample.
    saturated_codes: int = 0
    #: The largest update in the sample over what the rule allows (Adam's and Lion's bounds: docs/numerics.md,
    #: "Telemetry").
    largest_update_ratio: float = 0.0
    #: The same for every parameter that was looked at, by name.
    parameters: dict[str, ParameterNumerics] = field(default_factory=dict)
    #: Whether these are counts of this process's shards alone: parameters are shards, and nothing is reduced.
    is_local: bool = False


@dataclass(frozen=True)
class ParameterNumerics:
    """One parameter's counts, in a sample of its groups (every one of them for small models)."""

    examined: int
    nonfinite_gradients: int
    lost_updates: int
    floored_codes: int
    saturated_codes: int
    largest_update_ratio: float


def summed_up(nonfinite: int, parameters: dict[str, ParameterNumerics], is_local: bool) -> NumericsReport:
    """The report of all parameters together."""
    each = parameters.values()
    return NumericsReport(
        nonfinite,
        sum(one.examined for one in each),
        sum(one.lost_updates for one in each),
        sum(one.floored_codes for one in each),
        sum(one.saturated_codes for one in each),
        max((one.largest_update_ratio for one in each), default=0.0),
        parameters,
        is_local,
    )


def reduced(report: NumericsReport, params: Sequence[tuple[str, Tensor]]) -> NumericsReport:
    """A local report summed over the meshes of the parameters, replicas once; all their processes call this.

    The number of non-finite gradients of all parameters together is counted by process, not by parameter: where one
    optimizer has parameters of different placements, replicas of some are counted each.
    """
    by_parts: dict[_collectives.Parts, list[str]] = {}
    for name, param in params:
        by_parts.setdefault(_collectives.parts_of(param), []).append(name)
    found: dict[str, ParameterNumerics] = {}
    for parts, names in by_parts.items():
        local = [astuple(report.parameters.get(name, _NOTHING)) for name in names]
        counts = _collectives.counts_over(parts, torch.tensor([one[:5] for one in local], dtype=torch.int64))
        ratios = torch.tensor([one[5] for one in local], dtype=torch.float32)
        largest = _collectives.largest_over_parts(parts, ratios)
        for name, numbers, ratio in zip(names, counts.tolist(), largest.tolist()):
            examined, bad, lost, floored, saturated = numbers
            found[name] = ParameterNumerics(examined, bad, lost, floored, saturated, ratio)
    everyone = _collectives.every_part(by_parts)
    nonfinite = _collectives.counts_over(everyone, torch.tensor([report.nonfinite_gradients], dtype=torch.int64))
    return summed_up(int(nonfinite), {name: one for name, one in found.items() if any(astuple(one))}, False)


_NOTHING = ParameterNumerics(0, 0, 0, 0, 0, 0.0)


def smallest_certain_step(largest_weight: float, dtype: torch.dtype, master_weights: MasterWeights) -> float:
    """The step that surely changes a stored weight as large as ``largest_weight``, with rounding to nearest."""
    bits = _MANTISSA_BITS[dtype] + _CORRECTION_BITS[master_weights]
    _, exponent = math.frexp(largest_weight)
    return math.ldexp(_SPACINGS_NEEDED, exponent - 1 - bits)


#: int64 numbers of one parameter's telemetry: StepTelemetry of include/flashoptim/telemetry.h.
_TELEMETRY_NUMBERS = 6


class _Table(NamedTuple):
    """Telemetry of the parameters of one plan, counted on its device."""

    names: list[str]
    counts: Tensor  # int64 [parameters, 6]


class NumericsMonitor:
    """Counts non-finite gradients of every step and, if asked to check, what updates lose, in a sample."""

    def __init__(self) -> None:
        self.nonfinite: dict[torch.device, Tensor] = {}
        self.largest: dict[int, float] = {}
        self.tables: dict[Any, _Table] = {}
        self.settled: dict[str, ParameterNumerics] = {}

    def counter(self, device: torch.device) -> Tensor:
        """What a step on ``device`` adds its count of non-finite gradient elements to."""
        counter = self.nonfinite.get(device)
        if counter is None:
            counter = self.nonfinite[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return counter

    def stride(self, params: Iterable[Tensor]) -> int:
        """Which share of the groups is looked at: all of a small model, every 64th of another, others at every step."""
        elements = sum(param.numel() for param in params if not torch.nn.parameter.is_lazy(param))
        return 1 if elements <= _SMALL_MODEL else _STRIDE

    def table(self, key: Any, names: Callable[[], list[str]], device: torch.device) -> Tensor:
        """What a step adds the telemetry of the parameters ``names`` to; ``key`` stands for them."""
        table = self.tables.get(key)
        if table is None:
            if len(self.tables) >= _MOST_KEPT:
                self._settle()
            found = names()
            counts = torch.zeros((len(found), _TELEMETRY_NUMBERS), dtype=torch.int64, device=device)
            table = self.tables[key] = _Table(found, counts)
        return table.counts

    def reset(self) -> None:
        """Starts all counts anew, in place: a captured CUDA graph goes on counting into the same tensors."""
        for counter in self.nonfinite.values():
            counter.zero_()
        for table in self.tables.values():
            table.counts.zero_()
        self.settled = {}

    def _settle(self) -> None:
        """Adds up the tables in ``settled``; those of plans that are gone need no memory then. Waits for the device."""
        self._add_tables_to(self.settled)
        self.tables = {}

    def _parameters(self) -> dict[str, ParameterNumerics]:
        """Every parameter's counts so far. Waits for the device."""
        found = dict(self.settled)
        self._add_tables_to(found)
        return {name: one for name, one in found.items() if any(astuple(one))}

    def _add_tables_to(self, found: dict[str, ParameterNumerics]) -> None:
        for names, counts in self.tables.values():
            table = counts.cpu()
            ratios = table.view(torch.float32)[:, 10].tolist()
            for name, numbers, ratio in zip(names, table[:, :5].tolist(), ratios):
                old = found.get(name, _NOTHING)
                examined, nonfinite, lost, floored, saturated = (a + b for a, b in zip(numbers, astuple(old)))
                largest = max(ratio, old.largest_update_ratio)
                found[name] = ParameterNumerics(examined, nonfinite, lost, floored, saturated, largest)

    def report(self, is_local: bool = False) -> NumericsReport:
        count = sum(int(counter.item()) for counter in self.nonfinite.values())
        return summed_up(count, self._parameters(), is_local)

    def check_learning_rate(self, kind: str, param: Tensor, name: str, form: Format, lr: float) -> None:
        """Raises NumericsError where a step of ``lr`` may round away on a parameter's largest weight."""
        if lr == 0.0 or param.numel() == 0 or form.master_weights not in _CORRECTION_BITS:
            return
        largest = self.largest.get(id(param))
        if largest is None:
            largest = self.largest[id(param)] = _collectives.largest_magnitude(param)
        if largest == 0.0 or not math.isfinite(largest):
            return
        needed = smallest_certain_step(largest, param.dtype, form.master_weights)
        has_variance = not all(slot.is_signed for slot in _ops.describe(kind).slots)
        taken = lr * (_STEP_SHARE if has_variance else 1.0)
        if needed > taken:
            bits = _CORRECTION_BITS[form.master_weights]
            whose = " of all processes' shards" if _parameters.is_sharded(param) else ""
            raise NumericsError(
                f"lr = {lr:.3g} is too small for {name}: its largest weight{whose} is {largest:.6g}, and of a "
                f"{param.dtype} weight with {bits} bits of correction rounded to nearest only steps from {needed:.3g} "
                f"up are sure to change it; this step counts on {taken:.3g}. Raise lr, or keep more bits "
                "(master_weight_bits), or round without bias (state_codec='default'; stochastic_rounding=True where "
                "master_weight_bits is None), or set check_numerics=False. Weights are measured at the first step, "
                "after load_state_dict() and by recompute_param_stats()"
            )


__all__ = ["NumericsError", "NumericsMonitor", "NumericsReport", "ParameterNumerics", "smallest_certain_step"]
