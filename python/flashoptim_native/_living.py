"""Every optimizer that is alive, and what becomes of one's process when it forks."""

from __future__ import annotations

import os
import weakref
from typing import Any

import torch

#: By id. No lock guards it, as an exception that a trace function raises at the end of a ``with`` leaves it locked:
#: adding one and listing the references are one call into C each.
_optimizers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def add(optimizer: Any) -> None:
    """It is held weakly."""
    _optimizers[id(optimizer)] = optimizer


def optimizers() -> list[Any]:
    """Every optimizer that is alive."""
    found = (reference() for reference in _optimizers.valuerefs())
    return [optimizer for optimizer in found if optimizer is not None]


def _has_stepped_on_cpu(optimizer: Any) -> bool:
    groups, store = vars(optimizer).get("param_groups", ()), vars(optimizer).get("_store")
    return store is not None and store.steps() > 0 and any(p.is_cpu for group in groups for p in group["params"])


def _after_fork() -> None:
    """torch computes on one thread in the child of a process that has stepped on several.

    OpenMP's pool would wait for ever for threads that a child does not have: in our steps, which see to it themselves,
    and in every operation of torch that is worth threads.
    """
    if torch.get_num_threads() > 1 and any(map(_has_stepped_on_cpu, optimizers())):
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["add", "optimizers"]
