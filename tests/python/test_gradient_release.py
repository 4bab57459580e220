"""Gradient release: the same bytes as without, in training loops of all kinds."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import flashoptim_native
from flashoptim_native import enable_gradient_release
from helpers import assert_untouched, snapshot
from release_helpers import KINDS, assert_pair_agrees, loss_of, pair, train

# The same bytes


@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_with_groups_and_a_scheduler(kind, codec):
    released, plain = pair(kind, state_codec=codec)
    enable_gradient_release(*released)
    schedulers = [lr_scheduler.CosineAnnealingLR(optimizer, 5) for _, optimizer in (released, plain)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" would be one
        losses = [
            train(model, optimizer, range(6), scheduler)
            for (model, optimizer), scheduler in zip((released, plain), schedulers)
        ]
    assert losses[0] == losses[1]
    assert_pair_agrees(released, plain)
    for model, optimizer in (released, plain):
        assert optimizer.state[model.head.weight]["step"] == 6
        assert model.unused not in optimizer.state
    assert all(p.grad is None for p in released[0].parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_same_bytes_in_other_dtypes(dtype):
    released, plain = pair(dtype=dtype)
    enable_gradient_release(*released)
    for model, optimizer in (released, plain):
        train(model, optimizer)
    assert_pair_agrees(released, plain)


@pytest.mark.parametrize("options", [{"quantize": False}, {"check_numerics": True}, {"master_weight_bits": 32}])
def test_same_bytes_with_other_options(options):
    released, plain = pair(**options)
    enable_gradient_release(*released)
    for model, optimizer in (released, plain):
        train(model, optimizer)
    assert_pair_agrees(released, plain)


def test_scheduler_made_before_or_after_and_one_cycle():
    released, plain = pair()
    make = lambda optimizer: lr_scheduler.OneCycleLR(optimizer, [0.01, 0.02], total_steps=9)  # noqa: E731
    first = make(released[1])
    enable_gradient_release(*released)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(*released, range(5), first)
        train(*plain, range(5), make(plain[1]))
    assert_pair_agrees(released, plain)


def test_closures_return_their_loss():
    released, plain = pair()
    enable_gradient_release(*released)
    results = []
    for model, optimizer in (released, plain):
        for step in range(3):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            results.append(optimizer.step(closure).item())
    assert results[:3] == results[3:]
    assert_pair_agrees(released, plain)


def test_step_without_gradients_changes_nothing():
    model, optimizer = pair()[0]
    enable_gradient_release(model, optimizer)
    train(model, optimizer, range(2))
    before = snapshot(optimizer)
    assert optimizer.step() is None
    assert optimizer.step(lambda: 3.5) == 3.5
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)
    assert_untouched(optimizer, before)


def test_step_hooks_are_called_once_a_step():
    model, optimizer = pair()[0]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    enable_gradient_release(model, optimizer)
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    train(model, optimizer, range(2))
    assert seen == ["pre", "post"] * 2


def test_removing_and_enabling_again_in_mid_training():
    released, plain = pair()
    train(*released, range(2))
    with enable_gradient_release(*released) as handle:
        assert handle.active
        train(*released, range(2, 4))
    assert not handle.active
    loss_of(released[0], 0).backward()
    assert released[0].head.weight.grad is not None
    released[1].zero_grad()
    train(*released, range(4, 5))
    handle.remove()  # a second time
    again = enable_gradient_release(*released)
    train(*released, range(5, 6))
    again.remove()
    train(*plain, range(6))
    assert_pair_agrees(released, plain)
    names = {"add_param_group", "zero_grad", "_gradient_release"}
    assert not names & vars(released[1]).keys() and not released[1]._optimizer_step_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in released[0].parameters())


def test_the_handle_ends_with_its_context_when_something_raises():
    model, optimizer = pair()[0]
    with pytest.raises(KeyError), enable_gradient_release(model, optimizer) as handle:
        raise KeyError
    assert not handle.active
    loss_of(model, 0).backward()
    assert model.head.weight.grad is not None


def test_checkpoints_with_release_resume_with_and_without():
    released, plain = pair()
    enable_gradient_release(*released)
    train(*released, range(3))
    train(*plain, range(3))
    stored = io.BytesIO()
    torch.save({"model": released[0].state_dict(), "optimizer": released[1].state_dict()}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=True)
    fresh = pair()[0]
    fresh[0].load_state_dict(loaded["model"])
    fresh[1].load_state_dict(loaded["optimizer"])
    released[1].load_state_dict(loaded["optimizer"])  # with release enabled
    for model, optimizer in (fresh, released, plain):
        train(model, optimizer, range(3, 5))
    assert_pair_agrees(released, plain)
    assert_pair_agrees(fresh, plain)


def test_copies_and_pickles_are_without_release():
    model, optimizer = pair()[0]
    enable_gradient_release(model, optimizer)
    train(model, optimizer, range(1))
    copies = copy.deepcopy((model, optimizer))
    pickled = pickle.loads(pickle.dumps((model, optimizer)))
    for other_model, other_optimizer in (copies, pickled):
        loss_of(other_model, 1).backward()
        assert other_model.conv.weight.grad is not None
        other_optimizer.step()
        assert other_optimizer.state[other_model.conv.weight]["step"] == 2
        with enable_gradient_release(other_model, other_optimizer):
            pass
    assert optimizer.state[model.conv.weight]["step"] == 1


# Under the names of other libraries


def test_names_of_other_libraries():
    (model, optimizer), (twin, twin_optimizer) = pair()
    assert flashoptim_native.prepare_for_gradient_release(model, optimizer) is None
    train(model, optimizer)
    train(twin, twin_optimizer)
    assert_pair_agrees((model, optimizer), (twin, twin_optimizer))
    flashoptim_native.remove_gradient_release(model)
    flashoptim_native.remove_gradient_release(model)  # nothing to remove
    assert "zero_grad" not in vars(optimizer) and not model.unused._post_accumulate_grad_hooks
    loss_of(model, 0).backward()
    assert model.conv.weight.grad is not None


def test_every_optimizer_of_a_model_is_ended():
    model = pair()[0][0]
    optimizers = [flashoptim_native.FlashSGD([p]) for p in model.parameters()]
    for optimizer in optimizers:
        enable_gradient_release(optimizer.param_groups[0]["params"], optimizer)
    flashoptim_native.remove_gradient_release(model)
    assert not any("zero_grad" in vars(optimizer) for optimizer in optimizers)


def test_hooks_that_are_there_already():
    model, optimizer = pair()[0]
    seen = []
    model.unused.register_post_accumulate_grad_hook(lambda p: None)
    model.conv.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    with pytest.raises(ValueError, match="'unused' has a post-accumulate-grad hook already"):
        flashoptim_native.prepare_for_gradient_release(model, optimizer)
    assert "zero_grad" not in vars(optimizer)
    flashoptim_native.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
    train(model, optimizer, range(1))
    assert seen == [True]


def test_a_fused_backward_pass_by_step_param():
    """As kohya's scripts and OneTrainer do it: a hook of their own, with the group, and a clip of each gradient."""
    (model, optimizer), (twin, twin_optimizer) = pair()

    def hooked(group):
        def hook(param):
            torch.nn.utils.clip_grad_norm_(param, 1.0)
            optimizer.step_param(param, group)
            param.grad = None

        return hook

    for group in optimizer.param_groups:
        for param in group["params"]:
            param.register_post_accumulate_grad_hook(hooked(group))
    enable_gradient_release(
        twin, twin_optimizer, pre_step=lambda p, group: torch.nn.utils.clip_grad_norm_(p, 1.0).isfinite()
    )
    train(model, optimizer)
    train(twin, twin_optimizer)
    assert_pair_agrees((model, optimizer), (twin, twin_optimizer))
