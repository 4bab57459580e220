"""torchao's Adam and AdamW of 8, 4 and fp8 bits (``torchao.optim``).

    step, lr         float tensors
    exp_avg, ...     tensor subclasses, where a parameter has 4,096 elements or more, in whole blocks; else plain, in
                     the parameter's dtype
      OptimState8bit    codes uint8, in the parameter's shape; scale fp32, one a block; qmap fp32 [256]
      OptimState4bit    codes uint8 [elements / 2], the first in the upper 4 bits; scale; qmap fp32 [16]
      OptimStateFp8     codes float8_e4m3fn, in the parameter's shape; scale

A block's length is the number of codes over that of scales: 256, of 4 bits 128, unless asked otherwise. Files hold
these classes by name: :func:`stand_ins` lets torch read them where torchao is not installed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._states import STEP
from ._checkpoint import Checkpoint, State, by_blocks, check_known, group_of, missing, step_in, tensor

NAME = "torchao"
_CLASSES = {"OptimState8bit": "subclass_8bit", "OptimState4bit": "subclass_4bit", "OptimStateFp8": "subclass_fp8"}
_PACKAGES = ("torchao.optim", "torchao.prototype.low_bit_optim")
_KNOWN = {STEP, "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _StandIn(Tensor):
    """What a file says is one of torchao's subclasses: its parts are attributes, and it computes nothing."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{cls.__name__} was read without torchao, and cannot do {func}: convert its checkpoint first"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__} of {tuple(self.shape)}"


@functools.cache
def stand_ins() -> list[tuple[type, str]]:
    """Pairs of a class of ours and the full name that it stands for, as ``torch.serialization.safe_globals`` takes."""
    made = {name: type(name, (_StandIn,), {}) for name in _CLASSES}
    return [(made[name], f"{package}.{_CLASSES[name]}.{name}") for name in _CLASSES for package in _PACKAGES]


def kind_of_state(value: Any) -> str | None:
    """Which of the subclasses a tensor is, be it torchao's or a stand-in."""
    name = type(value).__name__
    return name if isinstance(value, Tensor) and name in _CLASSES else None


def matches(state_dict: Mapping[str, Any]) -> bool:
    return any(kind_of_state(one) for held in state_dict["state"].values() for one in held.values())


def read(state_dict: Mapping[str, Any], optimizer: str | None = None) -> Checkpoint:
    for index, group in enumerate(state_dict["param_groups"]):
        if group.get("amsgrad"):
            warnings.warn(
                f"amsgrad=True of group {index}: the maximum of the variances (max_exp_avg_sq) is dropped", stacklevel=4
            )
    groups = [group_of(group, "betas", "eps") for group in state_dict["param_groups"]]
    return Checkpoint(NAME, None, groups, _reader(state_dict), ("adamw", "adam"))


def _reader(state_dict: Mapping[str, Any]) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = state_dict["state"].get(number)
        if not saved:
            return None
        check_known(saved, _KNOWN, number, NAME)
        held: dict[str, Any] = {STEP: step_in(saved, number)}
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in saved:
                raise missing(key, number, saved)
            held[key] = _values(saved[key], key, number)
        return State(held, tuple(held["exp_avg"].shape))

    return read_state


def _values(value: Any, key: str, number: Any) -> Tensor:
    """fp32 values of a state, in the parameter's shape."""
    kind = kind_of_state(value)
    if kind is None:
        return tensor(value, key, number, _FLOATS).to(torch.float32)
    parts = vars(value)
    for name in ("codes", "scale") if kind == "OptimStateFp8" else ("codes", "scale", "qmap"):
        if name not in parts:
            raise missing(f"{name} of {key}", number, parts)
    codes, shape = tensor(parts["codes"], key, number, (torch.uint8, torch.float8_e4m3fn)), tuple(value.shape)
    scale = tensor(parts["scale"], key, number, (torch.float32,))
    if kind == "OptimStateFp8":
        values = codes.reshape(-1).to(torch.float32)
    else:
        flat = codes.reshape(-1).to(torch.int64)
        if kind == "OptimState4bit":
            flat = torch.stack([flat >> 4, flat & 0xF], dim=-1).view(-1)
        qmap = tensor(parts["qmap"], f"qmap of {key}", number, (torch.float32,))
        wanted = 16 if kind == "OptimState4bit" else 256
        if qmap.shape != (wanted,):
            raise ValueError(
                f"qmap of state {key!r} of parameter {number!r} has shape {tuple(qmap.shape)}; allowed is [{wanted}]"
            )
        values = qmap[flat]
    if values.numel() != value.numel() or scale.numel() == 0 or values.numel() % scale.numel() != 0:
        raise ValueError(
            f"state {key!r} of parameter {number!r} has {values.numel()} codes and {scale.numel()} scales for "
            f"{value.numel()} elements; allowed is one code for each, in whole blocks of one scale"
        )
    return by_blocks(values, scale.reshape(-1), values.numel() // scale.numel(), number, key).view(shape)


__all__ = ["NAME", "kind_of_state", "matches", "read", "stand_ins"]
