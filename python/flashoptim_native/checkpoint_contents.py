"""What a checkpoint file holds: whose it is, in which formats, and what its tensors look like, suspicious ones first.

Reads state dicts of this library, of torch.optim, of the reference implementation, of bitsandbytes and of torchao, as
torch.save wrote them (no code of a file is run), and safetensors files. Whose a state dict is, convert.detect() says.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _groups, _ops, convert
from ._ops import StateCodec
from ._states import CODES, SCALE
from .convert import bitsandbytes, torchao

#: Writers by what convert calls their formats, where a person would not.
_WRITERS = {"flashoptim": "flashoptim-native", "reference": "flashoptim (reference)"}
BINS = 32
GROUP = 32
#: A group of 32 has one largest element, so that 1 in 32 codes may lie at the end of the range and be right.
_MOST_SATURATED = 2 / 32
_MOST_FLOORED = 0.9


class CheckpointError(ValueError):
    """A file that cannot be read, or holds nothing that is known here."""


class TensorReport(NamedTuple):
    """One tensor of a checkpoint."""

    #: The parameter's name, or its number where the file has no names.
    parameter: str
    name: str
    #: "codes", "scales", "correction", "values" or "other".
    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    #: Of codes and corrections: how many lie in each of 32 equal ranges of the codes.
    histogram: list[int]
    #: Of codes: the share at the end of their range, and the share of zeros. None: not codes.
    saturated: float | None
    floored: float | None
    #: Smallest and largest magnitude but zero (of codes: of the values that they stand for); None: all are zero, or
    #: their format is another library's.
    range: tuple[float, float] | None
    #: What is wrong or unusual, for a person.
    suspicions: list[str]


class Contents(NamedTuple):
    """What a file holds."""

    #: "flashoptim-native", "torch", "flashoptim (reference)", "bitsandbytes", "torchao" or "weights"; "unknown": an
    #: optimizer's of none of these.
    writer: str
    #: The optimizer's name; empty where the file does not say.
    optimizer: str
    #: Of the state format; None where there is none.
    version: int | None
    #: Options of each group that say how it is stored, and the number of its parameters.
    groups: list[dict[str, Any]]
    #: Tensors, the most suspicious first.
    tensors: list[TensorReport]
    parameters: int
    #: Of the parameters that have states here, by their states' shapes.
    elements: int

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def suspicious(self) -> list[TensorReport]:
        return [tensor for tensor in self.tensors if tensor.suspicions]


def read(path: str | Path) -> Contents:
    """Reads a file.

    Raises:
        CheckpointError: it is no file, damaged, or in no known format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} is no file")
    if path.suffix == ".safetensors":
        return _weights(_safetensors(path))
    try:
        held = convert.load(path)
    except Exception as error:  # whatever the unpickler meets in a damaged or foreign file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{str(path)!r} cannot be read: {reason}") from error
    found = _optimizer_in(held)
    if found is not None:
        return _contents(found)
    tensors = _model_in(held)
    if tensors:
        return _weights(tensors)
    raise CheckpointError(f"{str(path)!r} holds neither an optimizer's state_dict() nor tensors by name")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError("reading .safetensors needs the package safetensors: pip install safetensors") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


def _optimizer_in(held: Any) -> Mapping[str, Any] | None:
    """The optimizer's state dict, which may lie under a key of a larger dict."""
    if not isinstance(held, Mapping):
        return None
    for one in (held, *held.values()):
        if isinstance(one, Mapping) and isinstance(one.get("state"), Mapping) and "param_groups" in one:
            return one
    return None


def _model_in(held: Any) -> dict[str, Tensor]:
    for one in (held, *(held.values() if isinstance(held, Mapping) else ())):
        if isinstance(one, Mapping):
            tensors = {str(key): value for key, value in one.items() if isinstance(value, Tensor)}
            if tensors:
                return tensors
    return {}


def _weights(tensors: Mapping[str, Tensor]) -> Contents:
    reports = [_report(name, "weight", tensor, "", {}) for name, tensor in tensors.items()]
    elements = sum(tensor.numel() for tensor in tensors.values())
    return Contents("weights", "", None, [], _sorted(reports), len(tensors), elements)


# Optimizers' states


def _contents(held: Mapping[str, Any]) -> Contents:
    states: Mapping[Any, Mapping[str, Any]] = held["state"]
    options = [_options_of(group) for group in held["param_groups"]]
    names = _names(held["param_groups"])
    writer = _writer(held)
    kind = next((one["optimizer"] for one in options if "optimizer" in one), "")
    version = next((one["format"] for one in options if "format" in one), None)
    reports: list[TensorReport] = []
    elements = 0
    for number, saved in states.items():
        state = _entries(saved, writer)
        name = names.get(number, str(number))
        codec = StateCodec.PAPER if _is_paper(state) else StateCodec.DEFAULT
        decoded = _decoded(kind, state, codec) if writer == "flashoptim-native" else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and key != "step" and value.dim() > 0:
                reports.append(_report(name, key, value, writer, decoded, codec))
        elements += _elements(saved, writer)
    groups = [
        {"parameters": len(group.get("params", ())), **{k: v for k, v in one.items() if k not in ("codecs", "dtypes")}}
        for group, one in zip(held["param_groups"], options)
    ]
    return Contents(writer, kind, version, groups, _sorted(reports), len(states), elements)


def _options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """How this library stored a group's parameters, which it writes as JSON in bytes; {}: another library's group."""
    for key, value in group.items():
        if str(key).startswith(_groups.PREFIX) and isinstance(value, Tensor):
            try:
                said: dict[str, Any] = json.loads(bytes(value.to(torch.uint8).tolist()))
            except ValueError as error:
                raise CheckpointError(f"group entry {key!r} is damaged: {error}") from error
            return said
    return {}


def _names(groups: list[Mapping[str, Any]]) -> dict[Any, str]:
    return {
        number: str(name)
        for group in groups
        for number, name in zip(group.get("params", ()), group.get("param_names") or ())
    }


def _writer(held: Mapping[str, Any]) -> str:
    try:
        name = convert.detect(held)
    except TypeError as error:
        raise CheckpointError(f"the optimizer's state dict is damaged: {error}") from error
    except ValueError:
        return "unknown"
    return _WRITERS.get(name, name)


def _entries(state: Mapping[str, Any], writer: str) -> dict[str, Any]:
    """A parameter's state as plain entries, where its writer has them in dicts or in classes of its own."""
    if writer == bitsandbytes.NAME:
        return bitsandbytes.unwrapped(state)
    if writer != torchao.NAME:
        return dict(state)
    result: dict[str, Any] = {}
    for key, value in state.items():
        is_made_of_parts = torchao.kind_of_state(value) is not None
        result |= {f"{key}.{part}": one for part, one in vars(value).items()} if is_made_of_parts else {key: value}
    return result


def _elements(saved: Mapping[str, Any], writer: str) -> int:
    """Of the parameter: what its largest array has; of bitsandbytes the smallest, as AdEMAMix has two in one."""
    if writer == bitsandbytes.NAME:
        held = bitsandbytes.unwrapped(saved)
        return min((held[key].numel() for key in ("state1", "state2") if isinstance(held.get(key), Tensor)), default=0)
    return max((math.prod(one.shape) for one in saved.values() if isinstance(one, Tensor) and one.dim()), default=0)


def _is_paper(state: Mapping[str, Any]) -> bool:
    return any(str(key).endswith(CODES) and getattr(one, "dtype", None) == torch.int8 for key, one in state.items())


def _decoded(kind: str, state: Mapping[str, Any], codec: StateCodec) -> dict[str, Tensor]:
    """Values that codes stand for, by the names of their codes; none where they do not fit each other."""
    slots = [slot for slot in _ops.state_names(kind, True) if slot + CODES in state] if kind else []
    if not slots:
        return {}
    dtype = torch.float16 if codec == StateCodec.PAPER else torch.int16
    codes = [state[slot + CODES].contiguous() for slot in slots]
    scales = [_two_bytes(state[slot + SCALE], dtype) for slot in slots if slot + SCALE in state]
    try:
        values = _ops.decode_states(kind, codes, scales, int(codec), ())
    except RuntimeError:
        return {}  # each of them is reported as not to be decoded
    return dict(zip((slot + CODES for slot in slots), values))


def _two_bytes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.contiguous().view(dtype).squeeze(-1) if tensor.dtype == torch.uint8 else tensor.contiguous()


# One tensor


@functools.cache
def _code_values(slot: str, codec: StateCodec) -> tuple[Tensor, float]:
    """|values| that all 256 codes of a slot stand for, in some group, and the magnitude at the end of their range.

    Decoded by the library, which alone knows what codes mean. Where one sign reaches further than the other (-128 of a
    signed byte), the end is where both have one.
    """
    kind = next(kind for kind in _ops.optimizer_names() if slot in _ops.state_names(kind, True))
    slots = _ops.state_names(kind, True)
    ramp = torch.arange(1.0, GROUP + 1).repeat(256 // GROUP) / GROUP  # groups of the same scale
    values = [ramp if one == slot else torch.ones(256) for one in slots]
    signed = codec == StateCodec.PAPER
    codes, scales = [], []
    for one in _ops.describe(kind).slots:
        codes.append(torch.empty(256, dtype=torch.int8 if signed and one.is_signed else torch.uint8))
        scales.append(torch.empty(256 // GROUP, dtype=torch.float16 if signed else torch.int16))
    _ops.encode_states_(kind, values, codes, scales, int(codec), ())
    at = slots.index(slot)
    codes[at] = torch.arange(256, dtype=torch.uint8).view(codes[at].dtype)
    decoded: Tensor = _ops.decode_states(kind, codes, scales, int(codec), ())[at]
    ends = [float(one.max()) for one in (decoded, -decoded) if one.max() > 0]
    return decoded.abs(), min(ends)


def _kind_of(key: str, tensor: Tensor) -> str:
    if key.endswith(SCALE) or key.startswith("absmax") or "scale" in key:
        return "scales"
    if key == "error_bits" or key.endswith("::quantized"):  # which torch may have cast to the parameter's dtype
        kind, cast = ("correction", "other") if key == "error_bits" else ("codes", "values")
        return cast if tensor.is_floating_point() else kind
    if key == "correction":
        return "correction"
    if key.startswith("qmap") or key.endswith(".qmap"):
        return "other"
    if tensor.dtype in (torch.int8, torch.uint8):
        return "codes"
    return "values" if tensor.is_floating_point() else "other"


def _report(
    parameter: str,
    key: str,
    tensor: Tensor,
    writer: str,
    decoded: Mapping[str, Tensor],
    codec: StateCodec = StateCodec.DEFAULT,
) -> TensorReport:
    kind = _kind_of(key, tensor)
    suspicions: list[str] = []
    histogram: list[int] = []
    saturated = floored = None
    values: Tensor | None = tensor if kind == "values" else None
    shape = tuple(tensor.shape)
    if kind == "scales":
        is_own = writer == "flashoptim-native" and tensor.dtype == torch.uint8
        if is_own:
            tensor = _two_bytes(tensor, torch.float16 if codec == StateCodec.PAPER else torch.int16)
            shape = tuple(tensor.shape)
        values = tensor if tensor.is_floating_point() else None
    if kind == "correction" and tensor.dtype == torch.uint8:
        tensor = _two_bytes(tensor, torch.int16)
        shape = tuple(tensor.shape)
    if kind in ("codes", "correction") and tensor.numel():
        histogram = _histogram(tensor)
    if kind == "codes" and tensor.numel() and writer == "flashoptim-native":
        saturated, floored = _ends(key, tensor, codec)
        values = decoded.get(key)
        if values is None:
            suspicions.append("codes and scales do not fit each other: they cannot be decoded")
        if saturated > _MOST_SATURATED:
            suspicions.append(f"{100 * saturated:.1f} % of the codes are at the end of their range")
        if floored > _MOST_FLOORED:
            suspicions.append(f"{100 * floored:.1f} % of the codes are zero")
    spread = _range(values, suspicions)
    size = tensor.numel() * tensor.element_size()
    name = str(tensor.dtype).removeprefix("torch.")
    return TensorReport(parameter, key, kind, name, shape, size, histogram, saturated, floored, spread, suspicions)


def _histogram(tensor: Tensor) -> list[int]:
    limits = torch.iinfo(tensor.dtype)
    # Counted by numpy's or torch's own bincount: no range depends on the values.
    places = (tensor.flatten().to(torch.int64) - limits.min) * BINS // (limits.max - limits.min + 1)
    return [int(count) for count in torch.bincount(places, minlength=BINS)]


def _ends(key: str, codes: Tensor, codec: StateCodec) -> tuple[float, float]:
    """Shares of codes that stand for the end of their range, and for zero."""
    values, end = _code_values(key.removesuffix(CODES), codec)
    counts = torch.bincount(codes.contiguous().view(torch.uint8).flatten().to(torch.int64), minlength=256)
    at_end, at_zero = counts[values >= end].sum(), counts[values == 0].sum()
    return int(at_end) / codes.numel(), int(at_zero) / codes.numel()


def _range(values: Tensor | None, suspicions: list[str]) -> tuple[float, float] | None:
    """The smallest and largest magnitude but zero; says where there are values that no optimizer writes."""
    if values is None or not values.numel():
        return None
    magnitude = values.detach().to(torch.float32).abs()
    is_finite = torch.isfinite(magnitude)
    bad = int((~is_finite).sum())
    if bad:
        suspicions.append(f"{bad} values are NaN or infinite")
    magnitude = magnitude[is_finite & (magnitude > 0)]
    if not magnitude.numel():
        suspicions.append("all values are zero")
        return None
    return float(magnitude.min()), float(magnitude.max())


def _sorted(reports: list[TensorReport]) -> list[TensorReport]:
    """The most suspicious first; then by saturation, and in the file's order."""
    return sorted(reports, key=lambda one: (-len(one.suspicions), -(one.saturated or 0.0)))


# A picture


def plot(contents: Contents, path: str | Path, most: int = 12) -> None:
    """Writes histograms of codes and corrections, one panel a tensor, as a picture (.png, .svg, .pdf).

    Raises:
        CheckpointError: matplotlib is not there, there is nothing to draw, or it writes no such files.
    """
    drawn = [one for one in contents.tensors if one.histogram][:most]
    if not drawn:
        raise CheckpointError("there are no codes or corrections in this file to plot")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CheckpointError("--plot needs the package matplotlib: pip install matplotlib") from error
    columns = min(3, len(drawn))
    rows = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * rows), layout="constrained")
    for place, one in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, place + 1)
        limits = torch.iinfo(getattr(torch, one.dtype))
        width = (limits.max - limits.min + 1) / BINS
        colour = "tab:red" if one.suspicions else "tab:blue"
        axes.bar([limits.min + (i + 0.5) * width for i in range(BINS)], one.histogram, width=0.95 * width, color=colour)
        axes.set_title(f"{one.parameter}: {one.name}", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.suptitle(f"{contents.writer} {contents.optimizer}: tensors by code", fontsize=10)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise CheckpointError(f"--plot {path}: {error}") from error


def as_dicts(reports: list[TensorReport]) -> Iterator[dict[str, Any]]:
    for one in reports:
        yield one._asdict()


__all__ = ["CheckpointError", "Contents", "TensorReport", "as_dicts", "plot", "read"]
