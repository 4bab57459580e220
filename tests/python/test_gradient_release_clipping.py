"""Gradient release with clipping: by the norm of all, measured before; by norms of steps before; each by its own."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flashoptim_native import FlashAdamW, FlashSGD, enable_gradient_release
from helpers import assert_same_bits, assert_untouched, snapshot
from release_helpers import KINDS, assert_pair_agrees, live_gradients, loss_of, pair

MAX_NORM = 0.05  # below the norms of these models
LARGE = 1e6


def norm_of(params):
    grads = [p.grad for p in params if p.grad is not None]
    return torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()


def clipped_step(model, optimizer, losses, max_norm=MAX_NORM):
    """What a step by exactly clipped gradients is, without release: the coefficient is applied as they are read."""
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    norm = norm_of(model.parameters()).float()
    optimizer._stepper.clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    optimizer.step()
    return norm


def two_pass_step(handle, model, optimizer, loss):
    optimizer.zero_grad()
    with handle.measure_norm():
        loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [MAX_NORM, LARGE])
def test_two_pass_is_exact(kind, max_norm):
    (model, optimizer), (twin, twin_optimizer) = pair(kind)
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=max_norm)
    assert handle.grad_norm is None
    for step in range(3):
        two_pass_step(handle, model, optimizer, loss_of(model, step))
        norm = clipped_step(twin, twin_optimizer, [loss_of(twin, step)], max_norm)
        assert torch.allclose(handle.grad_norm, norm, rtol=1e-6)
        assert (norm > max_norm) == (max_norm == MAX_NORM)
        assert optimizer.clip_grad_norm_(max_norm) == handle.grad_norm
    if max_norm == LARGE:
        assert_pair_agrees((model, optimizer), (twin, twin_optimizer))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.float(), q.float(), rtol=2**-8, atol=1e-5)


def test_two_pass_against_torchs_clipping():
    (model, optimizer), (twin, twin_optimizer) = pair("sgd", dtype=torch.float32, quantize=False)
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=MAX_NORM)
    for step in range(3):
        two_pass_step(handle, model, optimizer, loss_of(model, step))
        twin_optimizer.zero_grad()
        loss_of(twin, step).backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM)
        twin_optimizer.step()
        assert torch.allclose(handle.grad_norm, norm, rtol=1e-5)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_measuring_keeps_one_gradient_at_a_time_and_changes_nothing():
    model, optimizer = pair()[0]
    params = list(model.parameters())
    alive = []
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=1.0)
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: alive.append(live_gradients(params)))
    before = snapshot(optimizer)
    with handle.measure_norm():
        loss_of(model, 0).backward()
    assert_untouched(optimizer, before)
    assert len(alive) == len(params) - 1 and not any(alive)
    assert handle.grad_norm > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_two_pass_with_checkpointing(use_reentrant):
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.GELU()) for _ in range(3)).bfloat16()
    optimizer = FlashAdamW(blocks.parameters(), lr=1e-2)
    handle = enable_gradient_release(blocks, optimizer, clip="two_pass", max_norm=1e-3)

    def loss(is_checkpointed):
        torch.manual_seed(1)
        x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant) if is_checkpointed else block(x)
        return x.float().square().mean()

    norms = []
    for is_checkpointed in (False, True):
        with handle.measure_norm():
            loss(is_checkpointed).backward()
        norms.append(handle.grad_norm.clone())
    assert norms[0] == norms[1]
    two_pass_step(handle, blocks, optimizer, loss(True))
    assert all(optimizer.state[p]["step"] == 1 for p in blocks.parameters())


def test_parameters_left_to_step_are_measured_and_clipped_too():
    (model, optimizer), (twin, twin_optimizer) = pair("sgd", dtype=torch.float32)
    handle = enable_gradient_release(model.block, optimizer, clip="two_pass", max_norm=MAX_NORM)
    two_pass_step(handle, model, optimizer, loss_of(model, 0))
    norm = clipped_step(twin, twin_optimizer, [loss_of(twin, 0)])
    assert torch.allclose(handle.grad_norm, norm, rtol=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def scaled_loop(model, optimizer, handle, scaler, overflow_at, steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step) * (float("inf") if step == overflow_at else 1.0)
        if handle is not None:
            with handle.measure_norm():
                scaler.scale(loss).backward(retain_graph=True)
            scaler.scale(loss).backward()
        else:
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def test_two_pass_with_a_grad_scaler():
    (model, optimizer), (twin, twin_optimizer) = pair(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    twin_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    handle = enable_gradient_release(model, optimizer, grad_scaler=scaler, clip="two_pass", max_norm=LARGE)
    scaled_loop(model, optimizer, handle, scaler, overflow_at=1)
    scaled_loop(twin, twin_optimizer, None, twin_scaler, overflow_at=1)
    assert scaler.state_dict() == twin_scaler.state_dict()
    # Powers of two: both divide exactly.
    assert_pair_agrees((model, optimizer), (twin, twin_optimizer))


def test_an_overflow_leaves_every_byte():
    model, optimizer = pair(dtype=torch.float16)[0]
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    handle = enable_gradient_release(model, optimizer, grad_scaler=scaler, clip="two_pass", max_norm=0.5)
    scaled_loop(model, optimizer, handle, scaler, overflow_at=None, steps=2)
    before = snapshot(optimizer)
    scaled_loop(model, optimizer, handle, scaler, overflow_at=0, steps=1)
    assert_untouched(optimizer, before)
    assert scaler.get_scale() == 8.0
    assert not handle.grad_norm.isfinite()
    assert all(p.grad is None for p in model.parameters())


def test_the_norm_must_be_measured():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=1.0)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"with handle.measure_norm\(\): loss.backward\(retain_graph=True\)"):
        loss_of(model, 0).backward()
    assert_untouched(optimizer, before)
    optimizer.zero_grad()
    two_pass_step(handle, model, optimizer, loss_of(model, 0))
    with pytest.raises(RuntimeError, match="measure_norm"):  # once a step
        loss_of(model, 1).backward()


def test_measure_norm_where_it_cannot_be():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match='clip = None; allowed with clip="two_pass"'), handle.measure_norm():
        pass
    handle.remove()
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=1.0)
    with pytest.raises(RuntimeError, match="no gradient was complete"), handle.measure_norm():
        pass
    with handle.accumulate():
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="inside accumulate"), handle.measure_norm():
            pass
    with pytest.raises(RuntimeError, match="while there are gradients"), handle.measure_norm():
        pass
    optimizer.zero_grad()
    with pytest.raises(ZeroDivisionError), handle.measure_norm():
        loss_of(model, 0).backward()
        1 / 0  # noqa: B018
    two_pass_step(handle, model, optimizer, loss_of(model, 0))
    handle.remove()
    with pytest.raises(RuntimeError, match="remove"), handle.measure_norm():
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_clips_each_by_its_own_norm(kind):
    (model, optimizer), (twin, twin_optimizer) = pair(kind)
    handle = enable_gradient_release(model, optimizer, clip="parameter", max_norm=MAX_NORM)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        twin_optimizer.zero_grad()
        loss_of(twin, step).backward()
        assert torch.allclose(handle.grad_norm, norm_of(twin.parameters()).float(), rtol=1e-6)
        for p in twin.parameters():
            if p.grad is not None:
                norm = p.grad.double().square().sum().sqrt().float()
                twin_optimizer._stepper.clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
                twin_optimizer.step_param(p)
                p.grad = None
        assert_pair_agrees((model, optimizer), (twin, twin_optimizer))


@pytest.mark.parametrize("decay", [0.0, 0.75])
def test_previous_clips_by_the_norms_of_before(decay):
    (model, optimizer), (twin, twin_optimizer) = pair("sgd", dtype=torch.float32)
    enable_gradient_release(model, optimizer, clip="previous", max_norm=MAX_NORM, norm_decay=decay)
    average = None
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        norm_now = norms_of(twin, step)
        assert torch.allclose(optimizer.clip_grad_norm_(MAX_NORM), norm_now, rtol=1e-6)
        optimizer.step()
        for p in twin.parameters():
            if p.grad is not None:
                norm = p.grad.double().square().sum().sqrt().float() if average is None else average
                twin_optimizer._stepper.clip = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
                twin_optimizer.step_param(p)
        average = norm_now if average is None else decay * average + (1 - decay) * norm_now
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


def norms_of(model, step):
    model.zero_grad()
    loss_of(model, step).backward()
    return norm_of(model.parameters()).float()


@pytest.mark.parametrize("clip", ["previous", "parameter"])
def test_clipping_of_sums_of_micro_batches(clip):
    model, optimizer = pair(dtype=torch.float32)[0]
    handle = enable_gradient_release(model, optimizer, clip=clip, max_norm=MAX_NORM)
    with handle.accumulate():
        loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    optimizer.step()
    twin = pair(dtype=torch.float32)[0][0]
    for step in (0, 1):
        loss_of(twin, step).backward()
    assert torch.allclose(handle.grad_norm, norm_of(twin.parameters()).float(), rtol=1e-5)


def test_pre_step_comes_before_clipping():
    model = nn.Linear(8, 8)
    optimizer = FlashSGD(model.parameters(), lr=1.0)

    def double(param, group):
        param.grad.mul_(2.0)
        return param is model.weight

    handle = enable_gradient_release(model, optimizer, clip="parameter", max_norm=100.0, pre_step=double)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert handle.grad_norm == 16.0  # sqrt(64 * 2^2), without the bias


# Clipping that would do nothing


def test_clip_grad_norm_is_an_error_where_it_would_do_nothing():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match=r'would clip nothing.*clip="exact".*"two_pass".*max_norm=1.0'):
        optimizer.clip_grad_norm_(1.0)
    handle.remove()
    loss_of(model, 0).backward()
    assert optimizer.clip_grad_norm_(1.0) > 0


def test_clip_grad_norm_of_another_norm():
    model, optimizer = pair()[0]
    enable_gradient_release(model, optimizer, clip="parameter", max_norm=0.5)
    with pytest.raises(ValueError, match=r"max_norm = 1.0 is not allowed .* 0.5"):
        optimizer.clip_grad_norm_(1.0)
    assert optimizer.clip_grad_norm_(0.5) == 0.0  # nothing has come yet


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"clip": "global", "max_norm": 1.0}, ValueError, "clip = 'global' .* 'two_pass', 'previous', 'parameter'"),
        ({"clip": True, "max_norm": 1.0}, ValueError, "clip = True"),
        ({"clip": "parameter"}, ValueError, "clip = 'parameter' with max_norm = None"),
        ({"max_norm": 1.0}, ValueError, "clip = None with max_norm = 1.0"),
        ({"clip": "parameter", "max_norm": 0.0}, ValueError, "max_norm = 0.0"),
        ({"clip": "parameter", "max_norm": float("inf")}, ValueError, "max_norm = inf"),
        ({"clip": "parameter", "max_norm": "1"}, TypeError, "max_norm = '1'"),
        ({"clip": "previous", "max_norm": 1.0, "norm_decay": 1.0}, ValueError, "norm_decay = 1.0"),
        ({"clip": "parameter", "max_norm": 1.0, "norm_decay": 0.5}, ValueError, "norm_decay = 0.5 with clip"),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, NotImplementedError, "grad_scaler is enabled, with clip = None"),
        (
            {"grad_scaler": torch.amp.GradScaler("cpu"), "clip": "previous", "max_norm": 1.0},
            NotImplementedError,
            "clip = 'previous'.* clip=\"two_pass\"",
        ),
    ],
)
def test_wrong_arguments(arguments, error, message):
    model, optimizer = pair()[0]
    with pytest.raises(error, match=message):
        enable_gradient_release(model, optimizer, **arguments)
    assert "zero_grad" not in vars(optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# Loops without step() and zero_grad()


class Used(nn.Module):
    """Every parameter gets a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).bfloat16()

    def loss(self, step):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        return self.layers(x).float().square().mean()


@pytest.mark.parametrize("clip", [{}, {"clip": "previous", "max_norm": 0.01}, {"clip": "two_pass", "max_norm": 0.01}])
def test_a_loop_that_calls_neither_step_nor_zero_grad(clip):
    models = [Used(), Used()]
    optimizers = [FlashAdamW(model.parameters(), lr=1e-2) for model in models]
    handles = [enable_gradient_release(m, o, **clip) for m, o in zip(models, optimizers, strict=True)]
    for step in range(4):
        for number, (model, optimizer, handle) in enumerate(zip(models, optimizers, handles, strict=True)):
            loss = model.loss(step)
            if clip.get("clip") == "two_pass":
                with handle.measure_norm():
                    loss.backward(retain_graph=True)
            loss.backward()
            if number == 0:
                optimizer.step()
                optimizer.zero_grad()
    assert_same_bits(*((list(m.parameters()), o) for m, o in zip(models, optimizers, strict=True)))


def test_backward_passes_before_a_loops_first_step_are_an_error_then():
    model = Used()
    optimizer = FlashAdamW(model.parameters())
    enable_gradient_release(model, optimizer)
    for step in range(3):
        model.loss(step).backward()
    with pytest.raises(RuntimeError, match=r"^3 backward\(\) passes came before .* handle.accumulate\(\)"):
        optimizer.step()
    optimizer.step()
    model.loss(3).backward()
    with pytest.raises(RuntimeError, match=r"^gradient release allows one backward\(\) a step. Call optimizer.step"):
        model.loss(4).backward()


@pytest.mark.parametrize("call", ["step", "zero_grad"])
def test_a_loop_that_calls_one_of_them_adds_nothing_up(call):
    model = Used()
    optimizer = FlashAdamW(model.parameters())
    enable_gradient_release(model, optimizer)
    getattr(optimizer, call)()
    model.loss(0).backward()
    with pytest.raises(RuntimeError, match=r"handle.accumulate\(\)"):
        model.loss(1).backward()


def test_a_shared_parameter_under_reentrant_checkpoints_is_no_next_step():
    """The only parameter there is: all gradients of a step have come each time that it is complete."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = FlashAdamW(layer.parameters())
    enable_gradient_release(layer, optimizer)
    x = torch.ones(2, 64, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()
    assert optimizer.state[layer.weight]["step"] == 1


def test_nothing_is_warned_of():
    model = Used()
    optimizer = FlashAdamW(model.parameters())
    handle = enable_gradient_release(model, optimizer, clip="two_pass", max_norm=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_pass_step(handle, model, optimizer, model.loss(0))
    assert handle.grad_norm > 0
