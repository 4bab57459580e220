"""The update rules in float64: tests/oracle/oracle.h, written from the papers; shares nothing with the package.

``step(kind, w, g, state, t, **hypers)`` returns the new weights and changes ``state`` in place; ``bounded_step`` says
how far fp32 arithmetic may be off as well. ``t`` counts from 1.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

from flashoptim_native import _ops

_DOUBLES = ctypes.POINTER(ctypes.c_double)
#: Slots of every optimizer, as its rule names them.
STATES = {kind: tuple(slot.name for slot in _ops.describe(kind).slots) for kind in _ops.optimizer_names()}


def _library():
    """flashoptim_oracle of the build that the operators come from; FLASHOPTIM_ORACLE names another."""
    path = os.environ.get("FLASHOPTIM_ORACLE")
    if path is None:
        path = _ops.library_path().resolve().parents[2] / "tests" / "libflashoptim_oracle.so"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file: build flashoptim_oracle, or let FLASHOPTIM_ORACLE name it")
    return ctypes.CDLL(str(path))


_step = _library().flashoptim_oracle_step


def new_state(kind, shape):
    return {name: np.zeros(shape) for name in STATES[kind]}


def _settings(kind, hypers):
    settings = {one.name: one.default for one in _ops.describe(kind).hyperparameters}
    settings.pop("seed")
    for name, value in hypers.items():
        if name == "betas":
            settings |= {f"beta{number}": beta for number, beta in enumerate(value, 1)}
        elif name == "first_lr":  # fully decoupled decay, by weight_decay * lr / first_lr
            settings["decay_lr"] = value
        else:
            settings[name] = value or 0.0
    return settings


def _array(values):
    return np.array(values, np.float64, order="C", ndmin=1)


def bounded_step(kind, w, g, state, t, **hypers):
    """New weights, and the bound on an fp32 update's error."""
    settings = _settings(kind, {**hypers, "step": t})
    shape = np.shape(w)
    weights, gradients = _array(w), _array(g)
    bounds = np.zeros_like(weights)
    slots = [_array(state[name]) for name in STATES[kind]]
    pointers = (_DOUBLES * max(len(slots), 1))(*(slot.ctypes.data_as(_DOUBLES) for slot in slots))
    names = (ctypes.c_char_p * len(settings))(*(name.encode() for name in settings))
    values = (ctypes.c_double * len(settings))(*(float(value) for value in settings.values()))
    known = _step(
        kind.encode(),
        ctypes.c_int64(len(settings)),
        names,
        values,
        ctypes.c_int64(weights.size),
        weights.ctypes.data_as(_DOUBLES),
        gradients.ctypes.data_as(_DOUBLES),
        ctypes.c_int64(len(slots)),
        pointers,
        bounds.ctypes.data_as(_DOUBLES),
    )
    assert known, f"tests/oracle/oracle.h does not know {kind}, or one of {sorted(settings)}"
    for name, slot in zip(STATES[kind], slots):
        state[name] = slot.reshape(shape)
    return weights.reshape(shape), bounds.reshape(shape)


def step(kind, w, g, state, t, **hypers):
    return bounded_step(kind, w, g, state, t, **hypers)[0]
