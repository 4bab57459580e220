"""Every case of PyTorch's own table of optimizers (OptimizerInfo) for SGD, Adam and AdamW, on ours and on torch's.

The table is torch.testing._internal.common_optimizers, whose import needs expecttest; the shim has put ours in it.
FLASHOPTIM_SUITE_QUANTIZE=0 keeps states in fp32.
"""

import copy
import math

import pytest
import torch
from shims.torch_optim import QUANTIZE
from torch.optim.adam import Adam
from torch.optim.adamw import AdamW
from torch.optim.sgd import SGD
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

from flashoptim_native import reconstruct_fp32_param

THEIRS = {"FlashAdam": Adam, "FlashAdamW": AdamW, "FlashSGD": SGD}
INFOS = [info for info in optim_db if info.optim_cls.__name__ in THEIRS]
CASES = [(info, case) for info in INFOS for case in info.optim_inputs_func(device="cpu")]
ERRORS = [
    (info, case, index)
    for info in INFOS
    for index, case in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32))
]
DTYPES = [torch.float32, torch.bfloat16]


def named(case):
    return f"{case[0].optim_cls.__name__}-{case[1].desc or case[2]}".replace(" ", "_")


def parameters(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 33), (7,), (3, 5, 2, 2)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(step + 1)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).bfloat16().to(param.dtype)


def run(optimizer, params, first, last):
    for step in range(first, last):
        set_gradients(params, step)
        optimizer.step()


def options_of(case):
    return {name: value for name, value in case.kwargs.items() if name != "amsgrad"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_steps_follow_torchs(case, dtype):
    info, (params, exact) = case[0], (parameters(dtype), [])
    if case[1].kwargs.get("amsgrad"):
        with pytest.raises(ValueError, match="amsgrad"):
            info.optim_cls(params, **case[1].kwargs)
        return
    exact = [torch.nn.Parameter(p.detach().float()) for p in params]
    start = [p.detach().clone() for p in exact]
    ours = info.optim_cls(params, **options_of(case[1]))
    theirs = THEIRS[info.optim_cls.__name__](exact, **options_of(case[1]))
    run(ours, params, 0, 12)
    run(theirs, exact, 0, 12)
    moved, error = 0.0, 0.0
    for param, other, first in zip(params, exact, start):
        weight = param if dtype == torch.float32 else reconstruct_fp32_param(param, ours.state[param]["correction"])
        moved += float((other - first).pow(2).sum())
        error += float((weight.detach() - other).pow(2).sum())
    keeps = bool(ours.decoded_state(params[0]))  # SGD without momentum has no states to quantize
    # torch's rounding of 1 - lr * weight_decay is 6e-5 of what AdamW moves; 24-bit weights round without bias.
    allowed = 0.03 if QUANTIZE and keeps else 2e-4 if dtype == torch.float32 else 2e-2
    assert math.sqrt(error / moved) < allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_a_loaded_state_goes_on_with_the_same_bits(case, dtype):
    info, params = case[0], parameters(dtype)
    optimizer = info.optim_cls(params, **options_of(case[1]))
    run(optimizer, params, 0, 4)
    others = copy.deepcopy(params)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = info.optim_cls(others, **options_of(case[1]))
    loaded.load_state_dict(saved)
    run(optimizer, params, 4, 8)
    run(loaded, others, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(params, others))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_the_state_of_torchs_is_taken(case):
    info, params = case[0], parameters(torch.float32)
    theirs = THEIRS[info.optim_cls.__name__](params, **options_of(case[1]))
    run(theirs, params, 0, 4)
    others = copy.deepcopy(params)
    ours = info.optim_cls(others, **options_of(case[1]))
    ours.load_state_dict(theirs.state_dict())
    start = [p.detach().clone() for p in params]
    run(theirs, params, 4, 8)
    run(ours, others, 4, 8)
    moved = sum(float((a - b).detach().pow(2).sum()) for a, b in zip(params, start))
    error = sum(float((a - b).detach().pow(2).sum()) for a, b in zip(params, others))
    assert math.sqrt(error / moved) < (0.03 if QUANTIZE else 2e-4)


@pytest.mark.parametrize("case", ERRORS, ids=lambda case: f"{case[0].optim_cls.__name__}-{case[2]}")
def test_what_torch_refuses(case):
    info, (error, index) = case[0], (case[1], case[2])
    given = error.optimizer_error_input
    taken = "either both floats or both Tensors" in error.error_regex  # tensors are numbers to ours, one by one
    warns = issubclass(error.error_type, Warning)

    def make():
        optimizer = info.optim_cls(parameters(torch.float32) if taken else given.params, **given.kwargs)
        if error.error_on == OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()
        return optimizer

    if taken:
        optimizer = make()
        run(optimizer, optimizer.param_groups[0]["params"], 0, 1)
        assert list(map(float, optimizer.param_groups[0]["betas"])) == pytest.approx([0.9, 0.99]), index
    elif warns:
        with pytest.warns(error.error_type, match="duplicate parameters"):
            make()
    else:
        with pytest.raises(error.error_type):
            make()
