"""Models' weights: 16-bit ones and an optimizer's corrections as fp32, fp32 ones (DeepSpeed's consolidated files, or
any model's) as 16-bit ones. Names and shapes stay; what is no floating-point number stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._states import CORRECTION
from ..weights import reconstruct_fp32_param
from ._checkpoint import Checkpoint, check_narrow

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(weights: Any, what: str) -> Mapping[str, Tensor]:
    """Raises TypeError or ValueError unless ``weights`` are named, dense tensors."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"{what} is a {type(weights).__name__}; allowed is a mapping of names to tensors")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TypeError(f"{what}[{name!r}] is a {type(value).__name__}; allowed are tensors by name")
        if value.layout != torch.strided or value.device.type == "meta":
            raise ValueError(f"{what}[{name!r}] has no dense memory; allowed are plain tensors")
    return weights


def names_of(checkpoint: Checkpoint, names: Sequence[str] | None) -> dict[Any, str]:
    """Every parameter's name, by its number in the checkpoint.

    Raises:
        ValueError: nobody says them, or there are too few or too many.
    """
    numbers = checkpoint.numbers
    if names is None:
        said = [name for group in checkpoint.groups for name in group.get("param_names", [])]
        if not said and all(isinstance(number, str) for number in numbers):
            said = numbers
        if not said and numbers:
            raise ValueError(
                "the checkpoint does not name its parameters; give their names in the optimizer's order as names=, as "
                "[name for name, _ in model.named_parameters()] has them where the optimizer was given all"
            )
        names = said
    if len(names) != len(numbers):
        raise ValueError(f"names holds {len(names)} names; allowed is one for each of {len(numbers)} parameters")
    return dict(zip(numbers, names))


def by_number(checkpoint: Checkpoint, weights: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[Any, Tensor]:
    """fp32 weights of the checkpoint's parameters, by number.

    Raises:
        ValueError: one is missing, or no fp32.
    """
    result = {}
    for number, name in names_of(checkpoint, names).items():
        if name not in weights:
            raise ValueError(f"weights lack {name!r}; they hold {', '.join(list(weights)[:8])} ...")
        if weights[name].dtype != torch.float32:
            raise ValueError(f"weights[{name!r}] has dtype {weights[name].dtype}; allowed is torch.float32")
        result[number] = weights[name]
    return result


def merged(
    weights: Mapping[str, Tensor], checkpoint: Checkpoint, names: Sequence[str] | None
) -> Iterator[tuple[str, Tensor]]:
    """Weights in fp32, with the corrections of those that have one.

    Raises:
        ValueError: names, shapes or dtypes do not go together.
    """
    numbers = {name: number for number, name in names_of(checkpoint, names).items()}
    lost = sorted(name for name in numbers if name not in weights)
    if lost:
        raise ValueError(f"weights lack {', '.join(map(repr, lost[:8]))}, which the optimizer has")
    for name, value in weights.items():
        state = checkpoint.read(numbers[name]) if name in numbers else None
        correction = None if state is None else state.held.get(CORRECTION)
        if state is None or correction is None:
            yield name, value.to(torch.float32) if value.dtype in _FLOATS else value
            continue
        if state.dtype not in (None, value.dtype) or tuple(correction.shape) != tuple(value.shape):
            raise ValueError(
                f"weights[{name!r}] have dtype {value.dtype} and shape {tuple(value.shape)}; allowed is what their "
                f"correction belongs to, {state.dtype} and {tuple(correction.shape)}"
            )
        yield name, reconstruct_fp32_param(value.contiguous(), correction.contiguous())


def narrowed(
    weights: Mapping[str, Tensor], dtype: torch.dtype, keep_fp32: Callable[[str], bool]
) -> Iterator[tuple[str, Tensor]]:
    """Floating-point weights in ``dtype``, rounded to nearest, but for names of which ``keep_fp32`` says so."""
    check_narrow("dtype", dtype)
    for name, value in weights.items():
        yield name, value.to(dtype) if value.dtype in _FLOATS and not keep_fp32(name) else value


__all__ = ["by_number", "check", "merged", "names_of", "narrowed"]
