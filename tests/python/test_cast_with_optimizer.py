"""cast_model() of a model that an optimizer holds already: training goes on from the fp32 weights."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

from flashoptim_native import FlashAdamW, FlashSGD, cast_model
from helpers import bits


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(96, 80), nn.BatchNorm1d(80), nn.Linear(80, 8))


def set_grads(model, seed=0):
    for number, p in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * seed + number)
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def largest_error(model, optimizer, exact):
    """Over half a spacing of the 16-bit parameter, the share of its value that is lost."""
    found = optimizer.get_fp32_model_state_dict(model)
    narrow = {k: v.to(model.state_dict()[k].dtype).float() for k, v in exact.items()}
    lost = max(float((found[k] - v).abs().max()) for k, v in exact.items())
    rounded = max(float((narrow[k] - v).abs().max()) for k, v in exact.items())
    return lost / rounded


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("bits_kept", "most"), [(24, 1 / 127), (32, 1 / 32767)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_optimizer_keeps_what_the_cast_cuts_off(given, bits_kept, most, dtype):
    model = make()
    exact = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    optimizer = FlashAdamW(model.parameters(), lr=1e-5, master_weight_bits=bits_kept)
    assert cast_model(model, dtype, optimizer=optimizer if given else None) is model
    assert model[0].weight.dtype == dtype and model[1].weight.dtype == torch.float32
    assert bits(model[0].weight) == bits(exact["0.weight"].to(dtype))
    assert largest_error(model, optimizer, exact) <= 1.01 * most  # fp32 rounds their difference
    assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.mark.parametrize("cls", [FlashAdamW, FlashSGD])
def test_the_same_as_weights_given_after_the_cast(cls):
    options = {"momentum": 0.9, "dampening": 0.5} if cls is FlashSGD else {}
    first, second = make(), make()
    exact = {k: v.clone() for k, v in second.state_dict().items()}
    a = cls(first.parameters(), lr=1e-4, **options)
    cast_model(first)
    cast_model(second)
    b = cls(second.parameters(), lr=1e-4, **options)
    b.set_fp32_model_state_dict(second, exact)
    for step in range(3):
        for model, optimizer in ((first, a), (second, b)):
            set_grads(model, step)
            optimizer.step()
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert bits(p) == bits(q)
        for key, value in a.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b.state[q][key])), key


def test_a_cast_in_mid_training_keeps_states_and_weights():
    model = make()
    optimizer = FlashAdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        set_grads(model, step)
        optimizer.step()
    exact = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    states = {name: optimizer.decoded_state(p) for name, p in model.named_parameters()}
    cast_model(model)
    assert largest_error(model, optimizer, exact) <= 1 / 127
    for name, p in model.named_parameters():
        assert optimizer.state[p]["step"] == 3
        for slot, value in optimizer.decoded_state(p).items():
            assert torch.equal(value, states[name][slot])
    set_grads(model, 3)
    optimizer.step()


def test_small_updates_arrive_that_a_rounded_start_loses():
    """Towards fp32 weights that are less than half a spacing away from where a rounded model starts."""
    torch.manual_seed(0)
    target = nn.Linear(64, 64, bias=False)
    errors = []
    for optimizer_first in (True, False):
        model = copy.deepcopy(target)
        optimizer = FlashAdamW(model.parameters(), lr=1e-7, weight_decay=0.0) if optimizer_first else None
        cast_model(model)
        if optimizer is None:
            optimizer = FlashAdamW(model.parameters(), lr=1e-7, weight_decay=0.0)
        set_grads(model)
        optimizer.step()
        weights = optimizer.get_fp32_model_state_dict(model)["weight"]
        errors.append(float((weights - target.weight.detach()).abs().max()))
    assert errors[0] < errors[1] / 50


def test_several_optimizers_and_frozen_parameters():
    model = make()
    model[0].bias.requires_grad_(False)
    exact = {k: v.clone() for k, v in model.state_dict().items()}
    first, second = FlashAdamW(model[0].parameters()), FlashSGD(model[2].parameters(), lr=0.1)
    other = FlashAdamW(make().parameters())
    cast_model(model, optimizer=[first, second])
    assert first.state[model[0].weight]["correction"].any() and second.state[model[2].weight]["correction"].any()
    assert model[0].bias not in first.state  # not trained: no memory
    assert not other.state
    assert bits(model[0].bias) == bits(exact["0.bias"].bfloat16())


def test_only_the_optimizer_that_is_named():
    model = make()
    first, second = FlashAdamW(model[0].parameters()), FlashSGD(model[2].parameters(), lr=0.1)
    cast_model(model, optimizer=first)
    assert first.state and not second.state


def test_tied_parameters():
    model = nn.ModuleList([nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)])
    model[1].weight = model[0].weight
    exact = model[0].weight.detach().clone()
    optimizer = FlashAdamW(model.parameters())
    cast_model(model, optimizer=optimizer)
    assert model[1].weight is model[0].weight
    found = optimizer.get_fp32_model_state_dict(model)
    assert torch.equal(found["0.weight"], found["1.weight"])
    assert (found["0.weight"] - exact).abs().max() < 1e-5


def test_without_corrections_nothing_is_made():
    model = make()
    optimizer = FlashAdamW(model.parameters(), master_weight_bits=None, stochastic_rounding=True)
    cast_model(model, optimizer=optimizer)
    assert not optimizer.state


def test_wrong_optimizers():
    model = make()
    with pytest.raises(TypeError, match="optimizer is a AdamW"):
        cast_model(model, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        cast_model(model, optimizer=FlashAdamW(make().parameters()))
    assert model[0].weight.dtype == torch.float32


LOST = r"'0\.weight' was torch.float32 at its last step and is {} now: .* cast_model.* reset_corrections\(\)"


@pytest.mark.parametrize("bits_kept", [24, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_digits_that_a_cast_behind_a_step_has_cut_off_are_said_to_be_lost(dtype, bits_kept):
    model = make()
    optimizer = FlashAdamW(model.named_parameters(), lr=1e-4, master_weight_bits=bits_kept)
    set_grads(model)
    optimizer.step()
    model.to(dtype)
    set_grads(model, 1)
    narrow = {k: v.detach().clone() for k, v in model.named_parameters()}
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="was torch.float32"):
            optimizer.step()
    assert all(bits(v) == bits(narrow[k]) for k, v in model.named_parameters())
    assert str(optimizer.state_dict()) == str(before)
    with pytest.warns(UserWarning) as said:
        optimizer.step()
    assert len(said) == len(narrow), "each parameter"
    assert re.search(LOST.format(dtype), str(said[0].message))
    # A correction of zeros, from which small steps count.
    assert all("correction" in state and state["step"] == 2 for state in optimizer.state.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_grads(model, 2)
        optimizer.step()


@pytest.mark.parametrize("meant", ["cast_model", "reset_corrections", "export", "no corrections"])
def test_a_cast_that_keeps_digits_or_is_meant_says_nothing(meant):
    model = make()
    bits_kept = None if meant == "no corrections" else 24
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = FlashAdamW(model.parameters(), lr=1e-4, master_weight_bits=bits_kept)
    set_grads(model)
    optimizer.step()
    weights = optimizer.get_fp32_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if meant == "cast_model":
            cast_model(model)
        else:
            model.to(torch.bfloat16)
        if meant == "reset_corrections":
            optimizer.reset_corrections()
        if meant == "export":
            optimizer.set_fp32_model_state_dict(model, weights)
        set_grads(model, 1)
        optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())
