"""Gradient release: pre_step, and errors where results would be others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flashoptim_native
from flashoptim_native import enable_gradient_release
from helpers import bits, run
from release_helpers import Model, assert_pair_agrees, loss_of, pair, train

# pre_step


def test_pre_step_clips_by_the_parameters_own_norm():
    released, plain = pair()
    clip = lambda p, group: nn.utils.clip_grad_norm_(p, 0.01) and None  # noqa: E731
    enable_gradient_release(*released, pre_step=clip)
    train(*released, range(3))
    for step in range(3):
        plain[1].zero_grad()
        loss_of(plain[0], step).backward()
        for p in plain[0].parameters():
            nn.utils.clip_grad_norm_(p, 0.01)
        plain[1].step()
    assert_pair_agrees(released, plain)


@pytest.mark.parametrize("no", [False, torch.tensor(False), torch.tensor([[False]])])
def test_pre_step_gets_the_group_and_may_refuse(no):
    model, optimizer = pair()[0]
    seen = []

    def pre_step(param, group):
        assert any(param is p for p in group["params"])
        seen.append(group["lr"])
        return no if param is model.conv.weight else [True, None, torch.tensor(True)][len(seen) % 3]

    enable_gradient_release(model, optimizer, pre_step=pre_step)
    before = bits(model.conv.weight)
    train(model, optimizer, range(2))
    assert sorted(set(seen)) == [3e-3, 0.02]
    assert bits(model.conv.weight) == before and model.conv.weight.grad is None
    assert model.conv.weight not in optimizer.state and optimizer.state[model.conv.bias]["step"] == 2


@pytest.mark.parametrize("answer", [0.5, "no", torch.tensor(0.0), torch.tensor([True, False])])
def test_pre_step_must_answer_yes_or_no(answer):
    p = nn.Parameter(torch.ones(3))
    optimizer = flashoptim_native.FlashSGD([p])
    enable_gradient_release(p, optimizer, pre_step=lambda p, group: answer)
    with pytest.raises(TypeError, match=r"pre_step returned .* allowed are None and True"):
        p.sum().backward()
    assert not optimizer.state


# Errors


def test_wrong_arguments():
    model, optimizer = pair()[0]
    params = list(model.parameters())
    theirs = torch.optim.AdamW(model.parameters())
    for arguments, options, error, message in [
        ((model, theirs), {}, TypeError, "optimizer is a AdamW; allowed are flashoptim's optimizers"),
        ((optimizer, model), {}, TypeError, "optimizer is a Model"),
        ((3, optimizer), {}, TypeError, "model_or_params is a int"),
        ((None, optimizer), {}, TypeError, "model_or_params is a NoneType"),
        (("weight", optimizer), {}, TypeError, "model_or_params is a str"),
        (([params[0], 3], optimizer), {}, TypeError, r"model_or_params\[1\] is a int"),
        (([{"params": params}], optimizer), {}, TypeError, r"model_or_params\[0\] is a dict"),
        (([], optimizer), {}, ValueError, "holds no parameter of the optimizer"),
        ((nn.ReLU(), optimizer), {}, ValueError, "holds no parameter of the optimizer"),
        ((Model(), optimizer), {}, ValueError, r"parameter 'unused' of shape \(5,\) is in no group"),
        (([nn.Parameter(torch.ones(2))], optimizer), {}, ValueError, r"model_or_params\[0\] of shape \(2,\) is in no"),
        ((model, optimizer), {"pre_step": 3}, TypeError, "pre_step = 3 is not callable"),
        ((model, optimizer), {"grad_scaler": 1024.0}, TypeError, "grad_scaler is a float"),
        ((model, optimizer), {"grad_scaler": torch.amp.GradScaler("cpu")}, NotImplementedError, "bfloat16"),
    ]:
        with pytest.raises(error, match=message):
            enable_gradient_release(*arguments, **options)
    assert not any(p._post_accumulate_grad_hooks for p in params)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    both = nn.ModuleList([model, frozen])
    enable_gradient_release(both, optimizer, grad_scaler=torch.amp.GradScaler("cpu", enabled=False)).remove()


def test_enabling_twice():
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match="enabled for this optimizer already"):
        enable_gradient_release(model, optimizer)
    second = flashoptim_native.FlashAdamW(model.named_parameters())
    with pytest.raises(RuntimeError, match="'unused' is enabled already by another optimizer"):
        enable_gradient_release(model, second)
    assert handle.active
    train(model, optimizer, range(1))
    assert optimizer.state[model.conv.weight]["step"] == 1 and not second.state
    handle.remove()
    enable_gradient_release(model, second)


def test_an_error_half_way_leaves_no_hook():
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = flashoptim_native.FlashSGD([a, b])
    other = enable_gradient_release(b, flashoptim_native.FlashSGD([b]))
    with pytest.raises(RuntimeError, match="parameter 1 of group 0 is enabled already"):
        enable_gradient_release([a, b], optimizer)
    assert not a._post_accumulate_grad_hooks and not optimizer._optimizer_step_pre_hooks
    other.remove()
    enable_gradient_release([a, b], optimizer)


def test_more_than_one_process(monkeypatch):
    model, optimizer = pair()[0]
    handle = enable_gradient_release(model, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="torch.distributed runs 2 processes"):
        optimizer.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="torch.distributed runs 2 processes"):
        enable_gradient_release(model, optimizer)
    optimizer.step()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    enable_gradient_release(model, optimizer)
    train(model, optimizer, range(1))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
        optimizer = flashoptim_native.FlashSGD(wrapped.parameters())
        with pytest.raises(TypeError, match="wrapped in DistributedDataParallel"):
            enable_gradient_release(wrapped, optimizer)
        with pytest.raises(TypeError, match="wrapped in DistributedDataParallel"):
            enable_gradient_release(nn.Sequential(wrapped), optimizer)
    finally:
        torch.distributed.destroy_process_group()


def test_grad_scaler_step_raises():
    model, optimizer = pair(dtype=torch.float16)[0]
    enable_gradient_release(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(loss_of(model, 0)).backward()
    with pytest.raises(RuntimeError, match=r"GradScaler.step\(\) was called while gradient release is enabled"):
        scaler.step(optimizer)
    assert not {"found_inf", "grad_scale"} & vars(optimizer).keys()
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    disabled.scale(loss_of(model, 1)).backward()
    disabled.step(optimizer)
    disabled.update()
    assert optimizer.state[model.conv.weight]["step"] == 2


def test_errors_of_a_step_come_out_of_backward():
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = flashoptim_native.FlashSGD(model.named_parameters())
    enable_gradient_release(model, optimizer)
    with pytest.raises(RuntimeError, match=r"'weight' has layout torch.sparse_coo"):
        model(torch.arange(3)).sum().backward()
    assert model.weight.grad is not None and not optimizer.state
    p = nn.Parameter(torch.full((8,), 100.0, dtype=torch.bfloat16))
    optimizer = flashoptim_native.FlashSGD([p], lr=1e-6, check_numerics=True, state_codec="paper")
    enable_gradient_release(p, optimizer)
    with pytest.raises(flashoptim_native.NumericsError):
        p.sum().backward()
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.zero_grad()
    p.sum().backward()
    assert p.grad is None


def test_learning_rates_are_read_when_the_gradient_is_complete():
    p, q = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    a, b = flashoptim_native.FlashSGD([p], lr=0.5), flashoptim_native.FlashSGD([q], lr=0.5)
    enable_gradient_release(p, a)
    run(a, [p], 0, 1)  # a gradient set by hand is step()'s
    run(b, [q], 0, 1)
    assert bits(p) == bits(q)
    a.zero_grad()
    before = p.detach().clone()
    a.param_groups[0]["lr"] = 0.25
    p.sum().backward()
    torch.testing.assert_close(p.detach(), before - 0.25)


def test_a_weight_that_is_used_after_its_gradient_is_complete_raises():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    params = [*first.parameters(), *second.parameters()]
    optimizer = flashoptim_native.FlashAdamW(params)
    enable_gradient_release(params, optimizer)
    loss = second(nn.functional.linear(first(torch.randn(2, 8)), second.weight.detach())).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
