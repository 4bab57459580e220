"""An optimizer's checkpoint without its optimizer, whoever wrote it: what every reader gives and every writer takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops, _states, optimizers
from .._states import STEP
from ..optimizer import FlashOptimizer

#: Hyperparameters that readers hand on under these names; what else a group of somebody's holds is their own affair.
_OF_GROUPS = ("lr", "initial_lr", "weight_decay", "maximize", "param_names")
_NARROW = (torch.bfloat16, torch.float16)


class State(NamedTuple):
    """One parameter's state, in what ``optimizer.state`` of ours can hold, in any of its formats."""

    #: ``step``, and for every slot fp32 values, or codes and scales; ``correction``, if there is one.
    held: dict[str, Any]
    #: Of the parameter.
    shape: tuple[int, ...]
    #: The 16-bit dtype that the correction belongs to; None: there is none, or nothing says it.
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Checkpoint:
    """What a reader makes of a state dict. States are read, and decoded, one by one when they are asked for."""

    #: Whose it is: "torch", "reference", ...
    source: str
    #: The optimizer's ``kind``; None: the checkpoint does not tell.
    kind: str | None
    #: Hyperparameters under the names of :class:`FlashOptimizer`, and ``params``, the parameters by number or name.
    groups: list[dict[str, Any]]
    #: A parameter's state; None: it has none, as it was frozen, or has taken no step.
    read: Callable[[Any], State | None]
    #: Optimizers that the states may be of where ``kind`` is None.
    candidates: tuple[str, ...] = ()
    #: Entries of ours beside states and groups.
    more: dict[str, Any] = field(default_factory=dict)
    #: Parameters whose states are as their checksums say.
    vouched: frozenset[Any] = frozenset()

    def counted(self, sizes: Mapping[Any, int], done: Callable[[int], None]) -> Checkpoint:
        """The same; ``done`` is told of a parameter's bytes when its state is read for the first time."""
        left = dict(sizes)

        def read(number: Any) -> State | None:
            done(left.pop(number, 0))
            return self.read(number)

        return replace(self, read=read)

    @property
    def numbers(self) -> list[Any]:
        return [number for group in self.groups for number in group["params"]]

    def kind_as(self, optimizer: str | None) -> str:
        """The optimizer, which ``optimizer`` says where the checkpoint does not.

        Raises:
            ValueError: nobody says it, or they differ.
        """
        if optimizer is not None and optimizer not in _ops.optimizer_names():
            allowed = ", ".join(map(repr, _ops.optimizer_names()))
            raise ValueError(f"optimizer = {optimizer!r} is not allowed; allowed are {allowed}")
        if self.kind is not None:
            if optimizer not in (None, self.kind):
                raise ValueError(
                    f"optimizer = {optimizer!r}, but the checkpoint is {self.kind}'s; allowed is {self.kind!r}, or None"
                )
            return self.kind
        allowed = " or ".join(map(repr, self.candidates))
        if optimizer is None:
            raise ValueError(f"the checkpoint does not say whether it is of {allowed}; give it as optimizer=")
        if optimizer not in self.candidates:
            raise ValueError(
                f"optimizer = {optimizer!r} does not go with the checkpoint's states; allowed is {allowed}"
            )
        return optimizer

    def name_of(self, number: Any) -> str:
        return f"parameter {number!r} of the checkpoint"


def optimizer_class(kind: str) -> type[FlashOptimizer]:
    """FlashAdamW of "adamw", ..."""
    return next(
        cls
        for cls in (getattr(optimizers, name) for name in optimizers.__all__)
        if isinstance(cls, type) and issubclass(cls, FlashOptimizer) and getattr(cls, "kind", None) == kind
    )


def group_of(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A saved group's hyperparameters: those that all have, and ``names``; tensors of one element as numbers."""
    result: dict[str, Any] = {"params": list(group["params"])}
    for name in (*_OF_GROUPS, *names):
        if name in group:
            value = group[name]
            if isinstance(value, Tensor) and value.numel() == 1:
                value = value.item()
            elif isinstance(value, (list, tuple)) and name == "betas":
                value = tuple(float(one) for one in value)
            result[name] = value
    return result


def check_known(saved: Mapping[str, Any], known: Collection[str], number: Any, writer: str) -> None:
    """Raises ValueError where a state holds other entries than those that ``writer`` writes."""
    unknown = sorted(str(key) for key in set(saved) - set(known))
    if unknown:
        raise ValueError(f"the state of parameter {number!r} holds {', '.join(unknown)}, which {writer} does not write")


def step_in(saved: Mapping[str, Any], number: Any) -> int:
    """Raises ValueError where a state has no step count, or one that is no count."""
    if STEP not in saved:
        raise missing(STEP, number, saved)
    return _states.whole_number(saved[STEP], f"parameter {number!r}")


def missing(what: str, number: Any, held: Mapping[Any, Any]) -> ValueError:
    """What a reader raises for a state that lacks something."""
    return ValueError(
        f"the state of parameter {number!r} lacks {what}; it holds {', '.join(sorted(map(str, held))) or 'nothing'}"
    )


def tensor(value: Any, key: str, number: Any, dtypes: Sequence[torch.dtype] = ()) -> Tensor:
    """An entry that must be a dense tensor, of one of ``dtypes`` if there are any.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
        raise ValueError(
            f"state {key!r} of parameter {number!r} is a {type(value).__name__}; allowed is a dense tensor with memory"
        )
    if dtypes and value.dtype not in dtypes:
        raise ValueError(
            f"state {key!r} of parameter {number!r} has dtype {value.dtype}; allowed are {', '.join(map(str, dtypes))}"
        )
    return value


def check_narrow(name: str, dtype: Any) -> torch.dtype:
    """Raises ValueError unless ``dtype`` is of 16 bits."""
    if dtype not in _NARROW:
        raise ValueError(f"{name} = {dtype!r} is not allowed; allowed are torch.bfloat16 and torch.float16")
    narrow: torch.dtype = dtype
    return narrow


def by_blocks(values: Tensor, scale: Tensor, block: int, number: Any, key: str) -> Tensor:
    """Values of [n], each times the scale of its block of ``block`` elements, of which the last may be shorter.

    Raises:
        ValueError: there are too few or too many scales.
    """
    count = values.numel()
    if scale.numel() != -(-count // block):
        raise ValueError(
            f"state {key!r} of parameter {number!r} has {scale.numel()} scales for {count} elements; allowed is one "
            f"for every {block} elements, {-(-count // block)}"
        )
    whole = count // block * block
    values[:whole].view(-1, block).mul_(scale[: whole // block].view(-1, 1))
    if whole < count:
        values[whole:].mul_(scale[-1])
    return values


__all__ = [
    "Checkpoint",
    "State",
    "by_blocks",
    "check_known",
    "check_narrow",
    "group_of",
    "missing",
    "optimizer_class",
    "step_in",
    "tensor",
]
