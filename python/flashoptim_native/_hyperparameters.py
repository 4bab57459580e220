"""The numbers that an update rule takes: read from the parameter groups at every step, checked where they changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from . import _offload, _ops, _validate
from ._groups import FORMAT_OPTIONS, ParamGroup, description_key
from ._records import Records


@functools.cache
def _options_of(kind: str) -> tuple[str, ...]:
    """What of a group decides the operators' numbers and formats, its learning rate apart."""
    names = dict.fromkeys((*FORMAT_OPTIONS, "decouple_lr"))
    for name in _ops.hyperparameter_names(kind):
        if name not in ("lr", "step"):
            names["betas" if name.removeprefix("beta").isdigit() else name] = None
    return tuple(names)


class _Read(NamedTuple):
    """A group as it was read. Looked at in every step, so without a line of Python for every option."""

    keys: list[str]
    look: Callable[[dict[str, Any]], tuple[Any, ...]]
    options: tuple[Any, ...]  # what ``look`` saw
    packed: dict[str, Any]  # a copy of the options under the group's one key
    can_change: bool  # without becoming other objects: always to be read again
    values: list[float]  # the operators' numbers
    format: list[Any]

    def is_as(self, group: ParamGroup, key: str) -> bool:
        return (
            not self.can_change
            and self.keys == list(group)
            and _are_same(tuple(self.packed.values()), tuple(group[key].values()))
            and _are_same(self.options, self.look(group))
        )


class Hyperparameters:
    """The operators' numbers of every group of an optimizer."""

    def __init__(self, kind: str, records: Records, check_numerics: bool = False) -> None:
        self._kind = kind
        self._check_numerics = check_numerics
        self._key = description_key(kind)
        self._records = records
        self._known: list[_Read | None] = []
        #: Of every group: the learning rate that is read on the device; None: the host's, among the numbers.
        self.lrs: list[Tensor | None] = []

    def read(self, groups: list[dict[str, Any]]) -> list[list[float]]:
        """The numbers of every group, checked; the step is still open."""
        if len(self.lrs) != len(groups):  # lrs last: an interrupt between the two has them made again
            self._known = [None] * len(groups)
            self.lrs = [None] * len(groups)
        return [self._read(groups, index) for index in range(len(groups))]

    def read_group(self, groups: list[dict[str, Any]], index: int) -> list[float]:
        """The numbers of one group, checked; the step is still open."""
        if len(self.lrs) != len(groups):
            self.read(groups)
        return self._read(groups, index)

    def lrs_on_device(self) -> Sequence[Tensor | None] | None:
        """``lrs``, if the device reads any."""
        return self.lrs if any(lr is not None for lr in self.lrs) else None

    def _read(self, groups: list[dict[str, Any]], index: int) -> list[float]:
        group = groups[index]
        if type(group) is not ParamGroup:  # somebody has put a group of their own there
            groups[index] = group = ParamGroup.of(self._kind, group)
        known = self._known[index]
        if known is None or not known.is_as(group, self._key):
            known = self._read_anew(group, index, known)
        values = known.values
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda and group["capturable"]:
            self.lrs[index] = _validate.check_lr_tensor(lr)
            values[0] = 0.0
        else:
            self.lrs[index] = None
            values[0] = lr if type(lr) is float and 0.0 <= lr < math.inf else _validate.check_range("lr", lr, 0.0)
        return values

    def _read_anew(self, group: ParamGroup, index: int, known: _Read | None) -> _Read:
        _validate.check_hyperparameters(self._kind, group)
        _validate.check_format(group)
        _offload.check_group(group, self._check_numerics)
        keys = list(group)
        # Two at least, for a tuple; none of these is packed.
        look = itemgetter("weight_decay", *(name for name in _options_of(self._kind) if name in keys))
        form = [group[name] for name in FORMAT_OPTIONS] + [bool(group.get("momentum")), group.get("offload")]
        can_change = any(_is_mutable(group.get(name)) for name in _options_of(self._kind))
        read = _Read(keys, look, look(group), dict(group[self._key]), can_change, _numbers(self._kind, group), form)
        if known is not None and known.format != form:
            self._records.forget_group(index)
        self._known[index] = read
        return read


def _are_same(known: Any, options: Any) -> bool:
    """Whether options are as they were, in type, too: 1 is no True."""
    if not isinstance(known, tuple) or not isinstance(options, tuple):
        return type(known) is type(options) and known == options
    if all(map(is_, known, options)):
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
    return [float(fields[name] or 0.0) for name in _ops.hyperparameter_names(kind)]


__all__ = ["Hyperparameters"]
