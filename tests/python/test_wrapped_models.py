"""fp32 weights of models behind wrappers: the model's own names, out and in."""

import warnings

import pytest
import torch
from torch import nn

from flashoptim_native import FlashAdamW, cast_model, get_fp32_model_state_dict, set_fp32_model_state_dict
from helpers import bits, set_grads


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))  # a name that wrappers have, too
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x):
        return self.module(self.first(x)) * self.scale


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_part(model):
    model.first = compiled(model.first)
    model.module[0] = compiled(model.module[0])
    return model


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS = {
    "none": lambda m: m,
    "compile": compiled,
    "parts": compiled_part,
    "data parallel": nn.DataParallel,
    "ddp": ddp,
    "compile of ddp": lambda m: compiled(ddp(m)),
    "ddp of compile": lambda m: ddp(compiled(m)),
    "all": lambda m: compiled(ddp(compiled(compiled_part(m)))),
}


def trained(wrap):
    model = cast_model(Model())
    optimizer = FlashAdamW(model.parameters(), lr=1e-2)
    wrapped = wrap(model)
    for step in range(2):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    return wrapped, optimizer


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_and_values_are_the_models_own(wrapper, process_group):
    plain, plain_optimizer = trained(WRAPPERS["none"])
    expected = get_fp32_model_state_dict(plain, plain_optimizer)
    wrapped, optimizer = trained(WRAPPERS[wrapper])
    found = get_fp32_model_state_dict(wrapped, optimizer)
    assert list(found) == list(expected) == list(Model().state_dict())
    assert all(bits(found[key]) == bits(expected[key]) for key in expected)
    other, other_optimizer = trained(WRAPPERS[wrapper])
    zero = {key: torch.zeros_like(value) for key, value in expected.items()}
    assert other_optimizer.set_fp32_model_state_dict(other, zero, strict=True) == ([], [])
    other_optimizer.set_fp32_model_state_dict(other, expected, strict=True)
    again = other_optimizer.get_fp32_model_state_dict(other)
    for key, value in expected.items():
        assert (again[key].cpu() - value).abs().max() <= 2**-14 * value.abs().max(), key


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "module.module.", "_orig_mod.module."]
)
def test_names_with_wrappers_in_them_are_taken(prefix):
    model, optimizer = trained(WRAPPERS["none"])
    expected = {key: value + 1 for key, value in get_fp32_model_state_dict(model, optimizer).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.set_fp32_model_state_dict(model, {prefix + key: v for key, v in expected.items()}, strict=True)
    found = get_fp32_model_state_dict(model, optimizer)
    assert all(torch.allclose(found[key], value, rtol=1e-4) for key, value in expected.items())


def test_what_does_not_fit_is_told():
    model, optimizer = trained(WRAPPERS["none"])
    weights = get_fp32_model_state_dict(model, optimizer)
    del weights["scale"]
    weights["head.weight"] = weights["tail.bias"] = torch.ones(3)
    with pytest.warns(UserWarning, match=r"2 of 8 entries of state_dict are not loaded.* head.weight, tail.bias"):
        keys = set_fp32_model_state_dict(model, weights, optimizer)
    assert keys.missing_keys == ["scale"] and keys.unexpected_keys == ["head.weight", "tail.bias"]
    with pytest.raises(ValueError, match="lacks .*scale.* holds .*head.weight"):
        set_fp32_model_state_dict(model, weights, optimizer, strict=True)


def test_one_name_twice():
    model, optimizer = trained(WRAPPERS["none"])
    weights = get_fp32_model_state_dict(model, optimizer)
    weights["_orig_mod.scale"] = weights["scale"]
    with pytest.raises(ValueError, match="'scale' twice, once as '_orig_mod.scale'"):
        set_fp32_model_state_dict(model, weights, optimizer)


def test_a_parameter_called_as_wrappers_call_theirs():
    """``module`` and its like are left out where a wrapper put them, and nowhere else."""
    model = nn.ModuleDict({"module": nn.ModuleDict({"module": nn.Linear(8, 8)})})
    optimizer = FlashAdamW(model.parameters())
    assert list(get_fp32_model_state_dict(model, optimizer)) == ["module.module.weight", "module.module.bias"]
    wrapped = nn.DataParallel(model)
    assert list(get_fp32_model_state_dict(wrapped, optimizer)) == ["module.module.weight", "module.module.bias"]
