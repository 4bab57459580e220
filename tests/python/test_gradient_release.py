"""Gradient release: the same bytes as without, one gradient alive at a time, errors where it would change results."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

import flashoptim_native
from flashoptim_native import enable_gradient_release
from helpers import CLASSES, HYPERS, assert_same_bits, assert_untouched, bits, run, snapshot

KINDS = list(CLASSES)


class Model(nn.Module):
    """Embedding tied to the head, a convolution, norms, one parameter that nothing uses."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(7)
        self.embedding = nn.Embedding(64, 72)
        self.conv = nn.Conv1d(72, 72, 3, padding=1)
        self.norm = nn.LayerNorm(72)
        self.block = nn.Sequential(nn.Linear(72, 144), nn.GELU(), nn.Linear(144, 72))
        self.head = nn.Linear(72, 64, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.ones(5))
        self.to(dtype)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(x + self.block(self.norm(x)))


def tokens(step, batch=4):
    return torch.randint(64, (batch, 16), generator=torch.Generator().manual_seed(step))


def loss_of(model, step, batch=4):
    data = tokens(step, batch)
    return nn.functional.cross_entropy(model(data).float().flatten(0, 1), data.flatten().roll(1))


def groups_of(model):
    """Two groups, the second with its own learning rate and format."""
    norms = [p for p in model.parameters() if p.ndim < 2]
    others = [p for p in model.parameters() if p.ndim >= 2]
    return [{"params": others}, {"params": norms, "lr": 0.02, "weight_decay": 0.0, "min_quantized_numel": 0}]


def train(model, optimizer, steps=range(4), scheduler=None):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if scheduler is not None:
            scheduler.step()
    return losses


def pair(kind="adamw", dtype=torch.bfloat16, **options):
    """Two equal models with their optimizers: gradient release is for the first."""
    models = [Model(dtype), Model(dtype)]
    return [(model, CLASSES[kind](groups_of(model), **HYPERS[kind], **options)) for model in models]


def assert_pair_agrees(a, b):
    assert_same_bits((list(a[0].parameters()), a[1]), (list(b[0].parameters()), b[1]))


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


# Memory


def live_gradients(params):
    return sum(p.grad.nbytes for p in params if p.grad is not None)


@pytest.mark.parametrize("is_released", [False, True])
def test_one_gradient_is_alive_at_a_time(is_released):
    """Bytes of gradients, counted whenever one is complete: before its release, and after it."""
    model, optimizer = pair()[0]
    params = list(model.parameters())
    largest, whole = max(p.nbytes for p in params), sum(p.nbytes for p in params if p is not model.unused)
    before, after = [], []
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: before.append(live_gradients(params)))
    if is_released:
        enable_gradient_release(model, optimizer)
    for p in params:
        p.register_post_accumulate_grad_hook(lambda _: after.append(live_gradients(params)))
    train(model, optimizer, range(2))
    assert len(before) == len(after) == 2 * (len(params) - 1)
    if is_released:
        assert max(before) == largest and max(after) == 0
    else:
        assert max(before) == max(after) == whole


def peak_of_backward(is_released, layers=12, width=256):
    """The most bytes that the allocator gave out at a time during a backward(), as torch's profiler saw it."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).to(torch.bfloat16)
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    if is_released:
        enable_gradient_release(model, optimizer)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    peak = 0
    for _ in range(2):  # the first one makes the states
        loss = model(x).float().square().mean()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            loss.backward()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        optimizer.step()
        optimizer.zero_grad()
    return peak / (width * width * 2)


def test_peak_memory_of_backward_falls_to_a_few_gradients():
    assert peak_of_backward(False) > 11
    assert peak_of_backward(True) < 4


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
    with pytest.raises(RuntimeError, match=r"complete a second time .* handle.accumulate\(\)"):
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
