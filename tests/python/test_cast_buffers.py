"""cast_model() leaves buffers alone that 16 bits would spoil, and keeps in fp32 whatever a pattern names."""

import warnings

import pytest
import torch
from torch import nn

from flashoptim_native import cast_model


def holder(persistent=True, **buffers):
    module = nn.Module()
    module.inner = nn.Linear(8, 8)
    for name, value in buffers.items():
        module.inner.register_buffer(name, value, persistent=persistent)
    return module


INV_FREQ = 1.0 / 10000 ** (torch.arange(0, 32, 2).float() / 32)
BETAS = torch.linspace(1e-4, 0.02, 1000)
LEFT_ALONE = {
    "inv_freq": INV_FREQ,
    "freqs_cos": torch.outer(torch.arange(16.0), INV_FREQ).cos(),
    "rotary_table": torch.rand(4, 4),
    "position_bias": torch.rand(4, 4),
    "alphas_cumprod": torch.cumprod(1 - BETAS, 0),
    # by range, whatever the name
    "a": INV_FREQ,
    "b": INV_FREQ[None, :, None],
    "c": torch.arange(4096.0),
    "d": torch.tensor([[3.0, 513.0, 2.0]]),
    "e": BETAS,
    "f": torch.tensor([1e-42, 1.0, 0.5]),
    "g": torch.tensor([3.0e38 * 1.13, 0.0]),
}
CAST = {
    "h": torch.rand(16, 16),
    "mask": torch.tensor([0.0, -float("inf")] * 8),
    "i": torch.tensor([1.0, 2.0, 256.0]),
    "j": torch.arange(7.0),  # too short to be told from a chance
    "k": torch.ones(64),
    "l": torch.tensor(0.1),
    "m": torch.empty(0),
    "pos_embed": torch.rand(1, 16, 8),
}


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("name", LEFT_ALONE)
def test_buffers_that_are_left_alone(name, persistent):
    model = holder(persistent, **{name: LEFT_ALONE[name].clone()})
    cast_model(model)
    assert model.inner.weight.dtype == torch.bfloat16
    assert torch.equal(model.inner.get_buffer(name), LEFT_ALONE[name])


@pytest.mark.parametrize("name", CAST)
def test_buffers_that_are_cast(name):
    model = holder(**{name: CAST[name].clone()})
    cast_model(model)
    assert torch.equal(model.inner.get_buffer(name), CAST[name].bfloat16())


def test_the_range_is_that_of_the_dtype():
    values = torch.tensor([1e-9, 1.0, 0.5, 70000.0])
    for dtype, left in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        model = holder(x=values.clone())
        cast_model(model, dtype)
        assert model.inner.x.dtype == left


def test_rotary_phases_stay_exact():
    model = holder(inv_freq=INV_FREQ.clone())
    cast_model(model)
    assert float((4096 * (model.inner.inv_freq.double() - INV_FREQ.double())).abs().max()) == 0.0


def test_other_dtypes_of_buffers():
    doubles, halves, whole = INV_FREQ.double(), INV_FREQ.half(), torch.arange(4096)
    model = holder(a=doubles.clone(), b=halves.clone(), c=whole.clone())
    cast_model(model)
    assert torch.equal(model.inner.a, doubles) and torch.equal(model.inner.c, whole)
    assert model.inner.b.dtype == torch.bfloat16  # 16 bits already
    cast_model(model, torch.float32)
    assert model.inner.a.dtype == torch.float32 and model.inner.weight.dtype == torch.float32


def test_buffers_that_are_cast_nonetheless():
    model = holder(inv_freq=INV_FREQ.clone(), other=INV_FREQ.clone())
    cast_model(model, cast_buffers=["*.inv_freq"])
    assert model.inner.inv_freq.dtype == torch.bfloat16 and model.inner.other.dtype == torch.float32
    with pytest.warns(UserWarning, match=r"cast_buffers: '\*.nothing' matches no buffer"):
        cast_model(model, cast_buffers=["*.nothing"])
    with pytest.raises(TypeError, match="cast_buffers = 'x' is a str"):
        cast_model(model, cast_buffers="x")


def test_patterns_name_parameters_and_buffers():
    model = holder(table=torch.rand(4, 4))
    model.inner.register_buffer("other", torch.rand(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cast_model(model, full_precision_layers=["*.table", "inner.bias"])
    assert model.inner.table.dtype == model.inner.bias.dtype == torch.float32
    assert model.inner.weight.dtype == model.inner.other.dtype == torch.bfloat16
    assert not model.inner._forward_pre_hooks


def test_running_statistics_without_selective():
    model = nn.BatchNorm1d(16)
    cast_model(model, selective=False)
    assert model.running_mean.dtype == torch.bfloat16


def test_on_the_meta_device():
    with torch.device("meta"):
        model = holder(inv_freq=torch.empty(16), x=torch.empty(16))
    cast_model(model)
    assert model.inner.inv_freq.dtype == torch.float32 and model.inner.x.dtype == torch.bfloat16
