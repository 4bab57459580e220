"""The C++ front end and the Python package leave the same bytes on the same inputs.

The C++ side is the program tests/front_ends/front_end_bytes, named by FLASHOPTIM_FRONT_END_BYTES.
"""

import os
import subprocess
import warnings

import pytest
import torch

from flashoptim_native import _ops
from helpers import CLASSES

PROGRAM = os.environ.get("FLASHOPTIM_FRONT_END_BYTES")
SHAPES = [(64, 100), (5000,), (33,), (3, 7), (8, 32, 3, 3)]
STEPS = 7

KNOWN = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "momentum": 0.8, "dampening": 0.2, "nesterov": False}


def of_hyperparameters(kind):
    """The same as value_of in tests/front_ends/front_end_bytes.cpp."""
    known = KNOWN | ({"dampening": 0.0, "nesterov": True} if kind == "sgdw" else {})
    arguments, betas = {}, []
    for name, number, default, _, highest in _ops.describe(kind).hyperparameters[6:]:
        other = 5 if number == "whole" else 0.975 if highest == 1.0 else 0.5 * default + 1.0
        if name.removeprefix("beta").isdigit():
            betas.append(known.get(name, other))
        else:
            arguments[name] = known.get(name, other)
    return arguments | ({"betas": tuple(betas)} if betas else {})


def ramp(shape, slope, offset):
    numel = torch.Size(shape).numel()
    return torch.sin(torch.arange(numel, dtype=torch.float64) * slope + offset).reshape(shape)


def raw(tensor):
    if tensor is None or tensor.numel() == 0:
        return b""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.fixture(scope="module")
def cpp_bytes(tmp_path_factory):
    if not PROGRAM:
        pytest.skip("FLASHOPTIM_FRONT_END_BYTES names no program: the C++ front end was not built")
    folder = tmp_path_factory.mktemp("front_ends")
    subprocess.run([PROGRAM, str(folder)], check=True)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", [None, 24, 32])
@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("name", list(CLASSES))
def test_same_bytes(cpp_bytes, name, codec, bits, dtype):
    cls, arguments = CLASSES[name], of_hyperparameters(name)
    params = [torch.nn.Parameter((ramp(s, 0.37, i) * 0.5).to(dtype)) for i, s in enumerate(SHAPES)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # master_weight_bits=None with 16-bit parameters warns
        opt = cls(params, lr=3e-3, weight_decay=0.1, state_codec=codec, master_weight_bits=bits, seed=7, **arguments)
    for t in range(STEPS):
        for i, p in enumerate(params):
            p.grad = (ramp(SHAPES[i], 0.11 * (t + 1), i) * 1e-2).to(dtype)
        opt.step()
    python = b""
    for p in params:
        state = opt.state[p]
        python += raw(p) + raw(state.get("correction"))
        for slot in _ops.state_names(name, True):
            python += raw(state.get(slot + "_codes", state.get(slot))) + raw(state.get(slot + "_scale"))
    file = cpp_bytes / f"{name}-{codec}-{bits or 0}-{str(dtype).removeprefix('torch.')}.bin"
    assert python == file.read_bytes()
