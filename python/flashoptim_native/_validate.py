"""Checks of arguments and of parameter groups: every message names the argument, its value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch

from . import _ops

MASTER_WEIGHT_BITS = (None, 24, 32)
STATE_CODECS = ("default", "paper")
LARGEST_SEED = 2**53 - 1
#: Hyperparameters of rules that a group says otherwise, or not at all.
_NOT_A_GROUPS = ("decay_lr", "seed", "step")


def real_number(name: str, value: Any) -> float:
    """``value`` as a float: a Python or NumPy real number, or a floating-point tensor of one element."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name} = tensor of shape {tuple(value.shape)} and dtype {value.dtype}; a tensor must hold one "
                "floating-point number"
            )
        return float(value.item())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}; allowed is a real number")
    return float(value)


def check_range(
    name: str, value: Any, low: float, high: float = math.inf, *, low_allowed: bool = True, high_allowed: bool = False
) -> float:
    """``value`` as a float between two numbers; NaN and infinities are outside every range."""
    number = real_number(name, value)
    above = number > low or (low_allowed and number == low)
    below = number < high or (high_allowed and number == high)
    if not (above and below) or math.isinf(number):
        more, less = ">=" if low_allowed else ">", "<=" if high_allowed else "<"
        allowed = f"{low:g} {'<=' if low_allowed else '<'} {name} {less} {high:g}"
        if math.isinf(low) or math.isinf(high):
            ends = [f"{more} {low:g}"] * math.isfinite(low) + [f"{less} {high:g}"] * math.isfinite(high)
            allowed = " ".join(["a finite number", *ends])
        raise ValueError(f"{name} = {number!r} is not allowed; allowed is {allowed}")
    return number


def check_lr_tensor(lr: torch.Tensor) -> torch.Tensor:
    """A learning rate that the device reads at every step; its value is the caller's affair."""
    if lr.dtype != torch.float32 or lr.numel() != 1:
        raise TypeError(
            f"lr is a CUDA tensor of dtype {lr.dtype} and shape {tuple(lr.shape)}; allowed with capturable=True is "
            "torch.float32 with one element"
        )
    return lr


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}; allowed are True and False")
    return value


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} = {value!r} is a {type(value).__name__}; allowed is an integer")
    number = int(value)
    if number < low or (high is not None and number > high):
        allowed = f">= {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} = {number} is not allowed; allowed is an integer {allowed}")
    return number


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if isinstance(value, bool) or value not in allowed:
        names = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} = {value!r} is not allowed; allowed are {names}")
    return value


def check_betas(value: Any, count: int) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != count:
        what = "a pair of" if count == 2 else count
        raise ValueError(f"betas = {value!r} is not allowed; allowed is {what} numbers, each 0 <= beta < 1")
    for index, beta in enumerate(value):
        check_range(f"betas[{index}]", beta, 0.0, 1.0)


def check_hyperparameters(kind: str, group: Mapping[str, Any]) -> None:
    """The numbers of a step, as a group holds them, in the ranges of the optimizer's rule."""
    description = _ops.describe(kind)
    if "betas" in group:
        check_betas(group["betas"], description.betas())
    for one in description.hyperparameters:
        if one.name in _NOT_A_GROUPS or one.name not in group:
            continue
        value = group[one.name]
        if one.kind == "flag":
            check_bool(one.name, value)
        elif one.kind == "number":
            ends = {"low_allowed": one.lowest_allowed, "high_allowed": one.highest_allowed}
            check_range(one.name, value, one.lowest, one.highest, **ends)
        elif value is not None:
            check_integer(one.name, value, int(one.lowest))
    if "decouple_lr" in group:
        check_bool("decouple_lr", group["decouple_lr"])
    if group.get("nesterov") and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            f"nesterov = True with momentum = {group['momentum']!r} and dampening = {group['dampening']!r} is not "
            "allowed; Nesterov momentum requires momentum > 0 and dampening = 0"
        )
    if group.get("decouple_lr") and "decay_lr" in group:
        lr = real_number("decay_lr", group["decay_lr"])
        if not 0.0 < lr < math.inf:
            raise ValueError(
                f"lr = {lr!r} is not allowed with decouple_lr = True; the weight decay is relative to the first "
                "learning rate, which must be a finite number > 0"
            )
    check_integer("seed", group["seed"], 0, LARGEST_SEED)


def check_format(group: Mapping[str, Any]) -> None:
    """How a group's weights and states are stored."""
    check_bool("quantize", group["quantize"])
    if "capturable" in group:
        check_bool("capturable", group["capturable"])
    check_choice("state_codec", group["state_codec"], STATE_CODECS)
    check_choice("master_weight_bits", group["master_weight_bits"], MASTER_WEIGHT_BITS)
    check_integer("min_quantized_numel", group["min_quantized_numel"], 0)
    check_bool("stochastic_rounding", group["stochastic_rounding"])
    if group["stochastic_rounding"] and group["master_weight_bits"] is not None:
        raise ValueError(
            f"stochastic_rounding = True with master_weight_bits = {group['master_weight_bits']} is not allowed; "
            "allowed with master_weight_bits = None (corrections of the default codec are rounded without bias anyway)"
        )
