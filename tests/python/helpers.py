"""What several test files need."""

from __future__ import annotations

import copy

import numpy as np
import torch

import flashoptim_native
from flashoptim_native import _ops, optimizers

#: The optimizers by kind, in the order of their classes.
CLASSES = {
    cls.kind: cls
    for cls in (getattr(optimizers, f"Flash{_ops.describe(kind).title}") for kind in _ops.optimizer_names())
}
_HYPERS = {"eps": 1e-3, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.3}


def hypers_of(kind):
    """Hyperparameters that let no term vanish: what is not named above is a few steps, or above 1."""
    description = _ops.describe(kind)
    hypers = {"lr": 1e-2 if "sgd" in kind else 3e-3}
    if description.betas() > 0:
        hypers["betas"] = (0.8, 0.95, 0.975)[: description.betas()]
    for name, number, default in ((one.name, one.kind, one.default) for one in description.hyperparameters[6:]):
        if number != "flag" and not name.removeprefix("beta").isdigit():
            hypers[name] = _HYPERS.get(name, 5 if number == "whole" else 0.5 * default + 1)
    return hypers | {"weight_decay": 0.1}


HYPERS = {kind: hypers_of(kind) for kind in CLASSES}

SHAPES = [(96, 64), (33,), (31,), (1,), (0,), (5000,), (8, 4, 3, 3), ()]


def make_params(dtype=torch.bfloat16, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params, step, scale=0.1):
    """The gradients of step ``step``: the same for every optimizer that takes it, wherever the parameters are."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.device, param.dtype)


def run(optimizer, params, first, last):
    for step in range(first, last):
        set_grads(params, step)
        optimizer.step()


def bits(tensor):
    """The bytes of a tensor in logical order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(a, b):
    """Parameters and states of two (params, optimizer) pairs agree in every bit."""
    (params_a, optimizer_a), (params_b, optimizer_b) = a, b
    for p, q in zip(params_a, params_b, strict=True):
        assert p.dtype == q.dtype and bits(p) == bits(q)
        state_p, state_q = optimizer_a.state.get(p, {}), optimizer_b.state.get(q, {})
        assert state_p.keys() == state_q.keys()
        for key, value in state_p.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == state_q[key].dtype and bits(value) == bits(state_q[key]), key
            else:
                assert value == state_q[key], key


def snapshot(optimizer):
    """Everything an error must leave as it was."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = [copy.deepcopy(dict(optimizer.state.get(p, {}))) for p in params]
    return [bits(p) for p in params], copy.deepcopy(groups), states


def assert_untouched(optimizer, before):
    now = snapshot(optimizer)
    assert now[0] == before[0]
    assert now[1] == before[1]
    for old, new in zip(before[2], now[2], strict=True):
        assert old.keys() == new.keys()
        for key, value in old.items():
            assert torch.equal(value, new[key]) if isinstance(value, torch.Tensor) else value == new[key], key


def master_weights(optimizer, param):
    """fp32 weights behind a parameter, as float64 NumPy."""
    state = optimizer.state.get(param, {})
    if "correction" in state:
        return flashoptim_native.reconstruct_fp32_param(param, state["correction"]).double().numpy()
    return param.detach().double().numpy()


def to_numpy(tensor):
    return tensor.detach().double().numpy()


def relative_error(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
