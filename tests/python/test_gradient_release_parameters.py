"""Gradient release of parameters of all kinds, and of sums of several micro-batches."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import flashoptim_native
from flashoptim_native import enable_gradient_release
from helpers import CLASSES, assert_same_bits, bits
from release_helpers import Model, assert_pair_agrees, loss_of, pair, train

# Accumulation


def test_accumulation_steps_by_the_sum_at_the_last_micro_batch():
    released, plain = pair()
    handle = enable_gradient_release(*released)
    for step in range(3):
        for model, optimizer in (released, plain):
            optimizer.zero_grad()
            for part in range(3):
                if model is released[0] and part < 2:
                    with handle.accumulate():
                        loss_of(model, 10 * step + part).backward()
                    assert model.conv.weight.grad is not None
                    assert optimizer.state.get(model.conv.weight, {}).get("step", 0) == step
                else:
                    loss_of(model, 10 * step + part).backward()
            if model is released[0]:
                assert all(p.grad is None for p in model.parameters())
            optimizer.step()
    assert_pair_agrees(released, plain)


def test_parameters_that_the_last_micro_batch_does_not_reach_are_stepped_by_step():
    released, plain = pair()
    handle = enable_gradient_release(*released)
    with handle.accumulate(), handle.accumulate():
        (loss_of(released[0], 0) + released[0].unused.sum()).backward()
    (loss_of(plain[0], 0) + plain[0].unused.sum()).backward()
    for model, optimizer in (released, plain):
        loss_of(model, 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert released[1].state[released[0].unused]["step"] == 1
    assert_pair_agrees(released, plain)


def test_a_second_backward_without_accumulate_raises():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    loss_of(model, 0).backward()
    steps = {key: state["step"] for key, state in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=r"handle.accumulate\(\).* complete a second time"):
        loss_of(model, 1).backward()
    assert {key: state["step"] for key, state in optimizer.state.items()} == steps
    optimizer.zero_grad()  # as after an error that the loop survives
    loss_of(model, 2).backward()
    optimizer.step()
    with pytest.raises(KeyError), handle.accumulate():
        raise KeyError
    loss_of(model, 3).backward()
    assert all(p.grad is None for p in model.parameters())


# Parameters of all kinds


def test_shared_parameters_are_stepped_once_after_all_their_uses():
    """The hook comes once a backward(), with the sum over all uses."""
    layer = nn.Linear(96, 96).to(torch.bfloat16)
    other = copy.deepcopy(layer)
    x = torch.randn(8, 96, dtype=torch.bfloat16)
    optimizers = [flashoptim_native.FlashAdamW(m.parameters(), lr=0.1) for m in (layer, other)]
    enable_gradient_release(layer, optimizers[0])
    calls = []
    layer.weight.register_post_accumulate_grad_hook(lambda _: calls.append(1))
    for model, optimizer in zip((layer, other), optimizers):
        for _ in range(3):
            optimizer.zero_grad()
            model(model(model(x).relu()).relu()).float().square().mean().backward()
            optimizer.step()
    assert len(calls) == 3
    assert_same_bits((list(layer.parameters()), optimizers[0]), (list(other.parameters()), optimizers[1]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    def loss(model, x):
        for layer in model:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x.float().square().mean()

    def make():
        torch.manual_seed(3)
        return nn.Sequential(*(nn.Linear(72, 72) for _ in range(4))).to(torch.bfloat16)

    results = []
    x = torch.randn(4, 72, dtype=torch.bfloat16, requires_grad=True)
    for is_released in (False, True):
        model = make()
        optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=0.1)
        if is_released:
            enable_gradient_release(model, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model, x).backward()
            optimizer.step()
        results.append((list(model.parameters()), optimizer))
    assert_same_bits(*results)
    shared = make()[0]
    handle = enable_gradient_release(shared, flashoptim_native.FlashAdamW(shared.parameters()))
    assert handle.active
    if use_reentrant:  # two nested backward() each complete the gradient
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            loss([shared, shared], x).backward()
    else:
        loss([shared, shared], x).backward()


def test_frozen_parameters_and_later_thawing():
    released, plain = pair()
    for model, _ in (released, plain):
        model.conv.requires_grad_(False)
    enable_gradient_release(*released)
    for model, optimizer in (released, plain):
        assert not model.conv.weight.requires_grad
        train(model, optimizer, range(2))
        assert model.conv.weight not in optimizer.state
        model.conv.requires_grad_(True)
        model.block[0].weight.requires_grad_(False)
    loss_of(released[0], 2).backward()
    assert all(p.grad is None for p in released[0].parameters())
    released[1].step()
    train(*plain, range(2, 3))
    assert_pair_agrees(released, plain)
    assert released[1].state[released[0].conv.weight]["step"] == 1


def test_groups_added_later_are_released_at_once():
    released, plain = [(m, CLASSES["adamw"](m.block.parameters(), lr=0.01)) for m in (Model(), Model())]
    enable_gradient_release(released[0].block, released[1])
    for model, optimizer in (released, plain):
        train(model, optimizer, range(2))
        optimizer.add_param_group({"params": model.conv.parameters(), "lr": 0.02})
        model.zero_grad()
    loss_of(released[0], 2).backward()
    assert released[0].conv.weight.grad is None and released[0].norm.weight.grad is not None
    released[1].step()
    train(*plain, range(2, 3))
    assert_same_bits(*(([*m.block.parameters(), *m.conv.parameters()], o) for m, o in (released, plain)))
    before = len(released[1].param_groups)
    with pytest.raises(TypeError, match="float64"):
        released[1].add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.float64))]})
    taken = nn.Parameter(torch.ones(3))
    handle = enable_gradient_release(taken, flashoptim_native.FlashSGD([taken]))
    assert handle.active
    with pytest.raises(RuntimeError, match="parameter 0 of group 2 is enabled already by another optimizer"):
        released[1].add_param_group({"params": [taken]})
    assert len(released[1].param_groups) == before
    train(*released, range(3, 4))


def test_replaced_parameters():
    """As densification and pruning do: the new one is released from the next backward() on, the old one is let go."""
    old, new = (nn.Parameter(torch.ones(40)) for _ in range(2))
    optimizer = flashoptim_native.FlashSGD([old], lr=0.125)
    enable_gradient_release(old, optimizer)
    optimizer.param_groups[0]["params"][0] = new
    new.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    old.sum().backward()
    assert new.grad is None and old.grad is not None
    new.sum().backward()
    assert new.grad is None and bits(new) == bits(torch.full((40,), 0.75))


def test_some_parameters_only():
    model, optimizer = pair()[0]
    other = pair()[1]
    enable_gradient_release(model.block.named_parameters(), optimizer)
    for step in range(3):
        loss_of(model, step).backward()
        assert model.block[0].weight.grad is None and model.conv.weight.grad is not None
        optimizer.step()
        optimizer.zero_grad()
    train(*other, range(3))
    assert_pair_agrees((model, optimizer), other)


def test_two_optimizers_of_one_model():
    released, plain = Model(), Model()
    results = []
    for model in (released, plain):
        first = flashoptim_native.FlashLion(model.block.parameters(), lr=1e-3)
        rest = [p for p in model.parameters() if all(p is not q for q in model.block.parameters())]
        second = flashoptim_native.FlashAdamW(rest, lr=1e-2)
        if model is released:
            enable_gradient_release(model.block, first)
            enable_gradient_release(rest, second)
        for step in range(3):
            loss_of(model, step).backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        results.append([(list(model.block.parameters()), first), (rest, second)])
    for a, b in zip(*results):
        assert_same_bits(a, b)


def test_fp32_gradients_of_16_bit_parameters():
    released, plain = pair()
    for model, _ in (released, plain):
        for p in model.parameters():
            p.grad_dtype = torch.float32
    seen = []
    enable_gradient_release(*released, pre_step=lambda p, group: seen.append(p.grad.dtype))
    for model, optimizer in (released, plain):
        train(model, optimizer, range(2))
    assert set(seen) == {torch.float32}
    assert_pair_agrees(released, plain)


def test_optimizers_that_are_dropped_leave_gradients_alone():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    alive = weakref.ref(optimizer)
    del optimizer, handle
    assert alive() is None
    loss_of(model, 0).backward()
    assert model.conv.weight.grad is not None
    new = flashoptim_native.FlashAdamW(model.parameters())
    enable_gradient_release(model, new)
    new.zero_grad()
    loss_of(model, 0).backward()
    assert new.state[model.conv.weight]["step"] == 1


def test_backward_that_creates_a_graph_and_autograd_grad():
    model, optimizer = pair(dtype=torch.float32)[0]
    enable_gradient_release(model, optimizer)
    grads = torch.autograd.grad(loss_of(model, 0), [model.conv.weight], create_graph=True)
    assert not optimizer.state  # gradients that are asked for are not the optimizer's
    grads[0].square().sum().backward()
    assert optimizer.state[model.conv.weight]["step"] == 1
    optimizer.step()
    loss = loss_of(model, 1)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
