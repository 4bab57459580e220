"""The numbers that an update rule takes: read from the parameter groups at every step, checked where they changed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from . import _ops, _validate
from ._groups import FORMAT_OPTIONS, ParamGroup
from ._store import Store

_OPTIONS = (
    *FORMAT_OPTIONS,
    *("betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "maximize", "decouple_lr", "seed"),
)
_OPTIONS_WITH_DECAY = (*_OPTIONS, "decay_lr")


class Hyperparameters:
    """The operators' numbers of every group of an optimizer."""

    def __init__(self, kind: str, store: Store) -> None:
        self._kind = kind
        self._store = store
        # Of every group: options as they were read (None: read them again), the operators' numbers, the formats.
        self._known: list[tuple[Any, list[float], Any]] = []
        #: Of every group: the learning rate that is read on the device; None: the host's, among the numbers.
        self.lrs: list[Tensor | None] = []

    def read(self, groups: list[dict[str, Any]]) -> list[list[float]]:
        """The numbers of every group, checked; the step is still open."""
        if len(self._known) != len(groups):
            self._known = [(None, [], None)] * len(groups)
            self.lrs = [None] * len(groups)
        for index in range(len(groups)):
            self._read(groups, index)
        return [values for _, values, _ in self._known]

    def read_group(self, groups: list[dict[str, Any]], index: int) -> list[float]:
        """The numbers of one group, checked; the step is still open."""
        if len(self._known) != len(groups):
            self.read(groups)
        return self._read(groups, index)

    def lrs_on_device(self) -> Sequence[Tensor | None] | None:
        """``lrs``, if the device reads any."""
        return self.lrs if any(lr is not None for lr in self.lrs) else None

    def _read(self, groups: list[dict[str, Any]], index: int) -> list[float]:
        group = groups[index]
        if type(group) is not ParamGroup:  # somebody has put a group of their own there
            groups[index] = group = ParamGroup.of(self._kind, group)
        options = [group.get(name) for name in (_OPTIONS_WITH_DECAY if "decay_lr" in group else _OPTIONS)]
        known, values, form = self._known[index]
        if known is None or not _are_same(known, options):
            _validate.check_hyperparameters(group)
            _validate.check_format(group)
            values = _numbers(self._kind, group)
            now = _format_of(options)
            if form is not None and form != now:
                self._store.forget_group(index)
            self._known[index] = (None if any(map(_is_mutable, options)) else options, values, now)
        _validate.check_bool("capturable", group["capturable"])
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda and group["capturable"]:
            self.lrs[index] = _validate.check_lr_tensor(lr)
            values[0] = 0.0
        else:
            self.lrs[index] = None
            values[0] = lr if type(lr) is float and 0.0 <= lr < math.inf else _validate.check_range("lr", lr, 0.0)
        return values


def _format_of(options: list[Any]) -> list[Any]:
    """What of a group's options decides how its parameters are stored."""
    by_name = dict(zip(_OPTIONS, options))
    return [by_name[name] for name in FORMAT_OPTIONS] + [bool(by_name["momentum"])]


def _are_same(known: list[Any], options: list[Any]) -> bool:
    """Whether options are as they were, in type, too: 1 is no True."""
    if all(map(operator.is_, known, options)):
        return len(known) == len(options)
    return len(known) == len(options) and all(
        a is b or (type(a) is type(b) and not isinstance(a, Tensor) and a == b) for a, b in zip(known, options)
    )


def _is_mutable(option: Any) -> bool:
    """Whether an option can change without becoming another object."""
    if isinstance(option, tuple):
        return any(map(_is_mutable, option))
    return isinstance(option, (Tensor, list))


def _numbers(kind: str, group: Mapping[str, Any]) -> list[float]:
    """A set of the operators' hypers, in their order (include/flashoptim/optimizer_info.h), the step still open."""
    fields = dict(group, step=0.0, decay_lr=group["decay_lr"] if group.get("decouple_lr") else 0.0)
    for number, beta in enumerate(group.get("betas", ()), 1):
        fields[f"beta{number}"] = beta
    return [float(fields[name]) for name in _ops.hyperparameter_names(kind)]


__all__ = ["Hyperparameters"]
