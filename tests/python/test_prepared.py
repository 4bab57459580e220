"""The quick way through step(): what it notices, what it leaves to the slower way, and the operators behind it."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from helpers import CLASSES, HYPERS, assert_same_bits, make_params, run, set_grads
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import flashoptim_native
from flashoptim_native import _ops, _states


@pytest.fixture(autouse=True, params=["C", "Python"])
def look(request, monkeypatch):
    """A step's look at parameters, states and gradients: python.cpp's, or what does without it."""
    assert _ops.python_functions
    if request.param == "Python":
        monkeypatch.setattr(_ops, "python_functions", {})


def pair(kind="adamw", **options):
    result = []
    for _ in range(2):
        params = make_params()
        result.append((params, CLASSES[kind](params, min_quantized_numel=64, **HYPERS[kind], **options)))
    return result


def slow(optimizer):
    """Keeps an optimizer on the slower way."""
    optimizer._prepare_after = 10**9
    return optimizer


@pytest.mark.parametrize("kind", list(CLASSES))
def test_both_ways_give_the_same_bits(kind):
    a, b = pair(kind)
    slow(b[1])
    for step in range(5):
        for params, optimizer in (a, b):
            set_grads(params, step)
            if step % 2:
                params[1].grad = None  # left out, and so is its step count
            optimizer.step()
    assert a[1]._prepared and not b[1]._prepared
    assert_same_bits(a, b)
    assert a[1].state[a[0][1]]["step"] == 3 and a[1].state[a[0][0]]["step"] == 5


@pytest.mark.parametrize("what", ["state tensor", "state dict", "parameter data", "option", "group", "step"])
def test_whatever_changes_is_seen(what):
    a, b = pair()
    run(a[1], a[0], 0, 2)
    run(b[1], b[0], 0, 2)
    for index, (params, optimizer) in enumerate((a, b)):
        p = params[0]
        if what == "state tensor":
            optimizer.state[p]["exp_avg"] = torch.zeros_like(optimizer.state[p]["exp_avg"])
        elif what == "state dict":
            optimizer.state[p] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()
            }
        elif what == "parameter data":
            p.data = p.data.clone() * 2
        elif what == "option":
            optimizer.param_groups[0]["master_weight_bits"] = 32
        elif what == "group":
            torch.manual_seed(5)
            params.append(torch.nn.Parameter(torch.randn(100)))
            optimizer.add_param_group({"params": [params[-1]], "lr": 0.5})
        else:
            optimizer.state[p]["step"] = 7
        if index == 1:
            slow(optimizer)._drop_prepared()
        run(optimizer, params, 2, 4)
    assert_same_bits(a, b)


EDITS = {
    "assigned": lambda state: state.__setitem__("exp_avg", state["exp_avg"] + 1),
    "updated": lambda state: state.update(exp_avg=state["exp_avg"] + 1),
    "merged": lambda state: state.__ior__({"correction": state["correction"] + 1}),
    "taken out and put back": lambda state: state.update(exp_avg=state.pop("exp_avg") + 1),
    "emptied": lambda state: state.clear(),
    "added": lambda state: state.setdefault("something else", 1),
}


@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edit_of_any_state_is_seen_at_the_next_step(edit):
    """Among others' steps, which change their own states, and after many steps in which nothing was edited."""
    a, b = pair()
    others, other = pair()[0]
    slow(b[1])
    for params, optimizer in (a, b):
        for i in range(3):
            run(optimizer, params, i, i + 1)
            run(other, others, 2 * i, 2 * i + 2)
    for place in (-1, 3):
        for params, optimizer in (a, b):
            EDITS[edit](optimizer.state[params[place]])
            assert optimizer is b[1] or not all(prepared.is_current() for prepared in optimizer._prepared)
            run(optimizer, params, 4 + place, 6 + place)
        assert_same_bits(a, b)
    run(other, others, 6, 8)
    assert all(prepared.is_current() for prepared in other._prepared)


def test_a_refused_gradient_changes_nothing_and_the_next_step_is_quick_again():
    (params, optimizer), _ = pair()
    run(optimizer, params, 0, 2)
    before = params[0].detach().clone()
    params[0].grad = params[0].grad[:1].expand(params[0].shape)  # strides that a plan does not take
    optimizer.step()
    assert not torch.equal(before, params[0])
    run(optimizer, params, 3, 9)
    assert optimizer._prepared


@pytest.mark.parametrize(
    "what", ["float32", "strides", "shape view", "sparse", "subclass", "none", "data", "inplace", "new"]
)
def test_whatever_gradient_there_is_is_taken_as_it_is(what):
    class Sub(torch.Tensor):
        pass

    a, b = pair()
    slow(b[1])
    for params, optimizer in (a, b):
        run(optimizer, params, 0, 2)
        set_grads(params, 2)
        p = next(p for p in params if p.dim() == 2)
        grad = p.grad
        if what == "float32":
            p.grad_dtype = None
            p.grad = grad.float() * 1.01
        elif what == "strides":
            p.grad = grad.t().contiguous().t()
        elif what == "shape view":
            p.grad = grad[:, :1].expand(grad.shape)
        elif what == "sparse":
            p.grad = grad.to_sparse()
        elif what == "subclass":
            p.grad = grad.clone().as_subclass(Sub)
        elif what == "none":
            p.grad = None
        elif what == "data":
            p.grad.data = grad.data * 3
        elif what == "inplace":
            p.grad.mul_(3)
        else:
            p.grad = grad * 3
        if what == "sparse":
            before = [q.detach().clone() for q in params]
            with pytest.raises(RuntimeError, match="sparse"):
                optimizer.step()
            assert all(map(torch.equal, before, params))
        else:
            optimizer.step()
        run(optimizer, params, 3, 12)
    assert a[1]._prepared and not b[1]._prepared
    assert_same_bits(a, b)


def test_no_gradient_outlives_its_step():
    (params, optimizer), _ = pair()
    run(optimizer, params, 0, 3)
    held = [weakref.ref(p.grad) for p in params]
    for p in params:
        p.grad = None
    assert not any(one() is not None for one in held)


def test_a_step_count_that_is_equal_is_unchanged_and_empty_parameters_are_current():
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (0,), (3, 0), ())]
    optimizer = flashoptim_native.FlashAdamW(params, min_quantized_numel=64)
    for _ in range(1000):
        set_grads(params, 0)
        optimizer.step()
    prepared = optimizer._prepared[0]
    for name in set(_ops.python_functions) & {"is_current"}:
        assert _ops.python_functions[name](prepared.plan, prepared.params, prepared.dicts)
    optimizer.state[params[0]]["step"] = int("1000")
    optimizer.step()
    assert optimizer._prepared[0] is prepared
    assert [optimizer.state[p]["step"] for p in params] == [1001] * 4


def test_a_plan_lives_on_when_a_parameter_sits_out_a_step():
    (params, optimizer), _ = pair()
    set_grads(params, 0)
    for _ in range(3):
        optimizer.step()
    prepared, grad = optimizer._prepared[0], params[0].grad
    for absent in (True, True, False, True):
        params[0].grad = None if absent else grad
        optimizer.step()
        assert optimizer._prepared[0] is prepared and prepared.is_current()
    assert [optimizer.state[p]["step"] for p in params[:2]] == [4, 7]


def test_swapped_parameters_are_seen():
    a, b = pair()
    slow(b[1])
    for params, optimizer in (a, b):
        run(optimizer, params, 0, 2)
        torch.utils.swap_tensors(params[0], torch.nn.Parameter(params[0].detach() * 2))
        run(optimizer, params, 2, 4)
    assert_same_bits(a, b)


def test_hooks_and_profilers_see_steps_as_those_of_torch():
    (params, optimizer), _ = pair()
    run(optimizer, params, 0, 2)
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
    assert {"Optimizer.step#FlashAdamW.step", "flashoptim::plan_step_"} <= {
        event.key for event in profile.key_averages()
    }
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        scheduler.step()


def test_states_share_few_allocations_and_a_checkpoint_holds_them(tmp_path):
    params = make_params(shapes=[(64, 64)] * 30)
    optimizer = flashoptim_native.FlashAdamW(params, lr=1e-2, min_quantized_numel=64)
    run(optimizer, params, 0, 1)
    storages = {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    assert len(storages) == 3  # uint8, int16, int8
    assert all(
        value.data_ptr() % 16 == 0
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = make_params(shapes=[(64, 64)] * 30)
    for p, q in zip(twin, params, strict=True):
        p.data.copy_(q)
    again = flashoptim_native.FlashAdamW(twin, lr=1e-2, min_quantized_numel=64)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(optimizer, params, 1, 3)
    run(again, twin, 1, 3)
    assert_same_bits((params, optimizer), (twin, again))


def test_states_that_fill_several_chunks(monkeypatch):
    monkeypatch.setattr(_states, "_CHUNK_BYTES", 10_000)
    a, b = pair()
    monkeypatch.setattr(_states, "_CHUNK_BYTES", 1 << 30)
    run(a[1], a[0], 0, 1)
    run(b[1], b[0], 0, 1)
    assert_same_bits(a, b)


def test_the_slower_way_makes_states_together_too():
    params = [torch.nn.Parameter(torch.randn(64, 64).bfloat16()) for _ in range(20)]
    optimizer = slow(flashoptim_native.FlashAdamW(params, lr=1e-2, min_quantized_numel=64))
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    for p in params[:15]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state) == set(params[:15])
    assert len({optimizer.state[p]["correction"].untyped_storage().data_ptr() for p in params[:15]}) == 2


def test_zero_operator():
    tensors = [
        torch.full(shape, 7, dtype=dtype)
        for shape, dtype in (((3,), torch.int8), ((0, 4), torch.int16), ((), torch.float32), ((257,), torch.uint8))
    ]
    room = torch.ones(6, 5)
    _ops.zero_([*tensors, room[1:4].t()])
    assert all(int(tensor.count_nonzero()) == 0 for tensor in tensors)
    assert room.sum(1).tolist() == [5, 0, 0, 0, 5, 5]
    _ops.zero_([])
    _ops.zero_([torch.ones(3, device="meta")])
    with pytest.raises(RuntimeError, match=r"tensors\[1\] has shape \[6, 2\] and strides \[5, 1\]"):
        _ops.zero_([tensors[0], room[:, :2]])
    with pytest.raises(RuntimeError, match=r"tensors\[1\] is on meta, but tensors\[0\] on cpu"):
        _ops.zero_([room, torch.ones(3, device="meta")])
    assert room[0].sum() == 5


def test_a_step_in_c_takes_what_the_operator_takes(look):
    step = _ops.python_functions.get("step")
    if step is None:
        pytest.skip("that of Python")
    (params, optimizer), _ = pair()
    run(optimizer, params, 0, 2)
    prepared, before = optimizer._prepared[0], [p.clone() for p in params]
    hypers = [0.1, 0.0, 0.0, 0.0, 3.0, 0.0, 0.9, 0.999, 1e-8]
    counter = torch.zeros(1, dtype=torch.int64)
    for wrong in (counter.to(torch.int32), torch.zeros(2, dtype=torch.int64), counter.to("meta"), None):
        assert not step(prepared.plan, [], hypers, 1.0, wrong)
    with pytest.raises(RuntimeError, match="grads has 0 entries; needed are"):
        step(prepared.plan, [], hypers, 1.0, counter)  # none were taken
    with pytest.raises(RuntimeError, match=r"hypers has 8 numbers"):
        step(prepared.plan, [], hypers[1:], 1.0, counter)
    with pytest.raises(RuntimeError, match=r"hyper_index has 1 entries"):
        step(prepared.plan, [0], hypers, 1.0, counter)
    with pytest.raises(RuntimeError, match=r"grad_scale = inf"):
        step(prepared.plan, [], hypers, float("inf"), counter)
    with pytest.raises(TypeError):
        step(prepared.plan, [], ["0.1"], 1.0, counter)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


def test_plans_end_with_their_optimizer():
    (params, optimizer), _ = pair()
    run(optimizer, params, 0, 1)
    number = optimizer._prepared[0].plan
    grads = [p.grad for p in params]
    _ops.plan_check(number, grads)
    with pytest.raises(RuntimeError, match=r"grads has 1 entries; needed are"):
        _ops.plan_check(number, grads[:1])
    with pytest.raises(RuntimeError, match=r"grads\[0\] has shape"):
        _ops.plan_check(number, [grads[0].t(), *grads[1:]])
    with pytest.raises(RuntimeError, match=r"grads has 0 entries; needed are"):
        _ops.plan_check(number, [])
    optimizer._drop_prepared()
    with pytest.raises(RuntimeError, match=f"plan = {number}; no such plan"):
        _ops.plan_check(number, grads)


def test_clipping_on_the_cpu_is_torchs():
    a, b = pair()
    for params, optimizer in (a, b):
        set_grads(params, 0, scale=5.0)
    norm = a[1].clip_grad_norm_(1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(b[0], 1.0))
    a[1].step()
    b[1].step()
    assert_same_bits(a, b)
    with pytest.raises(ValueError, match=r"max_norm = 0.0"):
        a[1].clip_grad_norm_(0.0)
    with pytest.raises(ValueError, match=r"max_norm = nan"):
        a[1].clip_grad_norm_(float("nan"))


def test_telemetry_of_every_parameter_by_name():
    torch.manual_seed(1)
    model = torch.nn.Linear(64, 64).bfloat16()
    optimizer = flashoptim_native.FlashAdamW(
        model.named_parameters(), lr=1e-2, check_numerics=True, min_quantized_numel=64
    )
    for step in range(3):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1 * (step + 1))
        model.bias.grad[3] = float("nan")
        optimizer.step()
    report = optimizer.numerics_report()
    assert set(report.parameters) == {"parameter 'weight'", "parameter 'bias'"}
    assert report.parameters["parameter 'weight'"].examined == 3 * 4096
    assert report.parameters["parameter 'weight'"].nonfinite_gradients == 0
    assert report.parameters["parameter 'bias'"].nonfinite_gradients == 3
    assert 0.0 < report.largest_update_ratio <= 1.1
    optimizer.reset_numerics()
    assert optimizer.numerics_report().sampled_updates == 0


def test_an_error_right_behind_a_step_is_raised_and_nothing_is_stepped_twice(monkeypatch):
    param = torch.nn.Parameter(torch.zeros(64, dtype=torch.float32))
    optimizer = flashoptim_native.FlashSGD([param], lr=1.0)
    param.grad = torch.ones_like(param)
    optimizer.step()

    def fails(params):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd.graph, "increment_version", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            optimizer.step()
    assert torch.equal(param.detach(), torch.full((64,), -2.0))
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((64,), -3.0))


def test_an_error_behind_a_step_is_raised_and_nothing_is_stepped_twice(monkeypatch):
    def make():
        params = make_params(shapes=[(64, 64), (64, 64)])
        groups = [{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}]
        return params, flashoptim_native.FlashSGD(
            groups, lr=1e-2, min_quantized_numel=64
        )  # two numbers of slots: two plans

    (params, optimizer), (expected, once) = make(), make()
    for tensors, one in ((params, optimizer), (expected, once)):
        run(one, tensors, 0, 2)
    set_grads(params, 2)
    set_grads(expected, 2)
    once.step()
    calls = []
    plan_step = _ops.plan_step_

    def second_fails(*arguments):
        calls.append(arguments[0])
        if len(calls) == 2:
            raise RuntimeError("the device is gone")
        return plan_step(*arguments)

    monkeypatch.setattr(_ops, "plan_step_", second_fails)
    through_operators = {name: function for name, function in _ops.python_functions.items() if name != "step"}
    monkeypatch.setattr(_ops, "python_functions", through_operators)
    with pytest.raises(RuntimeError, match="the device is gone"):
        optimizer.step()
    assert len(calls) == 2
    assert torch.equal(params[0], expected[0])
    assert optimizer.state[params[0]]["step"] == 3
    assert not torch.equal(params[1], expected[1])
