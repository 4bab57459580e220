"""fp32 weights in and out, the correction's functions, and cast_model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flashoptim_native
from flashoptim_native import (
    cast_model,
    compute_ecc_bits,
    get_fp32_model_state_dict,
    reconstruct_fp32_param,
    set_fp32_model_state_dict,
)
from helpers import bits, run

MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
EXPONENT_MIN = {torch.bfloat16: -126, torch.float16: -14}


def half_ulp(narrow):
    _, exponent = np.frexp(np.abs(narrow.double().numpy()))
    exponent = np.maximum(np.where(narrow == 0, EXPONENT_MIN[narrow.dtype], exponent - 1), EXPONENT_MIN[narrow.dtype])
    return np.ldexp(1.0, exponent - MANTISSA[narrow.dtype] - 1)


# The correction


@given(
    values=st.lists(st.floats(-60000, 60000, width=32), min_size=1, max_size=40),
    dtype=st.sampled_from(list(MANTISSA)),
    width=st.sampled_from([3, 4]),
)
def test_split_and_merge_are_within_the_bound(values, dtype, width):
    weights = torch.tensor(values, dtype=torch.float32)
    narrow = weights.to(dtype)
    correction = compute_ecc_bits(weights, narrow, width)
    assert correction.dtype == {3: torch.int8, 4: torch.int16}[width] and correction.shape == weights.shape
    back = reconstruct_fp32_param(narrow, correction)
    bound = half_ulp(narrow) / (2 * {3: 127, 4: 32767}[width]) + 2.0**-24 * np.abs(weights.double().numpy()) + 2.0**-149
    assert (np.abs(back.double().numpy() - weights.double().numpy()) <= bound).all()


def test_corrections_of_parameters_rounded_otherwise():
    weights = torch.tensor([1.0, 1.003, -1.003, 1.0 + 2.0**-8])
    truncated = torch.tensor([1.0, 1.0, -1.0, 1.0 + 2.0**-7]).to(torch.bfloat16)
    correction = compute_ecc_bits(weights, truncated, 3)
    assert correction.tolist() == [0, 98, -98, -127]  # 0.003 of half a spacing of 2^-8; the tie taken upwards
    far = compute_ecc_bits(torch.tensor([1.02, 0.5]), torch.tensor([1.0, 1.0]).to(torch.bfloat16), 4)
    assert far.tolist() == [32767, -32767]


def test_shapes_and_layouts_of_the_correction():
    for shape in [(), (0,), (3, 0), (5, 7)]:
        weights = torch.randn(shape)
        narrow = weights.to(torch.bfloat16)
        assert reconstruct_fp32_param(narrow, compute_ecc_bits(weights, narrow)).shape == shape
    weights = torch.randn(40, 33)
    narrow = weights.to(torch.bfloat16)
    expected = compute_ecc_bits(weights, narrow)
    assert torch.equal(compute_ecc_bits(weights.t(), narrow.t()), expected.t())
    assert torch.equal(compute_ecc_bits(weights.t().contiguous().t(), narrow), expected)
    assert torch.equal(reconstruct_fp32_param(narrow.t(), expected.t()), reconstruct_fp32_param(narrow, expected).t())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: reconstruct_fp32_param(torch.ones(3), torch.zeros(3, dtype=torch.int8)),
            "param has dtype torch.float32",
        ),
        (lambda: reconstruct_fp32_param(torch.ones(3).half(), torch.zeros(3)), "error_bits has dtype torch.float32"),
        (
            lambda: reconstruct_fp32_param(torch.ones(3).half(), torch.zeros(4, dtype=torch.int8)),
            r"error_bits has shape \(4,\)",
        ),
        (lambda: compute_ecc_bits(torch.ones(3).double(), torch.ones(3).half()), "fp32_param has dtype torch.float64"),
        (lambda: compute_ecc_bits(torch.ones(3), torch.ones(3)), "narrow_param has dtype torch.float32"),
        (lambda: compute_ecc_bits(torch.ones(3), torch.ones(3).half(), 5), "master_bytewidth = 5"),
        (lambda: compute_ecc_bits(torch.ones(4), torch.ones(3).half()), r"fp32_param has shape \(4,\)"),
    ],
)
def test_wrong_arguments_of_the_correction(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Whole models


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 96)
        self.norm = nn.BatchNorm1d(96)
        self.head = nn.Linear(96, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("counts", torch.arange(3))

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


@pytest.mark.parametrize("options", [{}, {"master_weight_bits": 32}, {"state_codec": "paper"}])
def test_fp32_export_and_import(options):
    torch.manual_seed(1)
    model = cast_model(Tied())
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-2, **options)
    run(optimizer, list(model.parameters()), 0, 3)
    exported = optimizer.get_fp32_model_state_dict(model)
    assert exported.keys() == model.state_dict().keys()
    assert exported["counts"].dtype == torch.int64 and exported["norm.num_batches_tracked"].dtype == torch.int64
    assert exported["embedding.weight"].dtype == torch.float32
    assert torch.equal(exported["head.weight"], exported["embedding.weight"])
    assert not torch.equal(exported["head.weight"], model.head.weight.float())  # more than the parameter holds

    other = cast_model(Tied())
    fresh = flashoptim_native.FlashAdamW(other.parameters(), lr=1e-2, **options)
    fresh.set_fp32_model_state_dict(other, exported)  # before its first step
    again = fresh.get_fp32_model_state_dict(other)
    # A weight halfway between two parameters may come back at the other one, a step of the correction away at most.
    bound = 2.0**-22 if options.get("master_weight_bits") == 32 else 2.0**-15
    for key, value in exported.items():
        torch.testing.assert_close(again[key], value, rtol=bound, atol=0)
        assert (again[key] != value).float().mean() < 0.01
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16, torch.float32}
    assert fresh.state[other.head.weight]["step"] == 0
    run(fresh, list(other.parameters()), 0, 1)
    full = Tied()
    full.load_state_dict(exported)  # an fp32 model takes it as it is


def test_export_of_several_optimizers_and_of_none():
    model = cast_model(nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80)))
    one, two = flashoptim_native.FlashAdamW(model[0].parameters()), flashoptim_native.FlashLion(model[1].parameters())
    run(one, list(model[0].parameters()), 0, 2)
    run(two, list(model[1].parameters()), 0, 2)
    exported = get_fp32_model_state_dict(model, one, two)
    plain = get_fp32_model_state_dict(model)
    assert all(torch.equal(plain[k], model.state_dict()[k].float()) for k in plain)
    assert all(not torch.equal(exported[k], plain[k]) for k in plain)
    weights = {k: torch.randn_like(v) for k, v in exported.items()}
    set_fp32_model_state_dict(model, weights, one, two)
    again = get_fp32_model_state_dict(model, one, two)
    for key, value in weights.items():
        torch.testing.assert_close(again[key], value, rtol=2.0**-15, atol=0)


def test_import_refuses_what_does_not_fit_and_changes_nothing():
    model = cast_model(nn.Linear(8, 4))
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    good = optimizer.get_fp32_model_state_dict(model)
    before = [bits(p) for p in model.parameters()]
    for bad, error, strict in [
        ({**good, "bias": torch.ones(5)}, ValueError, False),
        ({**good, "bias": torch.ones(4).half()}, ValueError, False),
        ({"weight": good["weight"]}, ValueError, True),
        ({**good, "more": good["bias"]}, ValueError, True),
    ]:
        changed = {key: value + 1 for key, value in bad.items()}
        with pytest.raises(error, match="bias|more"):
            optimizer.set_fp32_model_state_dict(model, changed, strict=strict)
        assert [bits(p) for p in model.parameters()] == before
    optimizer.set_fp32_model_state_dict(model, {"weight": good["weight"] + 1})
    assert bits(model.weight) != before[0] and bits(model.bias) == before[1]


def test_import_into_permuted_parameters():
    model = nn.Conv2d(8, 16, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    weights = {k: torch.randn_like(v, dtype=torch.float32) for k, v in model.state_dict().items()}
    optimizer.set_fp32_model_state_dict(model, weights)
    for key, value in optimizer.get_fp32_model_state_dict(model).items():
        torch.testing.assert_close(value, weights[key], rtol=2.0**-15, atol=0)


# cast_model


def make_model():
    return nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2)
    )


def dtypes(model):
    return {name: p.dtype for name, p in model.named_parameters()}


def test_cast_model_keeps_running_statistics():
    model = make_model()
    assert cast_model(model) is model
    found = dtypes(model)
    assert found["0.weight"] == found["2.weight"] == found["4.bias"] == torch.bfloat16
    assert found["1.weight"] == model[1].running_mean.dtype == torch.float32
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert model(torch.randn(4, 8).to(torch.bfloat16)).dtype == torch.bfloat16
    assert cast_model(make_model(), torch.float16, selective=False)[1].weight.dtype == torch.float16


@pytest.mark.parametrize("spec", ["4", lambda m: m[4], "[4]"])
def test_full_precision_layers(spec):
    model = make_model()
    cast_model(model, full_precision_layers=[spec(model) if callable(spec) else spec])
    assert dtypes(model)["4.weight"] == torch.float32 and dtypes(model)["3.0.weight"] == torch.bfloat16
    assert model(torch.randn(4, 8).to(torch.bfloat16)).dtype == torch.float32


def test_full_precision_recast_layers_hold_their_insides_and_survive_copies():
    model = cast_model(make_model(), full_precision_recast_layers=["3"])
    assert dtypes(model)["3.0.weight"] == torch.float32
    x = torch.randn(4, 8).to(torch.bfloat16)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(x).dtype == torch.bfloat16
        assert copied[3](x).dtype == torch.bfloat16
    hooks = len(model[3]._forward_hooks)
    cast_model(model, full_precision_recast_layers=["3"])
    assert len(model[3]._forward_hooks) == hooks


def test_cast_model_keeps_ties_and_gradients_fit():
    model = Tied()
    model(torch.arange(8)).sum().backward()
    cast_model(model)
    assert model.head.weight is model.embedding.weight and model.head.weight.dtype == torch.bfloat16
    assert model.head.weight.grad.dtype == torch.bfloat16
    kept = cast_model(Tied(), full_precision_layers=["head"])
    assert kept.embedding.weight.dtype == torch.float32


def test_cast_model_arguments():
    with pytest.raises(ValueError, match="dtype = torch.float64"):
        cast_model(make_model(), torch.float64)
    with pytest.raises(TypeError, match="full_precision_layers = 'head' is a str"):
        cast_model(make_model(), full_precision_layers="head")
    with pytest.warns(UserWarning, match="'head' matches no module"):
        cast_model(make_model(), full_precision_layers=["head"])


def test_a_cast_model_trains():
    model = cast_model(make_model(), full_precision_layers=["4"])
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-2)
    x = torch.randn(64, 8)
    target = x[:, :2] * 2
    losses = []
    for _ in range(150):
        loss = nn.functional.mse_loss(model(x.to(torch.bfloat16)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
