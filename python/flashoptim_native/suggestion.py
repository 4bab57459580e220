"""suggest_policy(): which parameters need another format, by what real steps lost, and the cheapest that mends each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import _parameters, _states, _validate
from ._ops import MasterWeights, StateCodec
from ._states import Format
from .description import bytes_of
from .numerics import ParameterNumerics
from .optimizer import FlashOptimizer

#: Ways of keeping a weight that round to nearest: an update below half a spacing is lost, at every step anew.
_NEAREST = (MasterWeights.NONE, MasterWeights.CORRECTION8_NEAREST, MasterWeights.CORRECTION16_NEAREST)


class SuggestedFormat(NamedTuple):
    """What one parameter needs."""

    name: str
    #: What its steps lost: "lost", "floored", "saturated", "ratio", with the numbers behind it.
    reasons: dict[str, float]
    #: The options of a group that mend it.
    options: dict[str, Any]
    #: Of parameter, correction and states, as they are and with ``options``; without gradients.
    bytes_now: int
    bytes_then: int


class PolicySuggestion(dict[str, dict[str, Any]]):
    """``{pattern: options}`` as ``policy=`` takes it, empty where nothing is amiss; ``str()`` is a table."""

    def __init__(self, rows: list[SuggestedFormat]) -> None:
        self.rows = rows
        # fnmatch's own signs in a name stand for themselves.
        super().__init__((row.name.replace("[", "[[]"), row.options) for row in rows)

    @property
    def bytes(self) -> int:
        """What all of it takes more than now; less than 0: it takes less."""
        return sum(row.bytes_then - row.bytes_now for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to change: no parameter lost more than is allowed"
        lines = [("parameter", "found", "options", "bytes now", "then", "more")]
        for row in self.rows:
            found = ", ".join(f"{name} {value:.3g}" for name, value in row.reasons.items())
            options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
            more = f"{row.bytes_then - row.bytes_now:+,}"
            lines.append((row.name, found, options, f"{row.bytes_now:,}", f"{row.bytes_then:,}", more))
        lines.append(("all", "", "", "", "", f"{self.bytes:+,}"))
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 3 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        )


def suggest_policy(
    optimizer: FlashOptimizer, *, lost: float = 0.5, floored: float = 0.05, ratio: float = 2.5
) -> PolicySuggestion:
    """Formats for the parameters whose steps lost something, by the counts of ``optimizer.numerics_report()``.

    Take some steps of real training with ``check_numerics=True`` first; ``reset_numerics()`` leaves the first ones out.
    Nothing is changed: print what is suggested, and make the optimizer with ``policy=`` of it; ``load_state_dict()``
    converts the states.

    Only what is lost counts. A code or an update that is rounded without bias (the default codec's, stochastic
    rounding's) is right on average, and asks nothing. The cheapest of the options that mend is taken:

    ===========  ============================================  ====================================================
    found        what it means                                 what mends it, the cheapest first
    ===========  ============================================  ====================================================
    lost         updates too small for weights that are        ``stochastic_rounding=True`` (without corrections);
                 rounded to nearest                            ``state_codec="default"``, which rounds without bias
    floored      states that became 0 in the paper's codec     ``state_codec="default"``
    saturated    states above the largest of their codec       the paper's: ``state_codec="default"``; else
                                                               ``quantize=False``
    ratio        updates above the rule's bound, which         the same
                 come of coarse variances
    ===========  ============================================  ====================================================

    Args:
        lost: share of updates that may be lost.
        floored: share of codes that may become 0 in the paper's codec.
        ratio: of the largest update over the rule's bound; exact Adam reaches 2.3 (docs/numerics.md, "Telemetry").

    Raises:
        TypeError: ``optimizer`` is none of this package.
        ValueError: it has no counts (``check_numerics=False``, or no step yet), its parameters have no names, or a
            limit is out of range.
    """
    if not isinstance(optimizer, FlashOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed is an optimizer of this package")
    limits = {"lost": lost, "floored": floored, "ratio": ratio}
    for name, value in limits.items():
        _validate.check_range(name, value, 0.0)
    counts = optimizer.numerics_report().parameters
    if not counts:
        raise ValueError(
            "the optimizer has no counts of its parameters; allowed is one that has taken steps with "
            "check_numerics=True since it was made or reset_numerics() was called"
        )
    rows = []
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            found = counts.get(_parameters.name_of(optimizer.param_groups, index, position))
            if found is None or found.examined == 0:
                continue
            names = group.get("param_names")
            if names is None:
                raise ValueError(
                    "policy goes by the names of parameters, and these have none; allowed is an optimizer that was "
                    "made of model.named_parameters()"
                )
            row = _suggested(optimizer.kind, names[position], param, group, found, limits)
            if row is not None:
                rows.append(row)
    return PolicySuggestion(rows)


def _suggested(
    kind: str,
    name: str,
    param: Tensor,
    group: Mapping[str, Any],
    found: ParameterNumerics,
    limits: Mapping[str, float],
) -> SuggestedFormat | None:
    form = _states.format_of(param, group)
    reasons = _reasons(kind, form, found, limits)
    if not reasons:
        return None
    now = bytes_of(kind, param, form)
    best: SuggestedFormat | None = None
    for options in _candidates(group):
        there = _states.format_of(param, {**{key: group[key] for key in _OPTIONS}, **_momentum(group), **options})
        if not all(_mends(reason, form, there) for reason in reasons):
            continue
        then = bytes_of(kind, param, there)
        if best is None or then < best.bytes_then:
            best = SuggestedFormat(name, reasons, options, now, then)
    return best


_OPTIONS = ("quantize", "state_codec", "master_weight_bits", "min_quantized_numel", "stochastic_rounding")


def _momentum(group: Mapping[str, Any]) -> dict[str, Any]:
    return {"momentum": group["momentum"]} if "momentum" in group else {}


def _reasons(kind: str, form: Format, found: ParameterNumerics, limits: Mapping[str, float]) -> dict[str, float]:
    """What of the counts is a loss in this format, by name."""
    reasons: dict[str, float] = {}
    codes = found.examined * max(1, len(_states.slots_of(kind, form)))
    lost = found.lost_updates / found.examined
    floored = found.floored_codes / codes
    if form.master_weights in _NEAREST and lost > limits["lost"]:
        reasons["lost"] = lost
    if form.codec == StateCodec.PAPER and floored > limits["floored"]:
        reasons["floored"] = floored
    if form.codec != StateCodec.FLOAT32:
        if found.saturated_codes > 0:
            reasons["saturated"] = float(found.saturated_codes)
        if found.largest_update_ratio > limits["ratio"]:
            reasons["ratio"] = found.largest_update_ratio
    return reasons


def _candidates(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Options to try, those that change least first."""
    weights: list[dict[str, Any]] = [{}]
    if group["master_weight_bits"] is None:
        weights += [{"stochastic_rounding": True}, {"master_weight_bits": 24, "stochastic_rounding": False}]
    states: list[dict[str, Any]] = [{}]
    if group["state_codec"] != "default":
        states.append({"state_codec": "default"})
    states.append({"quantize": False})
    states.append({"quantize": False, "state_codec": "default"})
    return [{**a, **b} for b in states for a in weights if a or b]


def _mends(reason: str, now: Format, then: Format) -> bool:
    """Whether what was lost in one format cannot be in the other."""
    if reason == "lost":
        return then.master_weights not in _NEAREST
    if reason == "floored" or now.codec == StateCodec.PAPER:
        return then.codec != StateCodec.PAPER
    return then.codec == StateCodec.FLOAT32


__all__ = ["PolicySuggestion", "SuggestedFormat", "suggest_policy"]
