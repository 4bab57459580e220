"""Parameter groups, and what a checkpoint says of how its states are stored (docs/state_format.md, "What a file
says").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import TORCH_ARGUMENTS, check_not_the_optimizers, check_torch_argument, python_value

FORMAT_VERSION = 2
PREFIX = "flashoptim_native."
#: Options of a group that say how weights and states are stored; a checkpoint does not change them.
FORMAT_OPTIONS = ("quantize", "state_codec", "master_weight_bits", "min_quantized_numel", "stochastic_rounding")
#: What a group keeps under one key.
PACKED_OPTIONS = (*FORMAT_OPTIONS, "capturable")
#: The same, and what no checkpoint says: it is the same whatever this is.
_KEPT_OPTIONS = (*PACKED_OPTIONS, "offload")
#: Optimizers whose checkpoints may lack a description: torch.optim's, and those of format 1.
_OF_FORMAT_1 = ("adamw", "adam", "sgd", "sgdw", "lion")
#: Bytes of a description, so that a later version's has the same size; one that does not fit takes a power of two more.
_DESCRIPTION_BYTES = 512


def description_key(kind: str) -> str:
    """The key of a group that names optimizer and format: another optimizer's checkpoint lacks it."""
    return f"{PREFIX}{kind}.{FORMAT_VERSION}"


def library_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("flashoptim-native")
    except metadata.PackageNotFoundError:
        return "unknown"  # run from a build tree


class ParamGroup(dict[str, Any]):
    """A parameter group whose ``PACKED_OPTIONS`` lie in one dict under one key, read and set by their own names.

    torch's checkpoint functions want every key of a live group in the file. Under one key, whose name carries optimizer
    and format, a new option breaks no old checkpoint, and a checkpoint of another optimizer is refused. For the same
    reason torch.optim's arguments that ask nothing are taken and not kept. NumPy's numbers are kept as Python's.
    """

    @classmethod
    def of(cls, kind: str, group: Mapping[str, Any]) -> ParamGroup:
        """``group`` with its options packed.

        Raises:
            ValueError: it has an option that a group cannot have, or a value of torch.optim's that is not there.
        """
        key = description_key(kind)
        held = group.get(key)
        options = dict(held) if isinstance(held, Mapping) else {}
        options |= {name: python_value(group[name]) for name in _KEPT_OPTIONS if name in group}
        packed = cls()
        for name, value in group.items():
            check_not_the_optimizers(name)
            if name in TORCH_ARGUMENTS:
                check_torch_argument(kind, name, value)
            elif name not in _KEPT_OPTIONS and name != key:
                dict.__setitem__(packed, name, python_value(value))
        dict.__setitem__(packed, key, {name: options[name] for name in _KEPT_OPTIONS if name in options})
        return packed

    def _description(self) -> tuple[str, dict[str, Any]]:
        for key, value in self.items():
            if isinstance(key, str) and key.startswith(PREFIX):
                return key, value
        return "", {}

    @property
    def options(self) -> dict[str, Any]:
        return self._description()[1]

    def __missing__(self, key: str) -> Any:
        if key in _KEPT_OPTIONS:
            return self.options[key]
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) or (key in _KEPT_OPTIONS and key in self.options)

    def __setitem__(self, key: str, value: Any) -> None:
        check_not_the_optimizers(key)
        if key in TORCH_ARGUMENTS:
            kind = self._description()[0].removeprefix(PREFIX).rpartition(".")[0]
            check_torch_argument(kind, key, value)
        elif key in _KEPT_OPTIONS:
            self.options[key] = python_value(value)
        else:
            dict.__setitem__(self, key, python_value(value))

    def get(self, key: str, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self.get(key, default)

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def copy(self) -> ParamGroup:
        copied = type(self)()
        for key, value in self.items():
            dict.__setitem__(copied, key, dict(value) if key.startswith(PREFIX) else value)
        return copied


class Stored(NamedTuple):
    """How one parameter's arrays are to be read; None: nothing says it."""

    codec: str | None = None  # of quantized states: "default" or "paper"
    dtype: str | None = None  # of the 16-bit parameter that the correction belongs to: "bfloat16", "float16"


def describe(kind: str, options: Mapping[str, Any], stored: Sequence[Stored]) -> Tensor:
    """What ``state_dict()`` holds of a group: JSON, padded with blanks. ``stored``: of every parameter, in order."""
    return as_description(
        {
            "library": library_version(),
            "format": FORMAT_VERSION,
            "optimizer": kind,
            **{name: options.get(name) for name in PACKED_OPTIONS},
            "parameters": len(stored),
            "codecs": _runs(one.codec for one in stored),
            "dtypes": _runs(one.dtype for one in stored),
        }
    )


def as_description(said: Mapping[str, Any]) -> Tensor:
    """A description's JSON as ``state_dict()`` holds it: uint8, padded with blanks."""
    text = json.dumps(said, separators=(",", ":")).encode()
    size = _DESCRIPTION_BYTES
    while size < len(text):
        size *= 2
    return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)


def description_text(group: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a saved group's description says, unchecked; None: it has none."""
    for key, value in group.items():
        if isinstance(key, str) and key.startswith(PREFIX):
            said: dict[str, Any] = json.loads(bytes(value.cpu().tolist())) if isinstance(value, Tensor) else dict(value)
            return said
    return None


def _runs(values: Iterable[str | None]) -> list[list[Any]]:
    """[[how many in a row, value], ...]; what has no value goes with its neighbours."""
    runs: list[list[Any]] = []
    for value in values:
        if runs and (value is None or runs[-1][1] in (None, value)):
            runs[-1][0] += 1
            runs[-1][1] = runs[-1][1] or value
        else:
            runs.append([1, value])
    return runs


class GroupDescription(NamedTuple):
    """What a checkpoint says of a group; None: it is of format 1, or another library's."""

    parameters: int
    codecs: list[list[Any]]
    dtypes: list[list[Any]]

    def of(self, position: int, count: int) -> Stored:
        """How the parameter at ``position`` of ``count`` is stored.

        Raises:
            ValueError: the groups were made up otherwise, and their parameters are stored differently.
        """
        return Stored(self._at(self.codecs, position, count), self._at(self.dtypes, position, count))

    def _at(self, runs: list[list[Any]], position: int, count: int) -> str | None:
        if len(runs) == 1:
            return None if runs[0][1] is None else str(runs[0][1])
        if count != self.parameters:
            raise ValueError(
                f"a group of the state dict had {self.parameters} parameters of different formats when it was saved, "
                f"and "
                f"has {count} now, so that theirs cannot be told; allowed is the number of before"
            )
        for length, value in runs:
            if position < length:
                return None if value is None else str(value)
            position -= length
        return None


_CODECS = ("default", "paper", None)
_DTYPES = ("bfloat16", "float16", None)


def _read_runs(runs: Any, allowed: Sequence[str | None]) -> list[list[Any]]:
    """What ``_runs`` made; ValueError or TypeError where it is not."""
    for length, value in runs:
        if type(length) is not int or length < 1 or value not in allowed:
            raise ValueError(f"{length!r} parameters of {value!r}")
    return [list(run) for run in runs]


def read_description(kind: str, group: Mapping[str, Any], index: int) -> GroupDescription | None:
    """What a saved group says.

    Raises:
        ValueError: it is another optimizer's, of a later format, or broken.
    """
    keys = [key for key in group if isinstance(key, str) and key.startswith(PREFIX)]
    if not keys:
        if kind not in _OF_FORMAT_1:
            raise ValueError(
                f"group {index} of the state dict does not say whose it is, and so is another optimizer's: allowed is "
                f"one with {description_key(kind)!r}, as this optimizer writes it"
            )
        return None
    where = f"group {index} of the state dict"
    if keys != [description_key(kind)]:
        raise ValueError(f"{where} is {', '.join(keys)}; allowed is {description_key(kind)}")
    held = group[keys[0]]
    if isinstance(held, Mapping):  # a live group's, as ZeroRedundancyOptimizer's consolidated state dict has it
        count = len(group["params"])
        return GroupDescription(count, [[count, held.get("state_codec")]], [[count, None]])
    if not isinstance(held, Tensor) or held.dtype != torch.uint8 or held.dim() != 1:
        raise ValueError(f"{keys[0]} of {where} is {held!r}; allowed is a 1-D uint8 tensor that holds JSON")
    try:
        said = json.loads(bytes(held.cpu().tolist()))
        codecs, dtypes = _read_runs(said["codecs"], _CODECS), _read_runs(said["dtypes"], _DTYPES)
        description = GroupDescription(int(said["parameters"]), codecs, dtypes)
        named = (said["optimizer"], int(said["format"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{keys[0]} of {where} is broken ({error}); allowed is what state_dict() wrote") from error
    if named != (kind, FORMAT_VERSION):
        raise ValueError(f"{where} is {named[0]}'s, format {named[1]}; allowed is {kind}'s, format {FORMAT_VERSION}")
    return description
