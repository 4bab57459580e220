"""Optimizers side by side: what each stores for a parameter, in which dtype the model is, whether gradients stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops, _states, optimizers
from ..description import Array, arrays_of

_BLOCK = 256  # of bitsandbytes: states that share a scale
_SMALLEST = 4096  # below which its states are fp32


class Choice(NamedTuple):
    """One way to train a model."""

    title: str
    #: Of the model's floating-point weights.
    dtype: torch.dtype
    #: Of a parameter that is trained: the tensors beside its weights and gradient.
    arrays: Callable[[Tensor], list[Array]]
    releases: bool = False
    #: States and corrections on the host.
    offloads: bool = False
    #: What makes this optimizer: None where it is another library's.
    kind: str | None = None
    options: Mapping[str, Any] = {}


def _torch_arrays(slots: int) -> Callable[[Tensor], list[Array]]:
    """States in the parameter's dtype, and the step count, which torch's fused optimizers keep on the device."""

    def arrays(param: Tensor) -> list[Array]:
        return [Array("states", param.nbytes)] * slots + [Array("states", 4)]

    return arrays


def _bitsandbytes_arrays(param: Tensor) -> list[Array]:
    """bitsandbytes' blockwise 8-bit AdamW (bitsandbytes/optim/optimizer.py)."""
    count = param.numel()
    if count < _SMALLEST:
        return [Array("states", 4 * count)] * 2
    return [Array("states", count), Array("scales", 4 * -(-count // _BLOCK))] * 2


def _own_arrays(kind: str, options: Mapping[str, Any]) -> Callable[[Tensor], list[Array]]:
    def arrays(param: Tensor) -> list[Array]:
        return arrays_of(kind, param, _states.format_of(param, options))[1:]

    return arrays


_DEFAULTS: dict[str, Any] = {
    "quantize": True,
    "state_codec": "default",
    "master_weight_bits": 24,
    "stochastic_rounding": False,
    "min_quantized_numel": 4096,
}


def own(kind: str, title: str = "", **changed: Any) -> Choice:
    """This library's optimizer ``kind`` with options of its constructor; ``releases``, ``offloads``, ``dtype`` too."""
    releases, offloads = changed.pop("releases", False), changed.pop("offloads", False)
    dtype = changed.pop("dtype", torch.bfloat16)
    options = {**_DEFAULTS, "momentum": 0.9, **changed}
    if not title:
        bits = options["master_weight_bits"]
        title = f"Flash{_class_suffix(kind)} {bits} bit" if bits else f"Flash{_class_suffix(kind)} no correction"
        title += ", paper codec" if options["state_codec"] == "paper" else ""
        title += ", fp32 states" if not options["quantize"] else ""
        title += ", release" if releases else ""
        title += ", offload" if offloads else ""
    return Choice(title, dtype, _own_arrays(kind, options), releases, offloads, kind, changed)


def _class_suffix(kind: str) -> str:
    for name in optimizers.__all__:
        if getattr(getattr(optimizers, name), "kind", None) == kind:
            return name.removeprefix("Flash")
    raise ValueError(f"optimizer = {kind!r} is not allowed; allowed: {', '.join(kinds())}")


def class_of(kind: str) -> Any:
    return getattr(optimizers, "Flash" + _class_suffix(kind))


def kinds() -> list[str]:
    """Names of this library's optimizers, as the command takes them."""
    found = {getattr(getattr(optimizers, name), "kind", None) for name in optimizers.__all__}
    return sorted(kind for kind in found if kind)


def baselines(kind: str) -> list[Choice]:
    """What an optimizer is compared with: torch's counterpart in fp32 and in bf16, and bitsandbytes' 8-bit AdamW."""
    slots = len(_ops.state_names(kind, True))
    found = [
        Choice(f"torch {kind}, fp32", torch.float32, _torch_arrays(slots)),
        Choice(f"torch {kind}, bf16", torch.bfloat16, _torch_arrays(slots)),
    ]
    if kind in ("adamw", "adam"):
        found.append(Choice("bitsandbytes 8-bit, bf16", torch.bfloat16, _bitsandbytes_arrays))
    return found


__all__ = ["Choice", "baselines", "class_of", "kinds", "own"]
