"""The way through a step: its cost, threads, interrupts, hooks, and what it reports."""

from __future__ import annotations

import functools
import gc
import sys
import threading
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import flashoptim_native
from flashoptim_native import _layout, _ops
from helpers import CLASSES, assert_same_bits, bits, make_params, run, set_grads
from store_helpers import everything, make, take_step


def calls_of(function):
    """Calls of functions, Python's and C's, inside one call of ``function``."""
    count = 0

    def see(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # it calls back
    sys.setprofile(see)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def small(count, **options):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(count)]
    for p in params:
        p.grad = torch.ones_like(p)
    return params, flashoptim_native.FlashAdamW(params, **options)


@pytest.mark.parametrize("options", [{}, {"check_numerics": True}], ids=["plain", "check_numerics"])
def test_a_parameter_alone_costs_the_same_among_many(options):
    costs = {}
    for count in (20, 2000):
        params, optimizer = small(count, **options)
        found = costs[count] = []
        for _ in range(3):  # alone, planned, as always; what is done once for all comes with the first ones
            found.append([calls_of(functools.partial(optimizer.step_param, p)) for p in params])
    for few, many in zip(costs[20], costs[2000], strict=True):
        assert set(few[3:]) == set(many[3:])


def test_parameters_that_come_one_by_one_are_planned_together(monkeypatch):
    """Not at each of them again: that would cost the square of their number."""
    planned = []
    plan = _ops.store.plan
    monkeypatch.setattr(_ops.store, "plan", lambda handle: (planned.append(1), plan(handle))[1])
    params, optimizer = small(300)
    for _ in range(3):
        for p in params:
            optimizer.step_param(p)
    assert len(planned) == 1
    optimizer.step()
    assert len(planned) == 1 and optimizer.state[params[7]]["step"] == 4


def test_one_parameter_group_for_each_parameter():
    """Options are read of its group alone."""
    costs = []
    for count in (20, 400):
        params = [torch.nn.Parameter(torch.ones(8)) for _ in range(count)]
        optimizer = flashoptim_native.FlashAdamW([{"params": [p]} for p in params])
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
                optimizer.step_param(p)
        costs.append(calls_of(functools.partial(optimizer.step_param, params[3])))
    assert costs[0] == costs[1]


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_threads_that_share_an_optimizer_lose_no_step(one_by_one):
    count, rounds = 6, 10
    params, optimizer = make(shapes=[(256, 256)] * 3, steps=0)
    plain, other = make(shapes=[(256, 256)] * 3, steps=0)
    for tensors in (params, plain):
        set_grads(tensors, 0)
    failed = []
    start = threading.Barrier(count)

    def work():
        start.wait()
        try:
            for _ in range(rounds):
                take_step(optimizer, params, one_by_one)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    for _ in range(count * rounds):
        other.step()
    assert_same_bits((params, optimizer), (plain, other))


def test_threads_with_an_optimizer_each():
    params, optimizers = zip(*(make(shapes=[(64, 64)], steps=0) for _ in range(4)), strict=True)
    threads = [threading.Thread(target=run, args=(o, p, 0, 20)) for p, o in zip(params, optimizers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pair in zip(params[1:], optimizers[1:], strict=True):
        assert_same_bits((params[0], optimizers[0]), pair)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_an_interrupt_behind_a_step_takes_nothing_back(one_by_one, monkeypatch):
    """New states and conversions belong to the step that was done."""
    (params, optimizer), plain = make(shapes=[(64, 64)]), make(shapes=[(64, 64)])
    for pair in ((params, optimizer), plain):
        pair[1].param_groups[0]["quantize"] = False
        set_grads(pair[0], 2)
    name = "step_one" if one_by_one else "step"
    do = getattr(_ops.store, name)

    def interrupted(*arguments):
        done = do(*arguments)
        if done == 1:
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patch:
        patch.setattr(_ops.store, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            take_step(optimizer, params, one_by_one)
    plain[1].step()
    assert_same_bits((params, optimizer), plain)
    for pair in ((params, optimizer), plain):
        run(pair[1], pair[0], 3, 5)
    assert_same_bits((params, optimizer), plain)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_an_interrupt_before_a_step_takes_all_back(one_by_one, monkeypatch):
    params, optimizer = make(shapes=[(64, 64)] * 2)
    optimizer.param_groups[0]["quantize"] = False
    params[0].data = params[0].data.half()
    set_grads(params, 2)
    before = everything(params, optimizer)
    calls = []
    describe = _ops.store.describe

    def interrupted(*arguments):
        calls.append(arguments)
        describe(*arguments)
        if one_by_one or len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_ops.store, "describe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take_step(optimizer, params, one_by_one)
    assert calls and everything(params, optimizer) == before
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    assert [bits(p) for p in twins] == [bits(p) for p in params]
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 3


def test_an_error_right_behind_a_step_is_raised_and_nothing_is_stepped_twice():
    param = torch.nn.Parameter(torch.zeros(64))
    optimizer = flashoptim_native.FlashSGD([param], lr=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()

    def fails(params):
        raise RuntimeError("out of luck")

    try:
        _ops.store.find_layout(None)  # torch's function counts versions then
        _ops.store.versions(fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    finally:
        _ops.store.versions(torch.autograd.graph.increment_version)
        _layout.find(_ops.store, free_threaded=False)
    assert torch.equal(param.detach(), torch.full((64,), -2.0))
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((64,), -3.0))


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_autograd_is_told_that_parameters_have_changed(one_by_one):
    params, optimizer = make(shapes=[(64, 64)] * 2)
    params[1].data = params[1].data.t().contiguous().t()
    set_grads(params, 2)
    versions = [p._version for p in params]
    take_step(optimizer, params, one_by_one)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    optimizer.zero_grad()
    versions = [p._version for p in params]
    take_step(optimizer, params, one_by_one)
    assert [p._version for p in params] == versions


def test_two_numbers_of_states_are_two_plans():
    def pair():
        params = make_params(shapes=[(64, 64)] * 3)
        groups = [{"params": params[:2], "momentum": 0.9}, {"params": params[2:]}]
        return params, flashoptim_native.FlashSGD(groups, lr=1e-2, min_quantized_numel=64)

    a, b = pair(), pair()
    for step in range(4):
        for params, optimizer in (a, b):
            set_grads(params, step)
            take_step(optimizer, params, one_by_one=optimizer is b[1])
    assert_same_bits(a, b)
    assert sorted(map(sorted, a[1]._store.records.plans)) == [[0, 1], [2]]


def test_counts_that_are_the_same_number_change_nothing():
    params, optimizer = make(steps=300, shapes=[(64, 64), (0,), (3, 0), ()])
    generation = optimizer._store.records.generation
    optimizer.state[params[0]]["step"] = int("300")
    run(optimizer, params, 0, 1)
    assert optimizer._store.records.generation == generation
    assert [optimizer.state[p]["step"] for p in params] == [301] * 4


def test_hooks_and_profilers_see_steps_as_those_of_torch():
    params, optimizer = make()
    set_grads(params, 2)
    seen = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("pre")),
        optimizer.register_step_post_hook(lambda *_: seen.append("post")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    wanted = ["global pre", "pre", "post", "global post"]
    for handle, name in zip(handles, ("pre", "post", "global pre", "global post"), strict=True):
        seen.clear()
        optimizer.step()
        assert seen == wanted
        wanted.remove(name)
        handle.remove()
    seen.clear()
    optimizer.step()
    assert seen == []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#FlashAdamW.step" in {event.key for event in profile.key_averages()}
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


def test_zero_operator():
    zero_ = torch.ops.flashoptim.zero_
    tensors = [
        torch.full(shape, 7, dtype=dtype)
        for shape, dtype in (((3,), torch.int8), ((0, 4), torch.int16), ((), torch.float32), ((257,), torch.uint8))
    ]
    room = torch.ones(6, 5)
    zero_([*tensors, room[1:4].t()])
    assert all(int(tensor.count_nonzero()) == 0 for tensor in tensors)
    assert room.sum(1).tolist() == [5, 0, 0, 0, 5, 5]
    zero_([])
    zero_([torch.ones(3, device="meta")])
    with pytest.raises(RuntimeError, match=r"tensors\[1\] has shape \[6, 2\] and strides \[5, 1\]"):
        zero_([tensors[0], room[:, :2]])
    with pytest.raises(RuntimeError, match=r"tensors\[1\] is on meta, but tensors\[0\] on cpu"):
        zero_([room, torch.ones(3, device="meta")])
    assert room[0].sum() == 5


def test_operators_refuse_storages_that_are_too_small():
    param, correction = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int8)
    for tensor, name in ((correction, "correction"), (param, "param")):
        tensor.untyped_storage().resize_(5)
        with pytest.raises(RuntimeError, match=f"{name} of shape .* needs more memory than its storage has, 5 bytes"):
            _ops.merge_weights(param, correction, 2)


def test_clipping_on_the_cpu_is_torchs():
    a, b = make(), make()
    for params, _ in (a, b):
        set_grads(params, 2, scale=5.0)
    norm = a[1].clip_grad_norm_(1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(b[0], 1.0))
    a[1].step()
    b[1].step()
    assert_same_bits(a, b)
    for wrong in (0.0, float("nan")):
        with pytest.raises(ValueError, match=f"max_norm = {wrong}"):
            a[1].clip_grad_norm_(wrong)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_telemetry_of_every_parameter_by_name(one_by_one):
    torch.manual_seed(1)
    model = torch.nn.Linear(64, 64).bfloat16()
    optimizer = flashoptim_native.FlashAdamW(
        model.named_parameters(), lr=1e-2, check_numerics=True, min_quantized_numel=64
    )
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        model.bias.grad[3] = float("nan")
        model.weight.grad = model.weight.grad.t().contiguous().t()  # copied at every step
        take_step(optimizer, list(model.parameters()), one_by_one)
    report = optimizer.numerics_report()
    assert set(report.parameters) == {"parameter 'weight'", "parameter 'bias'"}
    assert report.parameters["parameter 'weight'"].examined == 3 * 4096
    assert report.parameters["parameter 'weight'"].nonfinite_gradients == 0
    assert report.parameters["parameter 'bias'"].nonfinite_gradients == 3
    assert 0.0 < report.largest_update_ratio <= 1.1
    optimizer.reset_numerics()
    assert optimizer.numerics_report().sampled_updates == 0


@pytest.mark.parametrize("kind", list(CLASSES))
def test_all_at_once_and_one_by_one_give_the_same_bits(kind):
    a, b = make(kind), make(kind)
    for step in range(2, 6):
        for params, optimizer in (a, b):
            set_grads(params, step)
            if step % 2:
                params[1].grad = None
            take_step(optimizer, params, one_by_one=optimizer is b[1] and step < 5)
    assert_same_bits(a, b)
