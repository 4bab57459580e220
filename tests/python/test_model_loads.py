"""Weights that change behind the optimizer: which corrections stay, which go, and which come back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import flashoptim_native
from flashoptim_native import FlashAdamW, FlashSGD
from helpers import bits

KINDS = {"24": {}, "32": {"master_weight_bits": 32}, "fp16": {}}


def make(seed=0, dtype=torch.bfloat16, optimizer=FlashAdamW, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 24)).to(dtype)
    return model, optimizer(model.parameters(), lr=1e-2, **options)


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        dtype = model[0].weight.dtype
        x = torch.randn(8, 48, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).float().pow(2).mean().backward()
        optimizer.step()


def corrections(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [bits(optimizer.state[p]["correction"]) for p in params]


def everything(model, optimizer):
    return [bits(p) for p in model.parameters()], corrections(optimizer)


def weights(model, optimizer):
    return {name: bits(w) for name, w in optimizer.get_fp32_model_state_dict(model).items()}


def others(model, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=generator).to(v.dtype) for k, v in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_weights_are_the_weights(kind):
    model, optimizer = make(dtype=torch.float16 if kind == "fp16" else torch.bfloat16, **KINDS[kind])
    train(model, optimizer, 0, 3)
    new = others(model)
    model.load_state_dict(new)
    assert weights(model, optimizer) == {name: bits(w.float()) for name, w in new.items()}
    assert all(not optimizer.state[p]["correction"].any() for p in model.parameters())


def test_a_part_of_the_model_is_loaded():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    before = corrections(optimizer)
    model.load_state_dict({"0.weight": others(model)["0.weight"]}, strict=False)
    assert corrections(optimizer)[1:] == before[1:]
    assert not optimizer.state[model[0].weight]["correction"].any()
    model[2].load_state_dict(others(model[2]))  # a module of its own
    assert not optimizer.state[model[2].bias]["correction"].any()
    assert corrections(optimizer)[1] == before[1]


def test_a_load_that_raises_has_loaded_something():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    before = corrections(optimizer)
    new = others(model)
    new["2.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(new)
    assert not optimizer.state[model[0].weight]["correction"].any()
    assert corrections(optimizer)[3] == before[3]


def by_data(model, values):
    for name, param in model.named_parameters():
        param.data = values[name].clone()


def by_copy(model, values):
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(values[name])


def by_swapped_storage(model, values):
    for name, param in model.named_parameters():
        param.data.copy_(values[name])


def by_load(model, values):
    model.load_state_dict(values)


@pytest.mark.parametrize("swap", [by_data, by_copy, by_swapped_storage, by_load])
def test_a_swap_in_and_out_comes_back_to_the_same_bits(swap):
    model, optimizer = make()
    twin, twin_optimizer = make()
    train(model, optimizer, 0, 3)
    train(twin, twin_optimizer, 0, 3)
    for seed in (9, 10):
        backup = {k: v.clone() for k, v in model.state_dict().items()}
        swap(model, others(model, seed))
        model(torch.ones(1, 48).bfloat16())
        swap(model, backup)
    assert everything(model, optimizer) == everything(twin, twin_optimizer)
    train(model, optimizer, 3, 6)
    train(twin, twin_optimizer, 3, 6)
    assert everything(model, optimizer) == everything(twin, twin_optimizer)


def test_several_loads_before_the_weights_come_back():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    before = everything(model, optimizer)
    backup = copy.deepcopy(model.state_dict())
    for seed in (9, 10, 11):
        model.load_state_dict(others(model, seed))
        assert all(not optimizer.state[p]["correction"].any() for p in model.parameters())
    model.load_state_dict(backup)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_step_makes_loaded_weights_the_weights(one_by_one):
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    backup = copy.deepcopy(model.state_dict())
    model.load_state_dict(others(model))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        if one_by_one:
            optimizer.step_param(p)
    if not one_by_one:
        optimizer.step()
    model.load_state_dict(backup)
    assert all(not optimizer.state[p]["correction"].any() for p in model.parameters())


def saved(after=3):
    model, optimizer = make()
    train(model, optimizer, 0, after)
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()), (model, optimizer)


def without_weights(state_dict):
    """As torch.distributed.checkpoint gives it: nothing but states and groups."""
    return {key: state_dict[key] for key in ("state", "param_groups")}


ORDERS = ["model first", "optimizer first", "model twice", "optimizer between", "optimizer twice"]


@pytest.mark.parametrize("says_weights", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("in_training", [False, True])
def test_a_resume_is_exact_in_any_order(order, in_training, says_weights):
    model_state, optimizer_state, (model, optimizer) = saved()
    if not says_weights:
        optimizer_state = without_weights(optimizer_state)
    train(model, optimizer, 3, 6)
    resumed, resumed_optimizer = make(seed=5)
    if in_training:  # rolled back
        train(resumed, resumed_optimizer, 20, 23)
    loads = {
        "model first": "MO",
        "optimizer first": "OM",
        "model twice": "MOM",
        "optimizer between": "OMM",
        "optimizer twice": "OMO",
    }[order]
    for load in loads:
        if load == "M":
            resumed.load_state_dict(model_state)
        else:
            resumed_optimizer.load_state_dict(optimizer_state)
    train(resumed, resumed_optimizer, 3, 6)
    assert everything(resumed, resumed_optimizer) == everything(model, optimizer)


def test_weights_before_the_checkpoint_do_not_matter():
    """A pretrained model is loaded first, then the optimizer's checkpoint, then the model's."""
    model_state, optimizer_state, (model, optimizer) = saved()
    resumed, resumed_optimizer = make(seed=5)
    resumed.load_state_dict(others(resumed))
    resumed_optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(model_state)
    assert everything(resumed, resumed_optimizer) == everything(model, optimizer)


def test_other_weights_than_the_checkpoints():
    """Both are loaded, and then other weights, before any step: those are the weights. Going back is exact."""
    model_state, optimizer_state, (model, optimizer) = saved()
    before = everything(model, optimizer)
    resumed, resumed_optimizer = make(seed=5)
    resumed.load_state_dict(model_state)
    resumed_optimizer.load_state_dict(optimizer_state)
    new = others(resumed)
    resumed.load_state_dict(new)
    assert weights(resumed, resumed_optimizer) == {name: bits(w.float()) for name, w in new.items()}
    resumed.load_state_dict(model_state)
    assert everything(resumed, resumed_optimizer) == before


def test_a_checkpoint_made_while_other_weights_are_loaded():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    backup = copy.deepcopy(model.state_dict())
    model.load_state_dict(others(model))
    state = copy.deepcopy(optimizer.state_dict())
    model.load_state_dict(backup)
    resumed, resumed_optimizer = make(seed=5)
    resumed_optimizer.load_state_dict(state)
    resumed.load_state_dict(others(model))
    assert all(not resumed_optimizer.state[p]["correction"].any() for p in resumed.parameters())


def test_fp32_weights_are_given_after_a_load():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    exact = {k: v.clone() for k, v in optimizer.get_fp32_model_state_dict(model).items()}
    backup = copy.deepcopy(model.state_dict())
    model.load_state_dict(others(model))
    optimizer.set_fp32_model_state_dict(model, {k: v + 1.0 for k, v in exact.items()})
    given = corrections(optimizer)
    model.load_state_dict(backup)  # what was kept is gone: the weights were given since
    assert corrections(optimizer) != given
    assert all(not optimizer.state[p]["correction"].any() for p in model.parameters())


def test_reset_corrections_is_for_good():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    backup = copy.deepcopy(model.state_dict())
    model.load_state_dict(others(model))
    optimizer.reset_corrections([model[0].weight])
    model.load_state_dict(backup)
    assert not optimizer.state[model[0].weight]["correction"].any()
    assert optimizer.state[model[2].weight]["correction"].any()


def test_several_optimizers_of_a_model():
    model, _ = make()
    first = FlashAdamW(model[0].parameters(), lr=1e-2)
    second = FlashSGD(model[2].parameters(), lr=1e-1, momentum=0.9)
    for optimizer in (first, second):
        train(model, optimizer, 0, 3)
    before = corrections(second)
    model[0].load_state_dict(others(model[0]))
    assert all(not first.state[p]["correction"].any() for p in model[0].parameters())
    assert corrections(second) == before
    model.load_state_dict(others(model))
    assert all(not second.state[p]["correction"].any() for p in model[2].parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_see_loads_of_their_own_model(copied):
    pair = make()
    train(*pair, 0, 3)
    before = corrections(pair[1])
    twin, twin_optimizer = copied(pair)
    twin.load_state_dict(others(twin))
    assert all(not twin_optimizer.state[p]["correction"].any() for p in twin.parameters())
    assert corrections(pair[1]) == before


class Wrapper(nn.Module):
    """Loads in a way of its own, as wrappers of adapters do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return self.module.load_state_dict(state_dict, strict, assign)


def test_a_wrapper_with_a_load_of_its_own():
    model_state, optimizer_state, (model, optimizer) = saved()
    wrapped, wrapped_optimizer = make(seed=5)
    wrapped_optimizer.load_state_dict(without_weights(optimizer_state))
    Wrapper(wrapped).load_state_dict(model_state)
    assert everything(wrapped, wrapped_optimizer) == everything(model, optimizer)
    Wrapper(wrapped).load_state_dict(others(wrapped))
    assert all(not wrapped_optimizer.state[p]["correction"].any() for p in wrapped.parameters())


def test_parameters_replaced_by_a_load_are_not_the_optimizers():
    model, optimizer = make()
    train(model, optimizer, 0, 3)
    before = corrections(optimizer)
    model.load_state_dict(others(model), assign=True)
    assert corrections(optimizer) == before


def test_an_optimizer_is_free_where_nobody_keeps_it():
    model, optimizer = make()
    train(model, optimizer, 0, 1)
    model.load_state_dict(others(model))
    gc.disable()
    try:
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
    model.load_state_dict(others(model, 10))


def test_weights_of_another_kind_of_state_dict_are_refused():
    _, optimizer_state, _ = saved()
    optimizer = make(seed=5)[1]
    optimizer_state["flashoptim_native.weights"] = torch.zeros(3)
    with pytest.raises(ValueError, match="flashoptim_native.weights"):
        optimizer.load_state_dict(optimizer_state)
    assert not optimizer.state


def test_check_numerics_measures_loaded_weights():
    model, optimizer = make(state_codec="paper", check_numerics=True)
    train(model, optimizer, 0, 1)
    model.load_state_dict({k: 1e6 * v for k, v in others(model).items()})
    with pytest.raises(flashoptim_native.NumericsError):
        train(model, optimizer, 1, 2)
