"""safetensors files: an optimizer's state dict of ours (docs/state_format.md, "Safetensors"), and weights.

Written and read here, and not by the package of that name, because it wants all tensors in memory to write them, and
Python's own modules are all that a file of 8 bytes, JSON and raw numbers takes. Reading maps the file.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checksums, _groups, _load_checks, _model_loads
from . import _files

NAME = "safetensors"
SUFFIX = ".safetensors"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
#: The format's own limit.
_LARGEST_HEADER = 100_000_000
_STATE = "state."
_FORMAT, _OPTIMIZER, _LIBRARY, _GROUPS, _CHECKSUM = (
    _groups.PREFIX + name for name in ("format", "optimizer", "library", "param_groups", "checksum")
)


class Content(NamedTuple):
    """A file: its tensors, in memory that is the file's, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    #: All that follows the header.
    data: memoryview


def read_file(path: Path) -> Content:
    """
    Raises:
        ValueError: the file is no safetensors file, or damaged.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or was cut off: its header would have {length:,} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            entries = {
                name: (_DTYPES[one["dtype"]], one["shape"], *one["data_offsets"]) for name, one in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no safetensors file, or damaged: its header cannot be read ({error})"
            ) from error
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[8 + length :]
    tensors = {}
    at = 0
    for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
            raise ValueError(f"{path}: {name!r} has shape {shape} and offsets {begin, end}; allowed are integers >= 0")
        count = math.prod(shape) * dtype.itemsize
        if begin != at or end - begin != count or end > len(data):
            raise ValueError(
                f"{path}: {name!r} of shape {shape} and {dtype} lies at {begin} to {end} of {len(data)}; allowed are "
                f"{count} bytes from {at} on: the file is damaged, or was cut off"
            )
        at = end
        tensors[name] = (
            torch.frombuffer(data[begin:end], dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)
        )
    if at != len(data):
        raise ValueError(f"{path} has {len(data) - at} bytes behind its last tensor; allowed are none")
    return Content({name: tensors[name] for name in entries}, metadata, data)


def write_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], done: Callable[[int], None]
) -> None:
    """
    Raises:
        ValueError: a tensor is of a dtype that the format does not have.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = _in_order(tensors)
    at = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name!r} has dtype {tensor.dtype}; allowed are {', '.join(map(str, _NAMES))}")
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for part in _files.bytes_of(tensors[name]):
                done(file.write(part))


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names by falling size of their elements, so that each lies at a multiple of it; the package does the same."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _parts_of(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for name in _in_order(tensors):
        yield from _files.bytes_of(tensors[name])


def _checksum(groups: str, parts: Iterable[memoryview]) -> str:
    """CRC-32 of the text of the groups and, behind it, of the file's data."""
    total = zlib.crc32(groups.encode())
    for part in parts:
        total = zlib.crc32(part, total)
    return str(total)


# State dicts of ours


def write_state_dict(path: Path, state_dict: Mapping[str, Any], kind: str, done: Callable[[int], None]) -> None:
    """Writes what ``state_dict()`` of ours gives, under its own names. Python reads the same bytes back."""
    state_dict = _with_numbers(state_dict)
    tensors: dict[str, Tensor] = {}
    places = {number: place for place, number in enumerate(_numbers(state_dict))}
    for number, held in state_dict["state"].items():
        for key, value in held.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"state {key!r} of parameter {number!r} is a {type(value).__name__}; allowed are tensors"
                )
            tensors[f"{_STATE}{places[number]}.{key}"] = value
    for key in (_model_loads.KEY, _checksums.KEY):
        if key in state_dict:
            tensors[key] = state_dict[key]
    groups = json.dumps([_shown_group(group, places) for group in state_dict["param_groups"]], separators=(",", ":"))
    metadata = {
        "format": "pt",
        _FORMAT: str(_groups.FORMAT_VERSION),
        _OPTIMIZER: kind,
        _LIBRARY: _groups.library_version(),
        _GROUPS: groups,
        _CHECKSUM: _checksum(groups, _parts_of(tensors)),
    }
    write_file(path, tensors, metadata, done)


def _with_numbers(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same where JSON holds its groups; else with Python's numbers for tensors of one element, summed up anew."""
    groups = [
        {
            key: value.item()
            if isinstance(value, Tensor) and not _is_description(key) and value.numel() == 1
            else value
            for key, value in group.items()
        }
        for group in state_dict["param_groups"]
    ]
    if all(a[key] is b[key] for a, b in zip(groups, state_dict["param_groups"]) for key in a):
        return state_dict
    result = {**state_dict, "param_groups": groups}
    _checksums.renew(result)
    return result


def _is_description(key: Any) -> bool:
    return str(key).startswith(_groups.PREFIX)


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    return [number for group in state_dict["param_groups"] for number in group["params"]]


def _shown_group(group: Mapping[str, Any], places: Mapping[Any, int]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            value = [places[number] for number in value]
        elif _is_description(key):
            value = _groups.description_text({key: value})
        elif isinstance(value, tuple):
            value = list(value)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} of a group is {value!r}, which JSON does not hold ({error})") from error
        shown[key] = value
    return shown


def is_state_dict(content: Content) -> bool:
    return _GROUPS in content.metadata


def state_dict_of(content: Content, path: Path) -> dict[str, Any]:
    """The state dict that a file of :func:`write_state_dict`, or of the C++ front end, holds.

    Raises:
        ValueError: the file is damaged, or of a later format.
    """
    metadata = content.metadata
    for key in (_FORMAT, _OPTIMIZER, _GROUPS, _CHECKSUM):
        if not isinstance(metadata.get(key), str):
            raise ValueError(f"{path} lacks {key!r} in its metadata; allowed is what convert.file() or C++ wrote")
    if metadata[_FORMAT] != str(_groups.FORMAT_VERSION):
        raise ValueError(f"{path} is of format {metadata[_FORMAT]}; allowed is {_groups.FORMAT_VERSION}")
    if metadata[_CHECKSUM] != _checksum(metadata[_GROUPS], [content.data]):
        raise ValueError(f"{path} is not what its checksum says: it is damaged")
    groups = json.loads(metadata[_GROUPS])
    for group in groups:
        for key, value in group.items():
            if str(key).startswith(_groups.PREFIX):
                group[key] = _groups.as_description(value)
            elif key == "betas":
                group[key] = tuple(value)
    states: dict[Any, dict[str, Any]] = {}
    result: dict[str, Any] = {"state": states, "param_groups": groups}
    for name, value in content.tensors.items():
        if name.startswith(_STATE):
            number, _, key = name.removeprefix(_STATE).partition(".")
            if not number.isdecimal() or not key:
                raise ValueError(f"{path} holds {name!r}; allowed are {_STATE}<number>.<key>")
            states.setdefault(int(number), {})[key] = value
        else:
            result[name] = value
    _load_checks.structure(result)
    return result


__all__ = ["NAME", "SUFFIX", "Content", "is_state_dict", "read_file", "state_dict_of", "write_file", "write_state_dict"]
