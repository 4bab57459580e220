"""An interrupt at any place: every parameter is stepped and counted, or neither; a load is taken, or not."""

from __future__ import annotations

import copy
import random
import signal
import threading
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import flashoptim_native
from attacks import IS_LONG, contents, plain, small
from flashoptim_native import _model_loads
from helpers import CLASSES, set_grads
from interrupts import At, Interrupt, places

#: Of the short form: about so many places of each action.
MOST = 10**9 if IS_LONG else 15


def chosen(count, most=MOST):
    return range(0, count, max(1, count // most))


def one(optimizer, param):
    """A parameter's weight and state, as bytes."""
    return plain(param), plain(dict(optimizer.state.get(param, {})))


def prepared(kind, steps, options, change):
    params, optimizer = small(kind, steps=steps, **options)
    set_grads(params, 77)
    change(params, optimizer)
    return params, optimizer


def nothing(params, optimizer):
    pass


def another_format(params, optimizer):
    optimizer.param_groups[0]["state_codec"] = "paper"


def another_dtype(params, optimizer):
    for p in params:
        p.grad = None
        p.data = p.data.to(torch.float16)
        p.grad = torch.full_like(p, 0.01)


def permuted(params, optimizer):
    params[0].data = params[0].data.t().contiguous().t()


def with_release(params, optimizer):
    flashoptim_native.enable_gradient_release(params, optimizer)
    for p in params:
        p.grad = None
    optimizer.loss = sum(((p.float() * 0.5) ** 2).sum() for p in params)


def step(params, optimizer):
    optimizer.step()


def step_param(params, optimizer):
    optimizer.step_param(params[0])


def release(params, optimizer):
    optimizer.loss.backward()


STEPS = [
    ("adamw", 0, {}, nothing, step),
    ("adamw", 2, {}, nothing, step),
    ("adamw", 2, {"check_numerics": True}, nothing, step),
    ("adamw", 2, {"capturable": True}, nothing, step),
    ("adamw", 2, {}, another_format, step),
    ("adamw", 2, {}, another_dtype, step),
    ("adamw", 2, {}, permuted, step),
    ("sgd", 2, {"momentum": 0.0}, nothing, step),
    ("lion", 2, {}, nothing, step),
    ("adamw", 0, {}, nothing, step_param),
    ("adamw", 2, {}, nothing, step_param),
    ("adamw", 2, {}, another_format, step_param),
    ("adamw", 2, {}, with_release, release),
]
IDS = [
    f"{kind}-{steps}-{options}-{change.__name__}-{action.__name__}" for kind, steps, options, change, action in STEPS
]


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize(("kind", "steps", "options", "change", "action"), STEPS, ids=IDS)
@pytest.mark.filterwarnings("ignore")
def test_a_step_counts_what_it_moves(kind, steps, options, change, action, opcodes, tally):
    params, optimizer = prepared(kind, steps, options, change)
    before = [one(optimizer, p) for p in params]
    action(params, optimizer)
    after = [one(optimizer, p) for p in params]
    finished = [contents(optimizer)]
    again = prepared(kind, steps, options, change)
    count = places(lambda: action(*again), opcodes)
    assert count > 5
    for number in chosen(count):
        params, optimizer = prepared(kind, steps, options, change)
        with At(number, opcodes) as at:
            action(params, optimizer)
        for index, p in enumerate(params):
            found = one(optimizer, p)
            if found not in (before[index], after[index]):
                tally.find(f"parameter {index} is half stepped behind an interrupt at {at.where}")
                break
            is_released = found == after[index] != before[index] and action is release
            if is_released and p.grad is not None and _is_stepped_again(optimizer, p, found):
                tally.find(f"parameter {index} is stepped twice behind an interrupt at {at.where}")
                break
        else:
            _finish(params, optimizer, before, after, finished, action, at, tally)


def _is_stepped_again(optimizer, p, found):
    optimizer.step()
    return one(optimizer, p) != found


def _finish(params, optimizer, before, after, finished, action, at, tally):
    """What was not stepped can be, and comes to the same bits."""
    if action is step:
        for index, p in enumerate(params):
            if one(optimizer, p) == after[index]:
                p.grad = None
        optimizer.step()
        if contents(optimizer) != finished[0]:
            return tally.find(f"the rest comes to other bits behind an interrupt at {at.where}")
    tally.count("whole")
    return None


def state_of(params, optimizer):
    return contents(optimizer), [len(group["params"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
@pytest.mark.parametrize("change", [nothing, another_dtype])
@pytest.mark.filterwarnings("ignore")
def test_a_load_is_taken_or_not(change, opcodes, tally):
    _, source = small("adamw", steps=4)
    saved = copy.deepcopy(source.state_dict())

    def make():
        params, optimizer = small("adamw", steps=1)
        change(params, optimizer)
        return params, optimizer

    params, optimizer = make()
    before = state_of(params, optimizer)
    optimizer.load_state_dict(saved)
    after = state_of(params, optimizer)
    params, optimizer = make()
    count = places(lambda: optimizer.load_state_dict(saved), opcodes)
    for number in chosen(count):
        params, optimizer = make()
        with At(number, opcodes) as at:
            optimizer.load_state_dict(saved)
        found = state_of(params, optimizer)
        if found not in (before, after):
            tally.find(f"half loaded behind an interrupt at {at.where}")
            continue
        set_grads(params, 9)
        optimizer.step()
        tally.count("before" if found == before else "loaded")


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
def test_a_group_is_added_or_not(opcodes, tally):
    def make():
        _, optimizer = small("adamw", steps=1)
        return optimizer, {"params": [torch.nn.Parameter(torch.ones(5))], "lr": 0.5}

    optimizer, group = make()
    before = len(optimizer.param_groups)
    count = places(lambda: optimizer.add_param_group(group), opcodes)
    for number in chosen(count):
        optimizer, group = make()
        with At(number, opcodes) as at:
            optimizer.add_param_group(group)
        if len(optimizer.param_groups) == before:
            tally.count("before")
        elif "lr" in optimizer.param_groups[-1] and type(optimizer.param_groups[-1]) is type(optimizer.param_groups[0]):
            tally.count("added")
        else:
            tally.find(f"half added behind an interrupt at {at.where}")


def model_of(dtype=torch.bfloat16):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 4)).to(dtype)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    return model


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
def test_fp32_weights_are_set_with_their_corrections(opcodes, tally):
    def make():
        model = model_of()
        optimizer = flashoptim_native.FlashAdamW(model.parameters(), min_quantized_numel=0)
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()
        return model, optimizer

    model, optimizer = make()
    weights = {k: v + 0.001 * torch.rand_like(v) if v.is_floating_point() else v
               for k, v in optimizer.get_fp32_model_state_dict(model).items()}  # fmt: skip

    def pairs(model, optimizer):
        return [(plain(p), plain(optimizer.state[p].get("correction"))) for p in model.parameters()]

    before = pairs(model, optimizer)
    optimizer.set_fp32_model_state_dict(model, weights)
    after = pairs(model, optimizer)
    model, optimizer = make()
    count = places(lambda: optimizer.set_fp32_model_state_dict(model, weights), opcodes)
    for number in chosen(count):
        model, optimizer = make()
        with At(number, opcodes) as at:
            optimizer.set_fp32_model_state_dict(model, weights)
        if any(found not in (b, a) for found, b, a in zip(pairs(model, optimizer), before, after, strict=True)):
            tally.find(f"a weight without its correction behind an interrupt at {at.where}")
            continue
        optimizer.set_fp32_model_state_dict(model, weights)
        tally.count("whole") if pairs(model, optimizer) == after else tally.find(f"never comes behind {at.where}")


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "bytecodes"])
def test_casts_are_whole_and_can_be_taken_up_again(opcodes, tally):
    def make():
        model = model_of(torch.float32)
        model.tied = torch.nn.Linear(6, 8)
        model.tied.weight.data = model[0].weight.data  # another parameter over the same memory
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        return model

    def cast(model):
        flashoptim_native.cast_model(model, full_precision_layers=["2"], full_precision_recast_layers=["1"])

    def found(model):
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        return [(plain(p), plain(p.grad)) for p in model.parameters()], hooks

    def is_tied(model):
        return model.tied.weight.data_ptr() == model[0].weight.data_ptr()

    model = make()
    before = found(model)[0]
    cast(model)
    after = found(model)
    count = places(lambda: cast(make()), opcodes)
    for number in chosen(count):
        model = make()
        with At(number, opcodes) as at:
            cast(model)
        if any(now not in (b, a) for now, b, a in zip(found(model)[0], before, after[0], strict=True)):
            tally.find(f"half cast behind an interrupt at {at.where}")
            continue
        if not is_tied(model):
            tally.find(f"a tie is cut by an interrupt at {at.where}")
            continue
        cast(model)
        if found(model) != after or not is_tied(model):
            tally.find(f"not to be taken up again behind an interrupt at {at.where}")
        else:
            tally.count("whole")


def another_thread_can_take(lock):
    def take():
        if lock.acquire(timeout=60):
            taken.append(True)
            lock.release()

    taken = []
    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(taken)


def owners_by_another_thread(model):
    """Identities of the optimizers that hold a model's parameters; none where that never ends."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(_model_loads.owners(model)), daemon=True)
    thread.start()
    thread.join(60)
    return {id(owner) for owner, _ in found}


def test_no_lock_is_held_at_any_place_by_the_module_that_loads_use(tally):
    """What stands for every optimizer there is must not be left locked, whoever raises where."""
    model = model_of()
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    saved = copy.deepcopy(model.state_dict())
    actions = [
        lambda: model.load_state_dict(saved),
        lambda: flashoptim_native.FlashAdamW(model.parameters()),
        lambda: _model_loads.owners(model),
        lambda: _model_loads.watch(optimizer),
    ]
    for action in actions:
        for opcodes in (False, True):
            for number in chosen(places(action, opcodes)):
                with At(number, opcodes):
                    action()
                is_found = id(optimizer) in owners_by_another_thread(model)
                tally.count("free") if is_found else tally.find(f"{action} at {number}")


@pytest.mark.parametrize("kind", CLASSES if IS_LONG else ["adamw"])
def test_signals_at_random_moments(kind, tally):
    """SIGINT itself, by a timer, at moments spread over a step and a little beyond."""
    tries = 4000 if IS_LONG else 150
    chance = random.Random(1)
    params, optimizer = small(kind, steps=1, shapes=[(64, 64), (5,), (33, 40)])
    reference_params, reference = small(kind, steps=1, shapes=[(64, 64), (5,), (33, 40)])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for number in range(tries):
            set_grads(params, number % 5)
            held = plain(optimizer.state[params[0]]["step"])
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-6, 3e-4))
                for _ in range(3):
                    optimizer.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
                outcome = "not in time"
            except KeyboardInterrupt:
                outcome = "interrupted"
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not another_thread_can_take(optimizer._store.lock):
                tally.find("a lock is held behind a signal")
                break
            taken = optimizer.state[params[0]]["step"] - held[1]
            set_grads(reference_params, number % 5)
            for _ in range(taken):
                reference.step()
            if contents(optimizer) == contents(reference):
                tally.count(outcome)
            else:
                tally.find(f"weights and counts do not go together behind {taken} steps")
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        torch.set_grad_enabled(True)  # torch.no_grad() itself does not always put it back


@pytest.mark.parametrize("where", ["closure", "pre", "post", "global pre", "pre_step", "load pre", "load post"])
def test_exceptions_of_hooks_leave_whole_steps(where, tally):
    def fail(*arguments):
        raise Interrupt

    params, optimizer = small("adamw", steps=2)
    set_grads(params, 1)
    before = contents(optimizer)
    expected_params, expected = small("adamw", steps=2)
    set_grads(expected_params, 1)
    saved = copy.deepcopy(expected.state_dict())
    expected.step()
    handle = None
    with pytest.raises(Interrupt), warnings.catch_warnings():
        if where == "closure":
            optimizer.step(fail)
        elif where == "pre":
            optimizer.register_step_pre_hook(fail)
            optimizer.step()
        elif where == "post":
            optimizer.register_step_post_hook(fail)
            optimizer.step()
        elif where == "global pre":
            handle = register_optimizer_step_pre_hook(fail)
            try:
                optimizer.step()
            finally:
                handle.remove()
        elif where == "pre_step":
            loss = (params[0].float() ** 2).sum()
            params[0].grad = None
            flashoptim_native.enable_gradient_release(params, optimizer, pre_step=fail)
            loss.backward()
        else:
            register = (
                "register_load_state_dict_pre_hook" if where == "load pre" else ("register_load_state_dict_post_hook")
            )
            getattr(optimizer, register)(fail)
            optimizer.load_state_dict(saved)
    wanted = contents(expected) if where == "post" else before
    tally.count("whole") if contents(optimizer) == wanted else tally.find(where)
