"""Finds and loads the C++ operators, and gives their enumerations names.

The library is ``libflashoptim_ops.so``: next to this file in an installed package, or wherever the environment variable
``FLASHOPTIM_OPS_LIBRARY`` points to during development.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
from collections.abc import Callable
from operator import is_
from pathlib import Path
from typing import Any

import torch

LIBRARY_NAME = "libflashoptim_ops.so"
LIBRARY_VARIABLE = "FLASHOPTIM_OPS_LIBRARY"
OLDEST_TORCH = (2, 11)


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
            f"flashoptim needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, but torch {torch.__version__} is installed: "
            "upgrade it with 'pip install --upgrade torch'"
        )
    path = library_path()
    if not path.is_file():
        if os.environ.get(LIBRARY_VARIABLE):
            raise ImportError(
                f"the environment variable {LIBRARY_VARIABLE} names {str(path)!r}, which is no file: point it at a built "
                f"{LIBRARY_NAME}, or unset it to use the one of the installed package"
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
            f"{str(path)!r} could not be loaded into torch {torch.__version__}: {error}. Rebuild it with "
            "'pip install --no-build-isolation --force-reinstall --no-deps .'"
        ) from error
    return path


def _python_functions(path: Path | None) -> dict[str, Callable[..., Any]]:
    """The functions of libtorch/ops/python.cpp; none where this Python or this torch has not what they need."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if path is None or exchange is None:
        return {}
    try:
        make = ctypes.PyDLL(str(path)).flashoptim_python_functions
        make.argtypes, make.restype = [ctypes.py_object] * 3, ctypes.py_object
        functions: dict[str, Callable[..., Any]] = make(torch.Tensor, torch.nn.Parameter, exchange)
    except (AttributeError, OSError, ValueError):
        return {}
    return functions


#: Loops over Python's objects in C, by name: quicker than what they replace, which is still there for what they refuse.
python_functions = _python_functions(_load())

step_ = torch.ops.flashoptim.step_.default
plan_new = torch.ops.flashoptim.plan_new.default
plan_free = torch.ops.flashoptim.plan_free.default
plan_check = torch.ops.flashoptim.plan_check.default
plan_step_ = torch.ops.flashoptim.plan_step_.default
plan_norm_ = torch.ops.flashoptim.plan_norm_.default
merge_weights = torch.ops.flashoptim.merge_weights.default
split_weights_ = torch.ops.flashoptim.split_weights_.default
decode_states = torch.ops.flashoptim.decode_states.default
encode_states_ = torch.ops.flashoptim.encode_states_.default
zero_ = torch.ops.flashoptim.zero_.default


@functools.lru_cache(maxsize=4096)
def group_layout(sizes: tuple[int, ...]) -> tuple[int, int, int]:
    """(rows, row_size, groups_per_row) of a tensor of these sizes (docs/numerics.md, "Groups do not straddle rows")."""
    rows, row_size, groups = torch.ops.flashoptim.group_layout(list(sizes))
    return rows, row_size, groups


@functools.lru_cache(maxsize=16)
def state_names(optimizer: str, has_momentum: bool) -> tuple[str, ...]:
    """Names of the state slots of an optimizer, in the operators' order."""
    names = torch.ops.flashoptim.state_names(optimizer, has_momentum)
    return tuple(names.split(",")) if names else ()


@functools.lru_cache(maxsize=16)
def hyperparameter_names(optimizer: str) -> tuple[str, ...]:
    """What the numbers of a set of the operators' ``hypers`` are, in their order (include/flashoptim/optimizer_info.h)."""
    return tuple(torch.ops.flashoptim.hyperparameter_names(optimizer).split(","))


#: Place of the step's number in every set.
STEP_PLACE = 4


def has_cuda() -> bool:
    """Whether this build steps CUDA tensors (not whether the machine has a device)."""
    return bool(torch.ops.flashoptim.has_cuda())


@functools.lru_cache(maxsize=1)
def cpu_isa() -> str:
    """The instruction set that steps on CPU tensors use: ``scalar``, ``avx2``, ``avx512`` or ``avx512_bf16``."""
    isa: str = torch.ops.flashoptim.cpu_isa()
    return isa


def same_objects(now: Any, known: list[Any]) -> bool:
    """Whether ``now``, a sequence, holds the very objects of ``known``."""
    in_c = python_functions.get("same_objects")
    if in_c is not None and type(now) is list:
        return bool(in_c(now, known))
    return len(now) == len(known) and all(map(is_, now, known))


def same_states(state: Any, known: list[Any]) -> bool:
    """Whether the values of ``state``, a mapping, are the very objects of ``known``."""
    in_c = python_functions.get("same_states")
    if in_c is not None and isinstance(state, dict):
        return bool(in_c(state, known))
    return len(state) == len(known) and all(map(is_, state.values(), known))
