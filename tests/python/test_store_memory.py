"""Nothing holds what was taken away: states, gradients, storages, optimizers; and a state costs its own bytes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

import flashoptim_native
from helpers import set_grads
from store_helpers import make, take_step

SHAPES = [(64, 64)] * 4


@pytest.fixture(autouse=True)
def without_cycle_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def watch(params, optimizer):
    """Weak references to all tensors of the states of ``params`` and to their storages."""
    tensors = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    assert tensors
    return [weakref.ref(t) for t in tensors], [weakref.ref(t.untyped_storage()) for t in tensors]


def alive(watched):
    return sum(ref() is not None for refs in watched for ref in refs)


TAKEN_AWAY = {
    "state.clear()": lambda ps, o: o.state.clear(),
    "del state[p]": lambda ps, o: [o.state.__delitem__(p) for p in ps],
    "state[p].clear()": lambda ps, o: [o.state[p].clear() for p in ps],
    "entries replaced": lambda ps, o: [replace(o.state[p]) for p in ps],
    "dicts replaced": lambda ps, o: o.state.update({p: copy.deepcopy(o.state[p]) for p in ps}),
    "loaded": lambda ps, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
}


def replace(state):
    for key, value in list(state.items()):
        if isinstance(value, torch.Tensor):
            state[key] = value.clone()


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("name", list(TAKEN_AWAY))
def test_states_that_are_taken_away_are_gone_at_once(name, one_by_one):
    params, optimizer = make(shapes=SHAPES)
    for step in range(2, 5):
        set_grads(params, step)
        take_step(optimizer, params, one_by_one)
        watched = watch(params, optimizer)
        TAKEN_AWAY[name](params, optimizer)
        assert alive(watched) == 0


def test_storages_that_tensors_leave_are_gone_at_once():
    params, optimizer = make(shapes=SHAPES)
    set_grads(params, 2)
    optimizer.step()
    tensors = [*params, *(p.grad for p in params)]
    tensors += [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    for tensor in tensors:
        storage = weakref.ref(tensor.untyped_storage())
        tensor.data = tensor.data.clone()
        assert storage() is None
    optimizer.step()


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "copied"])
def test_no_gradient_outlives_its_step(one_by_one, odd):
    params, optimizer = make(shapes=SHAPES)
    set_grads(params, 2)
    if odd:
        for p in params:
            p.grad = p.grad.t().contiguous().t()
    take_step(optimizer, params, one_by_one)
    held = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    assert not any(one() is not None for one in held)


def test_nothing_is_held_by_a_step_that_fails():
    params, optimizer = make(shapes=SHAPES)
    optimizer.state.clear()
    set_grads(params, 2)
    params[-1].grad = params[-1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not optimizer.state
    gradient = weakref.ref(params[0].grad)
    for p in params:
        p.grad = None
    assert gradient() is None


@pytest.mark.parametrize("release", ["none", "handle dropped", "handle kept", "handle removed", "as a context"])
def test_model_and_optimizer_die_without_the_cycle_collector(release):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)).bfloat16()
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-3, min_quantized_numel=64)
    handle = None
    if release != "none":
        handle = flashoptim_native.enable_gradient_release(model, optimizer, pre_step=lambda p, group: None)
    for _ in range(2):
        with handle.accumulate() if release == "as a context" else torch.enable_grad():
            model(torch.ones(2, 64).bfloat16()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    if release == "handle removed":
        handle.remove()
    elif release == "as a context":
        with handle:
            pass
    state = watch([next(iter(optimizer.state))], optimizer)
    held = [weakref.ref(x) for x in (model, optimizer, *model.parameters())]
    if release == "handle kept":
        del model, optimizer
        assert alive(state) > 0  # a handle that is kept keeps its optimizer
        assert handle.active
    else:
        del model, optimizer
    del handle
    assert not [ref() for ref in held if ref() is not None]
    assert alive(state) == 0


def test_a_released_optimizer_frees_its_states_while_the_model_lives():
    model = torch.nn.Linear(64, 64).bfloat16()
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-3, min_quantized_numel=64)
    flashoptim_native.enable_gradient_release(model, optimizer)
    model(torch.ones(2, 64).bfloat16()).sum().backward()
    state = watch(list(optimizer.state), optimizer)
    del optimizer
    assert alive(state) == 0
    model(torch.ones(2, 64).bfloat16()).sum().backward()
    assert model.weight.grad is not None


def saved_bytes(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getbuffer().nbytes


def test_a_state_alone_costs_its_own_bytes():
    params, optimizer = make(shapes=[(64, 64)] * 300, steps=1)
    state = optimizer.state[params[150]]
    own = sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, torch.Tensor))
    assert own == 3 * 4096 + 2 * 64 * 2 * 2  # codes of m and v, corrections; a scale of two bytes for every 32
    assert saved_bytes(state) < own + 10_000  # the format's own
    assert saved_bytes(state["exp_avg_codes"]) < 4096 + 3_000
    for one in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        for value in one.values():
            if isinstance(value, torch.Tensor):
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    whole = sum(
        v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)
    )
    assert saved_bytes(optimizer.state_dict()) < whole + 300 * 5 * 500


def test_no_two_arrays_of_300_states_share_a_storage():
    params, optimizer = make(shapes=[(64, 64)] * 300, steps=1)
    storages = [
        v.untyped_storage().data_ptr() for p in params for v in optimizer.state[p].values() if torch.is_tensor(v)
    ]
    assert len(storages) == len(set(storages)) == 300 * 5
    assert all(address % 16 == 0 for address in storages)


def test_kinds_of_states_that_come_and_go_are_not_kept():
    """Keys of dicts, which the store knows them by, among them."""
    params, optimizer = make(shapes=SHAPES)

    class Key:
        pass

    keys = []
    for step in range(4):
        key = Key()
        keys.append(weakref.ref(key))
        optimizer.state[params[0]][key] = step
        set_grads(params, step)
        optimizer.step()
        del optimizer.state[params[0]][key], key
    set_grads(params, 5)
    optimizer.step()
    optimizer.state[params[1]]["another"] = 1
    optimizer.step()
    assert not any(ref() is not None for ref in keys)
