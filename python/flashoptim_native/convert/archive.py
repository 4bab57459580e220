"""The C++ front end's archives (docs/state_format.md, "C++"), from files of ``torch::save`` and ``save_archive()``, and
to them.

They are TorchScript zip files whose modules hold attributes and no code. torch reads such a file whole.
"""

from __future__ import annotations

import math
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _groups, _ops, _states
from .._ops import MasterWeights, StateCodec
from .._states import CODES, CORRECTION, SCALE, STEP
from . import _files
from ._checkpoint import Checkpoint, State, optimizer_class

NAME = "archive"
_VERSION = "flashoptim_archive_version"
_LATEST = 2
_MAGIC = b"flashoptim file\n"
_DTYPE_NAMES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float64: "Double",
}
_PARAM_DTYPES = {_DTYPE_NAMES[dtype]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
#: Options in the order of OptionValues (libtorch/include/flashoptim/torch/options.h), with its defaults. Those from
#: beta3 on are there where the optimizer reads them.
_OPTIONS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "nesterov": False,
    "maximize": False,
    "decouple_lr": False,
    "initial_lr": 0.0,
    "master_weight_bits": 24,
    "state_codec": "default",
    "quantize": True,
    "min_quantized_numel": 4096,
    "stochastic_rounding": False,
    "seed": 0,
    "beta3": 0.9999,
    "alpha": 5.0,
    "t_alpha": 0,
    "t_beta3": 0,
}
_OF_SOME = ("beta3", "alpha", "t_alpha", "t_beta3")
#: None in Python, 0 in C++.
_NONE_AS_0 = ("master_weight_bits", "t_alpha", "t_beta3")


def _archived(kind: str) -> list[str]:
    read = _ops.hyperparameter_names(kind)
    return [name for name in _OPTIONS if name not in _OF_SOME or name in read]


class _Sum:
    """The CRC-32 that an archive holds of itself: libtorch/optim/archive.cpp."""

    def __init__(self) -> None:
        self.value = 0

    def raw(self, data: Any) -> None:
        self.value = zlib.crc32(data, self.value)

    def integer(self, value: int) -> None:
        self.raw(int(value).to_bytes(8, "little", signed=True))

    def text(self, value: str) -> None:
        self.integer(len(value.encode()))
        self.raw(value.encode())

    def tensor(self, value: Tensor) -> None:
        self.text(_DTYPE_NAMES[value.dtype])
        self.integer(value.dim())
        for size in value.shape:
            self.integer(size)
        for size, stride in zip(value.shape, value.stride()):
            self.integer(0 if value.numel() == 0 or size == 1 else stride)
        if value.numel() > 0:
            dense = _states.dense(value.detach())
            for part in _files.bytes_of(dense.as_strided((dense.numel(),), (1,))):
                self.raw(part)

    def options(self, kind: str, values: Mapping[str, Any]) -> None:
        for name in _archived(kind):
            self.text(name)
            value = values[name]
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, str):
                    self.text(one)
                elif isinstance(one, float):
                    self.raw(struct.pack("<d", one))
                else:
                    self.integer(int(one))

    def state(self, state: Mapping[str, Any]) -> None:
        for name in ("step", "master_weights", "state_codec", "rows"):
            self.integer(state[name])
        self.text(state["param_dtype"])
        self.tensor(state["correction"])
        self.integer(state["slots"])
        for slot in range(state["slots"]):
            self.tensor(state[f"states{slot}"])
            self.tensor(state[f"scales{slot}"])


# From an archive


def has_trailer(path: Path) -> bool:
    """Whether a file ends as ``save_archive()`` ends one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 32))
        return file.read(16) == _MAGIC


def is_archive(path: Path) -> bool:
    """Whether a file is of TorchScript's kind."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in file.namelist())


def _check_trailer(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(size - 16)
        length, wanted = (int.from_bytes(file.read(8), "little") for _ in range(2))
        file.seek(0)
        total = 0
        left = size - 32
        while left > 0:
            part = file.read(min(left, 1 << 20))
            total, left = zlib.crc32(part, total), left - len(part)
    if length != size - 32 or total != wanted:
        raise ValueError(f"{path} is not what its last 32 bytes say: it is damaged, or was cut off")


class _Module:
    """What an archive's module holds, by name and type."""

    def __init__(self, module: Any, where: str) -> None:
        self._module, self._where = module, where

    def has(self, name: str) -> bool:
        return bool(self._module.hasattr(name))

    def read(self, name: str, wanted: type | tuple[type, ...]) -> Any:
        if not self.has(name):
            raise ValueError(f"{self._where}{name} is missing from the archive")
        value = self._module.getattr(name)
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            raise ValueError(f"{self._where}{name} is a {type(value).__name__} in the archive; allowed is {wanted}")
        return value

    def inner(self, name: str) -> _Module:
        if not self.has(name):
            raise ValueError(f"{self._where}{name} is missing from the archive")
        return _Module(self._module.getattr(name), f"{self._where}{name}.")


def read_file(path: Path, key: str | None = None) -> Checkpoint:
    """
    Args:
        key: names of archives in each other down to the optimizer's, joined by points; None: the file is the
            optimizer's.

    Raises:
        ValueError: it is not an optimizer's archive, or damaged.
    """
    if has_trailer(path):
        _check_trailer(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = torch.jit.load(os.fspath(path), map_location="cpu")  # type: ignore[no-untyped-call]
    top = _Module(module._c, f"{path}: ")
    for name in [] if key is None else key.split("."):
        top = top.inner(name)
    if not top.has(_VERSION):
        raise ValueError(f"{path} holds no optimizer of ours; allowed is one, or a key= that says where it is")
    version, form = top.read(_VERSION, int), top.read("state_format_version", int)
    kind = top.read("optimizer", str)
    if not 1 <= version <= _LATEST or not 1 <= form <= _groups.FORMAT_VERSION or kind not in _ops.optimizer_names():
        raise ValueError(
            f"{path} is of archive version {version}, state format {form}, optimizer {kind!r}; allowed are up to "
            f"{_LATEST}, up to {_groups.FORMAT_VERSION}, and one of {', '.join(_ops.optimizer_names())}"
        )
    total = _Sum()
    total.integer(version)
    total.integer(form)
    total.text(kind)
    archived = top.inner("param_groups")
    size = archived.read("size", int)
    total.integer(size)
    groups: list[dict[str, Any]] = []
    states: dict[int, dict[str, Any]] = {}
    held = top.inner("state")
    number = 0
    for index in range(size):
        group = archived.inner(str(index))
        count = group.read("params", int)
        options = _read_options(group.inner("options"), kind)
        groups.append({**_group_of(kind, options), "params": list(range(number, number + count))})
        if version >= _LATEST:
            total.integer(count)
            total.options(kind, options)
        for param in groups[-1]["params"]:
            if held.has(str(param)):
                states[param] = _read_state(held.inner(str(param)), version, param, total)
        number += count
    if version >= _LATEST and top.read("checksum", int) != total.value:
        raise ValueError(f"{path} is not what its checksum says: the archive is damaged")
    vouched = frozenset(states) if version >= _LATEST else frozenset()
    return Checkpoint(NAME, kind, groups, _reader(kind, states), vouched=vouched)


def _read_options(module: _Module, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in _archived(kind):
        default = _OPTIONS[name]
        result[name] = module.read(name, type(default))
    return result


def _read_state(module: _Module, version: int, number: int, total: _Sum) -> dict[str, Any]:
    state = {name: module.read(name, int) for name in ("step", "master_weights", "state_codec", "rows", "slots")}
    if not 0 <= state["slots"] <= 4:
        raise ValueError(f"parameter {number} has {state['slots']} slots in the archive; allowed are 0 to 4")
    arrays = [f"{name}{slot}" for slot in range(state["slots"]) for name in ("states", "scales")]
    result: dict[str, Any] = {**state, "param_dtype": module.read("param_dtype", str)}
    result |= {name: module.read(name, Tensor).detach() for name in ("correction", *arrays)}
    lies_otherwise = module.has("lies_otherwise") and bool(module.read("lies_otherwise", bool))
    if version >= _LATEST:
        own = _Sum()
        own.state(result)
        if module.read("checksum", int) != own.value:
            raise ValueError(f"the state of parameter {number} is not what its checksum says: the archive is damaged")
        for value in (number, own.value, int(lies_otherwise)):
            total.integer(value)
    return result


def _group_of(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options under Python's names: those that a group of this optimizer has."""
    param = torch.nn.Parameter(torch.empty(0, device="meta"))
    live = optimizer_class(kind)([param], lr=1e-3).param_groups[0]  # type: ignore[call-arg]
    result = {name: options[name] for name in options if name in live or name in _groups.PACKED_OPTIONS}
    result |= {name: options[name] or None for name in _NONE_AS_0 if name in result}
    if "beta3" in options:
        result["betas"] = (*options["betas"], options["beta3"])
    result.pop("initial_lr", None)
    if options["decouple_lr"]:
        result["decay_lr"] = options["initial_lr"]
    return result


def _reader(kind: str, states: Mapping[int, Mapping[str, Any]]) -> Callable[[Any], State | None]:
    def read_state(number: Any) -> State | None:
        saved = states.get(number)
        if saved is None:
            return None
        slots = _ops.state_names(kind, saved["slots"] > 0)
        if len(slots) != saved["slots"] or saved["param_dtype"] not in _PARAM_DTYPES:
            raise ValueError(
                f"parameter {number} has {saved['slots']} states and dtype {saved['param_dtype']!r} in the archive; "
                f"allowed are {len(slots)}, and one of {', '.join(_PARAM_DTYPES)}"
            )
        is_quantized = saved["state_codec"] != int(StateCodec.FLOAT32)
        held: dict[str, Any] = {STEP: saved["step"]}
        for index, slot in enumerate(slots):
            held[slot + CODES if is_quantized else slot] = saved[f"states{index}"]
            if is_quantized:
                held[slot + SCALE] = saved[f"scales{index}"]
        correction = saved["correction"]
        shape = tuple(saved["states0"].shape) if slots else tuple(correction.shape)
        if saved["master_weights"] in list(map(int, _ops.CORRECTION_DTYPES)):
            held[CORRECTION] = correction
        return State(held, shape, _PARAM_DTYPES[saved["param_dtype"]])

    return read_state


# To an archive


def write_file(
    path: Path, checkpoint: Checkpoint, kind: str, dtypes: Mapping[Any, torch.dtype], done: Callable[[int], None]
) -> None:
    """Writes a checkpoint of ours as ``save_archive()`` writes it, which ``load_archive()`` and ``torch::load`` read.

    Args:
        dtypes: of parameters whose states have no correction; float32 where nothing is said.
    """
    unit = torch._C.CompilationUnit()
    total = _Sum()
    total.integer(_LATEST)
    total.integer(_groups.FORMAT_VERSION)
    total.text(kind)
    total.integer(len(checkpoint.groups))
    groups: dict[str, Any] = {"size": len(checkpoint.groups)}
    states: dict[str, Any] = {}
    number = 0
    for index, group in enumerate(checkpoint.groups):
        options = _options_of(kind, group)
        total.integer(len(group["params"]))
        total.options(kind, options)
        groups[str(index)] = {"params": len(group["params"]), "options": options}
        for key in group["params"]:
            state = checkpoint.read(key)
            if state is not None:
                saved = _archived_state(kind, state, group, dtypes.get(key, torch.float32))
                own = _Sum()
                own.state(saved)
                states[str(number)] = {**saved, "checksum": own.value}
                for value in (number, own.value, 0):
                    total.integer(value)
                done(sum(value.nbytes for value in saved.values() if isinstance(value, Tensor)))
            number += 1
    top = {
        _VERSION: _LATEST,
        "state_format_version": _groups.FORMAT_VERSION,
        "optimizer": kind,
        "param_groups": groups,
        "state": states,
        "checksum": total.value,
    }
    _module(unit, top).save(os.fspath(path))
    _append_trailer(path)


def _options_of(kind: str, group: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    named = dict(group)
    if "betas" in named:
        betas = tuple(map(float, named["betas"]))
        named |= {"betas": betas[:2], **({"beta3": betas[2]} if len(betas) > 2 else {})}
    named["initial_lr"] = named.get("decay_lr", named.get("initial_lr", named["lr"]))
    for name in _archived(kind):
        default, value = _OPTIONS[name], named.get(name, _OPTIONS[name])
        result[name] = type(default)(0 if value is None else value)
    return result


def _archived_state(kind: str, state: State, group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    held = state.held
    slots = _states.slots_in(kind, held)
    codec = _states.stored_codec(kind, held, slots)
    correction = held.get(CORRECTION)
    dtype = dtype if state.dtype is None else state.dtype
    form = _states.format_of(torch.empty(state.shape, dtype=dtype, device="meta"), group)
    master = form.master_weights
    if (correction is None) != (master not in _ops.CORRECTION_DTYPES):
        master = MasterWeights.NONE if correction is None else _master_of(correction)
    none = torch.empty(0)
    first = held[_states.key_of(held, slots[0]) or slots[0]] if slots else correction
    order = None if first is None else _states.order_of(first)
    in_memory = state.shape if order is None else tuple(state.shape[d] for d in order)
    result: dict[str, Any] = {
        "step": _states.whole_number(held.get(STEP, 0), "a parameter"),
        "master_weights": int(master),
        "state_codec": int(codec),
        "rows": math.prod(_ops.scale_sizes(in_memory)[:-1]),
        "slots": len(slots),
        "param_dtype": _DTYPE_NAMES[dtype],
        "correction": none if correction is None else correction.detach(),
    }
    for index, slot in enumerate(slots):
        array = held[_states.key_of(held, slot) or slot]
        result[f"states{index}"] = array.detach()
        result[f"scales{index}"] = held[slot + SCALE].detach() if slot + SCALE in held else none
    return result


def _master_of(correction: Tensor) -> MasterWeights:
    return MasterWeights.CORRECTION8 if correction.dtype == torch.int8 else MasterWeights.CORRECTION16


def _module(unit: Any, entries: Mapping[str, Any]) -> Any:
    """A module that holds ``entries`` as attributes; dicts are modules of their own.

    torch.jit.script() makes the same of a torch.nn.Module, and takes thirty times as long.
    """
    make: Any = torch._C.ScriptModule
    module = make("__torch__.Module", unit, True)
    for name, value in entries.items():
        if isinstance(value, Mapping):
            inner = _module(unit, value)
            module._register_attribute(name, inner._type(), inner)
        else:
            module._register_attribute(name, _type_of(value), value)
    return module


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return torch._C.TupleType([_type_of(one) for one in value])
    types: Sequence[tuple[type, Any]] = (
        (bool, torch._C.BoolType),
        (int, torch._C.IntType),
        (float, torch._C.FloatType),
        (str, torch._C.StringType),
        (Tensor, torch._C.TensorType),
    )
    return next(one for kind, one in types if isinstance(value, kind)).get()


def _append_trailer(path: Path) -> None:
    total = 0
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            total = zlib.crc32(part, total)
    size = path.stat().st_size
    with path.open("ab") as file:
        file.write(_MAGIC + size.to_bytes(8, "little") + total.to_bytes(8, "little"))


__all__ = ["NAME", "is_archive", "read_file", "write_file"]
