"""Corrections, by optimizer: what a weight has beyond its 16-bit parameter, and which parameter that was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import _ops, _parameters, _states
from ._preparation import State
from ._store import Store

Groups = list[dict[str, Any]]


def of(state: Mapping[Any, Any], param: Tensor) -> Tensor | None:
    """A parameter's correction, if its state holds one."""
    held = state.get(param)
    correction = held.get(_states.CORRECTION) if isinstance(held, Mapping) else None
    return correction if isinstance(correction, Tensor) else None


def reset(store: Store, groups: Groups, state: State, params: Iterable[Tensor]) -> None:
    """Sets the corrections of ``params`` to zero; one that is yet to be made begins so.

    Raises:
        ValueError: one is in no group; nothing has changed then.
    """
    chosen = list(params)
    for param in chosen:
        store.records.index(param, groups)
    store.synchronize()
    for param in chosen:
        correction = of(state, param)
        if correction is not None:
            _parameters.plain(correction).zero_()
        store.records.remember_dtype(param)


def dtypes(store: Store, groups: Groups) -> dict[int, torch.dtype]:
    """By id of a parameter, the dtype that it had when its correction was made, where that is known."""
    store.records.follow(groups)
    store.synchronize()
    return {id(p): dtype for p, dtype in zip(store.records.params, store.records.dtypes) if dtype is not None}


def state_for_new_weights(store: Store, groups: Groups, state: State, param: Tensor) -> dict[str, Any] | None:
    """The state of a parameter that gets new weights, made if there is none; None where they have no correction."""
    record = store.records.index(param, groups)
    store.records.remember_dtype(param)
    if store.records.form(record).master_weights not in _ops.CORRECTION_DTYPES:
        state.get(param, {}).pop(_states.CORRECTION, None)
        return None
    return store.conforming_state(record, state)


__all__ = ["dtypes", "of", "reset", "state_for_new_weights"]
