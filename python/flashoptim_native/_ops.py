"""Finds and loads the C++ operators and the store, and gives their enumerations names.

The library is ``libflashoptim_ops.so``: next to this file in an installed package, or wherever the environment variable
``FLASHOPTIM_OPS_LIBRARY`` points to during development.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import json
import math
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from . import _layout

LIBRARY_NAME = "libflashoptim_ops.so"
LIBRARY_VARIABLE = "FLASHOPTIM_OPS_LIBRARY"
OLDEST_TORCH = (2, 11)
_REBUILD = "Rebuild it with 'pip install --no-build-isolation --force-reinstall --no-deps .'"


class StateCodec(enum.IntEnum):
    """How optimizer states are stored: flashoptim::StateCodec of include/flashoptim/types.h."""

    FLOAT32 = 0
    PAPER = 1
    DEFAULT = 2


class MasterWeights(enum.IntEnum):
    """How a weight is kept between steps: flashoptim::MasterWeights of include/flashoptim/types.h."""

    NONE = 0
    NONE_STOCHASTIC = 1
    CORRECTION8 = 2
    CORRECTION16 = 3
    CORRECTION8_NEAREST = 4
    CORRECTION16_NEAREST = 5


class DType(enum.IntEnum):
    """flashoptim::DType of include/flashoptim/types.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


DTYPES = {torch.float32: DType.FLOAT32, torch.bfloat16: DType.BFLOAT16, torch.float16: DType.FLOAT16}


class Fit(enum.IntEnum):
    """Whether a step can run on a state as it is: store::Fit of libtorch/store/arrays.h."""

    NO = 0
    YES = 1
    OWN_ORDER = 2


class CorrectionFate(enum.IntEnum):
    """What became of a correction: store::CorrectionFate of libtorch/store/arrays.h."""

    NONE = 0
    KEPT = 1
    MERGED = 2
    DROPPED = 3
    LOST = 4


CORRECTION_DTYPES = {
    MasterWeights.CORRECTION8: torch.int8,
    MasterWeights.CORRECTION16: torch.int16,
    MasterWeights.CORRECTION8_NEAREST: torch.int8,
    MasterWeights.CORRECTION16_NEAREST: torch.int16,
}


def _is_registered() -> bool:
    try:
        torch.ops.flashoptim.step_  # noqa: B018
    except AttributeError:
        return False
    return True


def library_path() -> Path:
    """Where the operators are expected to be."""
    override = os.environ.get(LIBRARY_VARIABLE)
    return Path(override) if override else Path(__file__).resolve().parent / LIBRARY_NAME


def _load() -> Path | None:
    """The library that was loaded; None where there was none to load."""
    if _is_registered():  # a C++ program that embeds Python may have linked them in
        return None
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < OLDEST_TORCH:
        raise ImportError(
            f"flashoptim needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, but torch {torch.__version__} is "
            "installed: upgrade it with 'pip install --upgrade torch'"
        )
    path = library_path()
    if not path.is_file():
        if os.environ.get(LIBRARY_VARIABLE):
            raise ImportError(
                f"the environment variable {LIBRARY_VARIABLE} names {str(path)!r}, which is no file: point it at a "
                f"built {LIBRARY_NAME}, or unset it to use the one of the installed package"
            )
        raise ImportError(
            f"the operators of flashoptim are not there: {str(path)!r} does not exist. Install the package with "
            "'pip install --no-build-isolation .' in the repository, or build it with CMake "
            f"(-DFLASHOPTIM_BUILD_TORCH=ON) and set {LIBRARY_VARIABLE} to the path of {LIBRARY_NAME}"
        )
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ImportError(
            f"{str(path)!r} could not be loaded into torch {torch.__version__}: {error.__cause__ or error}. {_REBUILD}"
        ) from error
    return path


def _store_functions(path: Path | None) -> dict[str, Callable[..., Any]]:
    """The functions of libtorch/ops/python.cpp, by name."""
    sample = torch.empty(0)
    library = ctypes.PyDLL(None if path is None else str(path))
    try:
        make = library.flashoptim_python_functions
    except AttributeError as error:
        raise ImportError(f"{str(path)!r} is no {LIBRARY_NAME} of this version: {error}. {_REBUILD}") from error
    make.argtypes = [ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    make.restype = ctypes.py_object
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    address = torch.ops.flashoptim.implementation(sample)
    try:
        functions: dict[str, Callable[..., Any]] = make(
            torch.Tensor, torch.nn.Parameter, sample, torch.Tensor.__basicsize__, address, free_threaded
        )
    except RuntimeError as error:
        raise ImportError(f"torch {torch.__version__} does not go with this build of flashoptim: {error}") from error
    functions["versions"](torch.autograd.graph.increment_version)
    return functions


_loaded = _load()
#: The store's functions, each of which takes a store's handle first.
store: SimpleNamespace = SimpleNamespace(**_store_functions(_loaded))

_why_asked = _layout.find(store, bool(sysconfig.get_config_var("Py_GIL_DISABLED")))


def loaded_from() -> Path | None:
    """The library that is in use; None where a program that embeds Python has it linked in."""
    return _loaded


def tensor_access() -> str:
    """How a step looks at tensors: ``direct``, in torch's own objects, or ``ask: `` and the reason why torch is asked.

    Both are right; the first is faster.
    """
    return f"ask: {_why_asked}" if _why_asked else "direct"


merge_weights = torch.ops.flashoptim.merge_weights.default
split_weights_ = torch.ops.flashoptim.split_weights_.default
decode_states = torch.ops.flashoptim.decode_states.default
encode_states_ = torch.ops.flashoptim.encode_states_.default
new_states = torch.ops.flashoptim.new_states.default
host_states = torch.ops.flashoptim.host_states.default
host_buffers = torch.ops.flashoptim.host_buffers.default
fit_state = torch.ops.flashoptim.fit_state.default


class Conversion(NamedTuple):
    """A state in another format: store::Converted of libtorch/store/arrays.h."""

    arrays: list[torch.Tensor]  # in the order of array_names()
    param: torch.Tensor | None  # the parameter's new values; None: they stay
    fate: CorrectionFate


def convert_state(**arguments: Any) -> Conversion:
    """The operator, whose schema names its arguments."""
    arrays, rewritten, fate = torch.ops.flashoptim.convert_state.default(**arguments)
    return Conversion(arrays, rewritten[0] if rewritten else None, CorrectionFate(fate))


@functools.lru_cache(maxsize=4096)
def scale_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the scales of a contiguous tensor of these sizes: its leading dimensions, then groups of 32."""
    return tuple(torch.ops.flashoptim.scale_sizes(list(sizes)))


def place_of_box(whole: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where a shard lies in its whole, in the numbers that the store takes."""
    return tuple(torch.ops.flashoptim.place_of_box(list(whole), list(offsets), list(sizes)))


@functools.lru_cache(maxsize=16)
def state_names(optimizer: str, has_momentum: bool) -> tuple[str, ...]:
    """Names of the state slots of an optimizer, in the operators' order."""
    names = torch.ops.flashoptim.state_names(optimizer, has_momentum)
    return tuple(names.split(",")) if names else ()


@functools.lru_cache(maxsize=16)
def hyperparameter_names(optimizer: str) -> tuple[str, ...]:
    """What the numbers of a set of ``hypers`` are, in their order (include/flashoptim/optimizer_info.h)."""
    return tuple(torch.ops.flashoptim.hyperparameter_names(optimizer).split(","))


class Hyperparameter(NamedTuple):
    """One number that an optimizer's rule reads: flashoptim::HyperparameterInfo of optimizer_info.h."""

    name: str
    kind: str  # "number", "flag", "whole"
    default: float
    lowest: float  # an infinite end means finite numbers
    highest: float
    lowest_allowed: bool
    highest_allowed: bool


class Slot(NamedTuple):
    """One state that an optimizer keeps: flashoptim::StateSlotInfo of optimizer_info.h."""

    name: str
    is_signed: bool
    relative_to: int  # the slot whose root the default codec stores it relative to; -1: none
    mantissa_bits: int  # of its codes, in the default codec; 0: each group chooses
    is_slow: bool  # its scales are powers of two there


class Description(NamedTuple):
    """What an optimizer's rule says of itself."""

    title: str
    hyperparameters: tuple[Hyperparameter, ...]
    slots: tuple[Slot, ...]

    def betas(self) -> int:
        """How many numbers ``betas`` has."""
        return sum(one.name.removeprefix("beta").isdigit() for one in self.hyperparameters)


def optimizer_names() -> tuple[str, ...]:
    """Every optimizer's ``kind``."""
    return tuple(torch.ops.flashoptim.optimizer_names().split(","))


@functools.lru_cache(maxsize=16)
def describe(optimizer: str) -> Description:
    said = json.loads(torch.ops.flashoptim.describe_optimizer(optimizer))
    numbers = []
    for one in said["hyperparameters"]:
        lowest = -math.inf if one["lowest"] is None else one["lowest"]
        highest = math.inf if one["highest"] is None else one["highest"]
        ends = {"lowest": lowest, "highest": highest}
        numbers.append(Hyperparameter(**{**one, **ends}))
    fields = ("name", "signed", "relative_to", "mantissa_bits", "slow")
    slots = tuple(Slot(*(one[field] for field in fields)) for one in said["slots"])
    return Description(said["title"], tuple(numbers), slots)


def has_cuda() -> bool:
    """Whether this build steps CUDA tensors (not whether the machine has a device)."""
    return bool(torch.ops.flashoptim.has_cuda())


@functools.lru_cache(maxsize=1)
def cpu_isa() -> str:
    """The instruction set that steps on CPU tensors use: ``scalar``, ``avx2``, ``avx512``,
    ``avx512_bf16`` or (64-bit Arm) ``neon``."""
    isa: str = torch.ops.flashoptim.cpu_isa()
    return isa


@functools.lru_cache(maxsize=64)
def array_names(optimizer: str, has_momentum: bool, master_weights: int, codec: int) -> tuple[str, ...]:
    """Names of the arrays in a parameter's state, in the order of new_states."""
    names = torch.ops.flashoptim.array_names(optimizer, has_momentum, master_weights, codec)
    return tuple(names.split(",")) if names else ()


@functools.lru_cache(maxsize=4096)
def format_of(
    dtype: int,
    whole: tuple[int, ...],
    quantize: bool,
    codec: int,
    bits: int,
    stochastic_rounding: bool,
    smallest: int,
) -> tuple[MasterWeights, StateCodec]:
    """What a group's options mean for a parameter of sizes ``whole``, those of all its shards together."""
    master, kept = torch.ops.flashoptim.format_of(
        dtype, list(whole), quantize, codec, bits, stochastic_rounding, smallest
    )
    return MasterWeights(master), StateCodec(kept)
