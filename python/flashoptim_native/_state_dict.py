"""Groups and states of a checkpoint, made to fit an optimizer before anything of it changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops, _parameters, _states, _validate
from ._states import SCALE

#: Options of PyTorch's own optimizers that mean nothing here.
_FOREIGN_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay")


def merged_groups(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]], kept: Sequence[str]
) -> list[dict[str, Any]]:
    """Saved groups with this optimizer's parameters, its ``kept`` options, and whatever they lack; checked."""
    if len(groups) != len(saved):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups; allowed is this optimizer's number, {len(groups)}"
        )
    result = []
    for index, (group, old) in enumerate(zip(groups, saved)):
        if len(group["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index} of the state dict has {len(old['params'])} parameters; allowed is this optimizer's number, "
                f"{len(group['params'])}"
            )
        new = deepcopy({key: value for key, value in old.items() if key not in ("params", *_FOREIGN_OPTIONS)})
        if old.get("amsgrad"):
            warnings.warn(
                f"amsgrad=True of group {index} of the state dict is ignored: it is not supported", stacklevel=3
            )
        for key, value in group.items():
            if key in kept or key == "params":
                new[key] = value
            elif key == "decay_lr" and key not in new:
                new[key] = old.get("initial_lr", value)
            elif key != "initial_lr":
                new.setdefault(key, value)
        if isinstance(new.get("betas"), list):
            new["betas"] = tuple(new["betas"])
        if new.get("decouple_lr"):
            new.setdefault("decay_lr", _validate.real_number("lr", new.get("initial_lr", new["lr"])))
        _validate.check_hyperparameters(new)
        result.append(new)
    return result


class Loaded(NamedTuple):
    """What a checkpoint's states become."""

    state: defaultdict[Any, Any]
    #: New values of parameters whose dtype is another than their correction's was.
    params: list[tuple[Tensor, Tensor]]


@torch.no_grad()
def converted_states(kind: str, groups: list[dict[str, Any]], state_dict: Mapping[str, Any]) -> Loaded:
    """States by parameter, in the formats of ``groups``. Changes nothing."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    owners = [(g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]
    by_number = dict(zip(numbers, owners))
    state: defaultdict[Any, Any] = defaultdict(dict)
    params: list[tuple[Tensor, Tensor]] = []
    for number, saved in state_dict["state"].items():
        if number not in by_number:
            state[number] = saved
            continue
        g, i, param = by_number[number]
        local = _parameters.local(param)
        form = _states.format_of(local, groups[g])
        name = _parameters.name_of(groups, g, i)
        state[param], rewritten = _states.converted(kind, saved, local, form, name)
        if rewritten is not None:
            params.append((param, rewritten))
    return Loaded(state, params)


@torch.no_grad()
def expanded_states(kind: str, states: Mapping[Any, Any]) -> dict[Any, Any]:
    """The same with states in fp32, as plain PyTorch optimizers keep them. Steps and corrections stay."""
    result: dict[Any, Any] = {}
    for key, state in states.items():
        slots = [slot for slot in _ops.state_names(kind, True) if slot in state]
        if isinstance(state, Mapping) and slots and all(isinstance(state[slot], Tensor) for slot in slots):
            values = dict(zip(slots, _states.decode(kind, state, slots)))
            scales = {slot + SCALE for slot in slots}
            state = {name: values.get(name, value) for name, value in state.items() if name not in scales}
        result[key] = state
    return result
