"""torch.optim's AdamW, Adam and SGD, in all their implementations (for loop, foreach, fused): to and from fp32 states.

state     step (float tensor, or an int in old files), exp_avg, exp_avg_sq, max_exp_avg_sq with amsgrad;
          momentum_buffer (SGD, None before its first step)
groups    the constructor's arguments. `decoupled_weight_decay` tells AdamW from Adam since torch 2.7
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _ops, _states
from .._states import CORRECTION, STEP
from ._checkpoint import Checkpoint, State, group_of, missing, step_in, tensor

NAME = "torch"
_ADAM = ("exp_avg", "exp_avg_sq")
_KNOWN = {STEP, *_ADAM, "max_exp_avg_sq", "momentum_buffer"}
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def matches(state_dict: Mapping[str, Any]) -> bool:
    """Whether all that its states hold is torch.optim's, and its groups are no other library's."""
    groups = state_dict["param_groups"]
    if any("master_bytewidth" in group or any("." in str(key) for key in group) for group in groups):
        return False
    states = [held for held in state_dict["state"].values() if held]
    if states:
        return all(set(held) <= _KNOWN for held in states)
    return all("foreach" in group for group in groups)


def read(state_dict: Mapping[str, Any], optimizer: str | None = None) -> Checkpoint:
    groups = state_dict["param_groups"]
    kind, candidates = _kind_of(state_dict)
    names = ("betas", "eps") if kind != "sgd" else ("momentum", "dampening", "nesterov")
    for index, group in enumerate(groups):
        if group.get("amsgrad"):
            warnings.warn(
                f"amsgrad=True of group {index}: the maximum of the variances (max_exp_avg_sq) is dropped, and steps "
                "go on from the variances, which may be smaller",
                stacklevel=4,
            )
    return Checkpoint(NAME, kind, [group_of(group, *names) for group in groups], _reader(state_dict), candidates)


def _kind_of(state_dict: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    groups = state_dict["param_groups"]
    if all("momentum" in group and "betas" not in group for group in groups):
        return "sgd", ()
    states = [held for held in state_dict["state"].values() if held]
    if states and all("exp_avg_sq" not in held for held in states):
        return None, ("lion",)
    said = {bool(group["decoupled_weight_decay"]) for group in groups if "decoupled_weight_decay" in group}
    if len(said) == 1:
        return ("adamw" if said.pop() else "adam"), ()
    return None, ("adamw", "adam")


def _reader(state_dict: Mapping[str, Any]) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = state_dict["state"].get(number)
        if not saved:
            return None
        held: dict[str, Any] = {}
        shape: tuple[int, ...] | None = None
        for key in (*_ADAM, "momentum_buffer"):
            if saved.get(key) is not None:
                value = tensor(saved[key], key, number, _FLOATS)
                held[key], shape = value.to(torch.float32), tuple(value.shape)
        if shape is None:
            if "momentum_buffer" in saved:
                return None  # SGD before its first step, or without momentum
            raise missing("exp_avg", number, saved)
        if STEP in saved:
            held[STEP] = step_in(saved, number)
        return State(held, shape)

    return read_state


# To torch.optim


def write(checkpoint: Checkpoint, kind: str, values: Callable[[Any], State | None]) -> dict[str, Any]:
    """A state dict that torch.optim's optimizer of this kind loads. ``values``: a parameter's state in fp32.

    Raises:
        ValueError: torch.optim has no such optimizer.
    """
    check_kind(kind)
    states: dict[Any, dict[str, Any]] = {}
    dropped = 0
    for number in checkpoint.numbers:
        state = values(number)
        if state is None:
            continue
        dropped += CORRECTION in state.held
        shown = state_of(kind, state.held, checkpoint.name_of(number))
        if shown:
            states[number] = shown
    if dropped:
        warnings.warn(
            f"{dropped} parameters have corrections, which torch.optim does not keep: fp32_weights() makes fp32 "
            "weights of the model's and these",
            stacklevel=4,
        )
    return {"state": states, "param_groups": [_group(kind, group) for group in checkpoint.groups]}


def check_kind(kind: str) -> None:
    """Raises ValueError where torch.optim has no such optimizer."""
    if kind not in ("adamw", "adam", "sgd"):
        raise ValueError(
            f"torch.optim has no {kind}; allowed are adamw, adam and sgd. fp32 states of {kind} are to='flashoptim' "
            "with quantize=False"
        )


def state_of(kind: str, held: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """What torch.optim keeps of a state whose slots are fp32 values; nothing where SGD has no momentum."""
    slots = _ops.state_names(kind, True)
    shown = {slot: held[slot] for slot in slots if isinstance(held.get(slot), Tensor)}
    step = _states.whole_number(held.get(STEP, 0), name)
    if kind == "sgd":
        return shown
    return {STEP: torch.tensor(float(step), dtype=torch.float32), **shown}  # in fp32, as torch.optim counts


def _group(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in group.items() if key in ("lr", "initial_lr", "weight_decay", "param_names")}
    if group.get("decouple_lr"):  # decays by weight_decay * lr / decay_lr
        result["weight_decay"] = group["weight_decay"] / group.get("decay_lr", group.get("initial_lr", group["lr"]))
    if kind == "sgd":
        result |= {name: group.get(name, 0) for name in ("momentum", "dampening")}
        result["nesterov"] = bool(group.get("nesterov", False))
    else:
        result |= {"betas": tuple(group["betas"]), "eps": group["eps"], "amsgrad": False, "capturable": False}
        result["decoupled_weight_decay"] = kind == "adamw"
    result |= {"maximize": bool(group.get("maximize", False)), "foreach": None, "differentiable": False, "fused": None}
    return {**result, "params": list(group["params"])}


__all__ = ["NAME", "check_kind", "matches", "read", "state_of", "write"]
