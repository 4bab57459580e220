"""bitsandbytes' optimizers: Adam, AdamW, AdEMAMix, Lion and SGD, of 32 and 8 bits (blockwise), paged or not.

    step                int
    state1, state2      fp32; or uint8 codes, in the parameter's shape (AdEMAMix's state1: [2, ...], fast and slow)
    qmap1, qmap2        fp32 [256]: the value of every code, up to 1
    absmax1, absmax2    fp32: the value of 1, for every 256 elements in the order of memory ([2, ...] of AdEMAMix)
    unorm_vec           with max_unorm; not taken

From 0.46 on, all but `step` lies in a dict `__bnb_optimizer_quant_state__`. A paged optimizer's file is no other.
Its Adam decays weights decoupled from the gradient, as AdamW does, so both are AdamW here. Its SGD takes no account of
`dampening`, and neither are we given one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._states import STEP
from ._checkpoint import Checkpoint, State, by_blocks, check_known, group_of, missing, step_in, tensor

NAME = "bitsandbytes"
_WRAPPED = "__bnb_optimizer_quant_state__"
_BLOCK = 256
_KNOWN = {STEP, "unorm_vec", *(f"{name}{slot}" for name in ("state", "qmap", "absmax") for slot in (1, 2))}


def matches(state_dict: Mapping[str, Any]) -> bool:
    return any(_WRAPPED in held or "state1" in held for held in state_dict["state"].values())


def unwrapped(held: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as it was before 0.46, without the dict in it."""
    inner = held.get(_WRAPPED, {})
    return {key: value for key, value in {**held, **inner}.items() if key != _WRAPPED}


def read(state_dict: Mapping[str, Any], optimizer: str | None = None) -> Checkpoint:
    """
    Raises:
        ValueError: a state holds what this format does not.
    """
    states = {number: unwrapped(held) for number, held in state_dict["state"].items() if held}
    has_two = {"state2" in held for held in states.values()}
    if len(has_two) != 1:
        raise ValueError("some states of the checkpoint have a state2 and some have none; allowed is one optimizer's")
    if has_two.pop():
        kinds: tuple[str, ...] = ("adamw",)
        if all(len(group["betas"]) == 3 for group in state_dict["param_groups"]):
            kinds = ("ademamix",)
    else:
        kinds = ("lion", "sgd")
    kind = kinds[0] if len(kinds) == 1 else optimizer if optimizer in kinds else None
    groups = [_group(group, kind, index) for index, group in enumerate(state_dict["param_groups"])]
    return Checkpoint(NAME, kind, groups, _reader(states, kind), kinds)


def _group(group: Mapping[str, Any], kind: str | None, index: int) -> dict[str, Any]:
    if kind == "sgd":
        momentum, dampening = group["betas"]
        if dampening:
            warnings.warn(
                f"dampening = {dampening} of group {index} is left out: bitsandbytes does not use it", stacklevel=5
            )
        return {**group_of(group), "momentum": momentum, "dampening": 0.0, "nesterov": False}
    if kind == "ademamix":
        return group_of(group, "betas", "eps", "alpha", "t_alpha", "t_beta3")
    return group_of(group, "betas", *(("eps",) if kind == "adamw" else ()))


_SLOTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "ademamix": ("exp_avg", "exp_avg_sq"),
    "lion": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}


def _reader(states: Mapping[Any, Mapping[str, Any]], kind: str | None) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = states.get(number)
        if saved is None:
            return None
        check_known(saved, _KNOWN, number, NAME)
        held: dict[str, Any] = {STEP: step_in(saved, number)}
        for index, slot in enumerate(_SLOTS[kind or ""], 1):
            held[slot] = _decoded(saved, index, number)
        if kind == "ademamix":
            if held["exp_avg"].shape[:1] != (2,):
                raise ValueError(f"state1 of parameter {number!r} holds no two averages, as AdEMAMix's does")
            held["exp_avg"], held["exp_avg_slow"] = held["exp_avg"].unbind(0)
        return State(held, tuple(held[_SLOTS[kind or ""][-1]].shape))

    return read_state


def _decoded(saved: Mapping[str, Any], index: int, number: Any) -> Tensor:
    """fp32 values of one state."""
    key = f"state{index}"
    if key not in saved:
        raise missing(key, number, saved)
    codes = tensor(saved[key], key, number, (torch.uint8, torch.float32))
    if codes.dtype == torch.float32:
        return codes
    for name in (f"qmap{index}", f"absmax{index}"):
        if name not in saved:
            raise missing(name, number, saved)
    values = tensor(saved[f"qmap{index}"], f"qmap{index}", number, (torch.float32,))
    if values.shape != (256,):
        raise ValueError(
            f"state 'qmap{index}' of parameter {number!r} has shape {tuple(values.shape)}; allowed is [256]"
        )
    scale = tensor(saved[f"absmax{index}"], f"absmax{index}", number, (torch.float32,))
    decoded = values[codes.reshape(-1).to(torch.int64)]
    parts = scale.reshape(-1, scale.shape[-1])  # AdEMAMix's two averages have blocks of their own
    for part, its_scale in zip(decoded.view(parts.shape[0], -1), parts):
        by_blocks(part, its_scale, _BLOCK, number, key)
    return decoded.view(codes.shape)


__all__ = ["NAME", "matches", "read", "unwrapped"]
