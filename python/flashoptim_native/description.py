"""What an optimizer keeps: a table of groups, formats and bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from . import _ops, _parameters, _states
from ._ops import MasterWeights, StateCodec
from ._states import Format

_CODEC_NAMES = {StateCodec.FLOAT32: "fp32", StateCodec.PAPER: "8-bit paper", StateCodec.DEFAULT: "8-bit"}
_WEIGHT_NAMES = {
    MasterWeights.NONE: "",
    MasterWeights.NONE_STOCHASTIC: ", rounded at random",
    MasterWeights.CORRECTION8: " + 8",
    MasterWeights.CORRECTION16: " + 16",
    MasterWeights.CORRECTION8_NEAREST: " + 8, nearest",
    MasterWeights.CORRECTION16_NEAREST: " + 16, nearest",
}
_SCALE_BYTES = 2


class FormatDescription(NamedTuple):
    """The parameters of one group that are stored alike."""

    group: int
    #: How messages call them.
    parameters: list[str]
    elements: int
    #: How a weight is kept, by bits: "bfloat16 + 8", "float32".
    weights: str
    #: How states are kept: "8-bit", "8-bit paper", "fp32", "none".
    states: str
    #: Of parameters, corrections and states; without gradients. Of sharded ones, what this process holds.
    bytes: int
    #: Options of the group that differ from those of the first, its learning rate included.
    options: dict[str, Any]


class OptimizerDescription(list[FormatDescription]):
    """One row for every group and format; ``str()`` is a table."""

    @property
    def bytes(self) -> int:
        """Of all parameters, corrections and states; without gradients."""
        return sum(row.bytes for row in self)

    @property
    def elements(self) -> int:
        return sum(row.elements for row in self)

    def __str__(self) -> str:
        head = ("group", "tensors", "elements", "weights", "states", "bytes", "each", "options")
        lines = [head]
        for row in self:
            options = ", ".join(f"{name}={value!r}" for name, value in row.options.items())
            each = f"{row.bytes / max(1, row.elements):.3f}"
            counts = (str(row.group), str(len(row.parameters)), f"{row.elements:,}")
            lines.append((*counts, row.weights, row.states, f"{row.bytes:,}", each, options))
        each = f"{self.bytes / max(1, self.elements):.3f}"
        tensors = str(sum(len(row.parameters) for row in self))
        lines.append(("all", tensors, f"{self.elements:,}", "", "", f"{self.bytes:,}", each, ""))
        widths = [max(map(len, column)) for column in zip(*lines)]
        left = (3, 4, 7)
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column in left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in lines
        )


def describe(kind: str, groups: list[dict[str, Any]]) -> OptimizerDescription:
    """What parameters of ``groups`` and their states take, once each has taken a step."""
    result = OptimizerDescription()
    for index, group in enumerate(groups):
        rows: dict[tuple[str, str], list[tuple[str, Tensor, int]]] = {}
        for position, param in enumerate(group["params"]):
            form = _states.format_of(param, group)
            weights = str(param.dtype).removeprefix("torch.") + _WEIGHT_NAMES[form.master_weights]
            name = _parameters.name_of(groups, index, position)
            states = _CODEC_NAMES[form.codec] if _states.slots_of(kind, form) else "none"
            key = (weights, states)
            rows.setdefault(key, []).append((name, param, bytes_of(kind, param, form)))
        for (weights, states), items in rows.items():
            elements = sum(_parameters.plain(param).numel() for _, param, _ in items)
            total = sum(size for _, _, size in items)
            names = [name for name, _, _ in items]
            row = FormatDescription(index, names, elements, weights, states, total, _differences(group, groups[0]))
            result.append(row)
    return result


class Array(NamedTuple):
    """One tensor that is stored for a parameter."""

    #: "weights", "corrections", "states", "scales".
    part: str
    bytes: int


def arrays_of(kind: str, param: Tensor, form: Format) -> list[Array]:
    """The tensors that a parameter, its correction and its states are; of a sharded one, this process's part.

    ``param`` may be without memory (the meta device, fake tensors).
    """
    local = _parameters.plain(param)
    count = local.numel()
    arrays = [Array("weights", count * local.element_size())]
    if form.master_weights in _ops.CORRECTION_DTYPES:
        arrays.append(Array("corrections", count * _ops.CORRECTION_DTYPES[form.master_weights].itemsize))
    for _ in _states.slots_of(kind, form):
        if form.codec == StateCodec.FLOAT32:
            arrays.append(Array("states", 4 * count))
        elif count:
            arrays.append(Array("states", count))
            arrays.append(Array("scales", _SCALE_BYTES * math.prod(_ops.scale_sizes(tuple(local.shape)))))
    return arrays


def bytes_of(kind: str, param: Tensor, form: Format) -> int:
    """Bytes of a parameter, its correction and its states in a format; of a sharded one, of this process's part."""
    return sum(array.bytes for array in arrays_of(kind, param, form))


def _differences(group: Mapping[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    named = {**dict(group), **getattr(group, "options", {})}
    left_out = ("params", "param_names", "initial_lr", "decay_lr")
    return {
        name: value
        for name, value in named.items()
        if name not in left_out and not name.startswith("flashoptim_native.") and first.get(name) != value
    }


__all__ = ["Array", "FormatDescription", "OptimizerDescription", "arrays_of", "bytes_of", "describe"]
