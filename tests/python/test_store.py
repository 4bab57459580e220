"""Whatever is done to parameters, gradients and states between steps: the right result, or an error with nothing
changed."""

from __future__ import annotations

import collections
import copy

import pytest
import torch

import flashoptim_native
from helpers import CLASSES, assert_same_bits, bits, run, set_grads
from store_helpers import Watched, everything, make, take_step

STATE_KEYS = ["exp_avg_codes", "exp_avg_sq_codes", "exp_avg_scale", "exp_avg_sq_scale", "correction"]
TARGETS = ["parameter", "gradient", *STATE_KEYS]


def target(params, optimizer, what, index=0):
    param = params[index]
    if what == "parameter":
        return param
    return param.grad if what == "gradient" else optimizer.state[param][what]


def put(params, optimizer, what, value, index=0):
    if what == "gradient":
        params[index].grad = value
    else:
        optimizer.state[params[index]][what] = value


def swap(tensor):
    other = torch.nn.Parameter(tensor.detach().clone()) if isinstance(tensor, torch.nn.Parameter) else tensor.clone()
    if isinstance(tensor, torch.nn.Parameter):
        other.grad = tensor.grad
    torch.utils.swap_tensors(tensor, other)


def room_for(tensor):
    """A view of the same values that lies in the middle of a larger storage."""
    room = torch.zeros(tensor.numel() + 32, dtype=tensor.dtype)
    return room[16 : 16 + tensor.numel()].view(tensor.shape).copy_(tensor.detach())


# The tensor object stays, its values stay, its memory is another.
MOVES = {
    "data": lambda t: setattr(t, "data", t.data.clone()),
    "data, a part of a storage": lambda t: setattr(t, "data", room_for(t)),
    "set_": lambda t: t.set_(t.detach().clone()),
    "set_ of a storage": lambda t: t.set_(t.detach().clone().untyped_storage(), 0, t.shape, t.stride()),
    "swap_tensors": swap,
    "storage grown": lambda t: grow(t),
    "storage emptied and filled again": lambda t: refill(t),
    "as optimizer_to() does": lambda t: setattr(t, "data", t.data.to("cpu", copy=True)),
}


def resizable(tensor):
    return tensor.set_(tensor.detach().clone()).untyped_storage()  # what NumPy has seen is not


def grow(tensor):
    resizable(tensor).resize_(tensor.untyped_storage().nbytes() + 4096)


def refill(tensor):
    resizable(tensor)
    values, size = tensor.detach().clone(), tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    tensor.untyped_storage().resize_(size)
    tensor.detach().copy_(values)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize(
    ("what", "move"),
    # torch does not swap the gradient of a leaf
    [(what, move) for what in TARGETS for move in MOVES if (what, move) != ("gradient", "swap_tensors")],
)
def test_memory_that_was_left_is_not_touched(what, move, one_by_one):
    (params, optimizer), plain = make(), make()
    for step in range(2, 5):
        set_grads(params, step)
        set_grads(plain[0], step)
        watched = Watched(target(params, optimizer, what))
        with torch.no_grad():
            MOVES[move](target(params, optimizer, what))
        if "storage" not in move or "set_" in move:
            watched.fill_if_left()
            assert watched.is_left
            take_step(optimizer, params, one_by_one)
            watched.check()
        else:
            take_step(optimizer, params, one_by_one)
        take_step(plain[1], plain[0], one_by_one)
        assert_same_bits((params, optimizer), plain)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("what", ["parameter", "gradient"])
@pytest.mark.parametrize("kind", list(CLASSES))
def test_a_transposed_square_is_taken_by_its_values(kind, what, one_by_one):
    """The same address, other strides."""
    (params, optimizer), plain = make(kind), make(kind)
    for step in range(2, 5):
        for tensors in (params, plain[0]):
            set_grads(tensors, step)
        tensor, other = target(params, optimizer, what), target(*plain, what)
        with torch.no_grad():
            tensor.t_() if step % 2 else setattr(tensor, "data", tensor.data.t())
            other.copy_(other.t().clone())
        take_step(optimizer, params, one_by_one)
        take_step(plain[1], plain[0], one_by_one)
        assert_same_bits((params, optimizer), plain)


# What cannot be stepped.
BREAKS = {
    "a smaller shape by resize_": lambda ps, o, k: resize(target(ps, o, k), 3),
    "a larger shape by resize_": lambda ps, o, k: resize(target(ps, o, k), 640, 640),
    "another shape by data": lambda ps, o, k: setattr(target(ps, o, k), "data", target(ps, o, k).data[:5].clone()),
    "a storage of 3 bytes": lambda ps, o, k: target(ps, o, k).untyped_storage().resize_(3),
    "a storage of 0 bytes": lambda ps, o, k: target(ps, o, k).untyped_storage().resize_(0),
    "a storage one byte short": lambda ps, o, k: shorten(target(ps, o, k)),
}
REPLACEMENTS = {
    "nothing": lambda t: None,
    "a number": lambda t: 7,
    "a list": lambda t: t.tolist(),
    "a meta tensor": lambda t: t.to("meta"),
    "a sparse tensor": lambda t: t.float().to_sparse(),
    "a complex tensor": lambda t: t.to(torch.complex64),
    "a view that overlaps itself": lambda t: t[:1, :1].expand(t.shape),
}


def resize(tensor, *shape):
    tensor.data = tensor.data.clone().resize_(*shape)


def shorten(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)


def expect_error_or(params, optimizer, plain, one_by_one, is_error):
    """The step either raises with nothing changed, or does what it does to tensors of the same values."""
    before = everything(params, optimizer)
    try:
        take_step(optimizer, params[:1] if one_by_one else params, one_by_one)
    except (RuntimeError, ValueError, TypeError) as error:
        assert "parameter 0 of group 0" in str(error) and "please report" not in str(error), error
        assert everything(params, optimizer) == before
    else:
        assert not is_error
        take_step(plain[1], plain[0][:1] if one_by_one else plain[0], one_by_one)
        assert_same_bits((params, optimizer), plain)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("name", list(BREAKS))
@pytest.mark.parametrize("what", TARGETS)
def test_a_tensor_without_its_memory_is_refused(what, name, one_by_one):
    params, optimizer = make()
    set_grads(params, 2)
    with torch.no_grad():
        BREAKS[name](params, optimizer, what)
    # What is looked at afterwards must have memory itself.
    held = [bits(p) for p in params[1:]], [copy.deepcopy(optimizer.state[p]) for p in params[1:]]
    with pytest.raises((RuntimeError, ValueError), match="parameter 0 of group 0"):
        take_step(optimizer, params, one_by_one)
    assert [bits(p) for p in params[1:]] == held[0]
    for param, before in zip(params[1:], held[1], strict=True):
        assert optimizer.state[param].keys() == before.keys() and optimizer.state[param]["step"] == before["step"] == 2


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("name", list(REPLACEMENTS))
@pytest.mark.parametrize("key", STATE_KEYS)
def test_an_entry_that_is_no_tensor_of_its_kind(key, name, one_by_one):
    (params, optimizer), plain = make(), make()
    set_grads(params, 2)
    set_grads(plain[0], 2)
    value = optimizer.state[params[0]][key]
    optimizer.state[params[0]][key] = REPLACEMENTS[name](value)
    if name == "a view that overlaps itself":
        plain[1].state[plain[0][0]][key] = REPLACEMENTS[name](value).contiguous()
    elif name == "nothing" and key == "correction":  # as one that is not there
        plain[1].state[plain[0][0]][key].zero_()
    can_do = name == "a view that overlaps itself" or (name, key) == ("nothing", "correction")
    expect_error_or(params, optimizer, plain, one_by_one, is_error=not can_do)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("key", [*STATE_KEYS, "step"])
def test_an_entry_that_is_deleted(key, one_by_one):
    (params, optimizer), plain = make(), make()
    set_grads(params, 2)
    set_grads(plain[0], 2)
    del optimizer.state[params[0]][key]
    plain[1].state[plain[0][0]]["correction"].zero_()
    expect_error_or(params, optimizer, plain, one_by_one, is_error=key != "correction")


EDITS = {
    "assigned": lambda state: state.__setitem__("exp_avg_codes", state["exp_avg_codes"] + 1),
    "updated": lambda state: state.update(exp_avg_codes=state["exp_avg_codes"] + 1),
    "merged": lambda state: state.__ior__({"correction": state["correction"] + 1}),
    "taken out and put back": lambda state: state.update(exp_avg_codes=state.pop("exp_avg_codes") + 1),
    "in another order": lambda state: reorder(state),
    "written to": lambda state: state["exp_avg_codes"].add_(1),
    "emptied": lambda state: state.clear(),
    "a count": lambda state: state.update(step=7),
    "a count of another kind": lambda state: state.update(step=torch.tensor(7.0)),
    "an entry more": lambda state: state.setdefault("something else", 1),
    "an entry that is no text": lambda state: state.setdefault(5, torch.ones(3)),
    "all replaced": lambda state: state.update({k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}),
}


def reorder(state):
    items = list(state.items())[::-1]
    state.clear()
    state.update(items)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("edit", list(EDITS))
def test_an_edit_of_any_state_is_seen_at_the_next_step(edit, one_by_one):
    """The same as an optimizer that is made anew from the same values."""
    params, optimizer = make()
    for index in (0, 2):
        EDITS[edit](optimizer.state[params[index]])
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        twin = flashoptim_native.FlashAdamW(twins)
        twin.__setstate__(copy.deepcopy(optimizer.__getstate__()))
        for p, q in zip(params, list(twin.param_groups[0]["params"]), strict=True):
            assert bits(p) == bits(q)
        twins = twin.param_groups[0]["params"]
        for step in (4, 5):
            set_grads(params, step)
            set_grads(twins, step)
            take_step(optimizer, params, one_by_one)
            take_step(twin, twins, one_by_one)
        assert_same_bits((params, optimizer), (twins, twin))


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_states_of_other_types(one_by_one):
    (params, optimizer), plain = make(), make()
    optimizer.state[params[0]] = collections.OrderedDict(optimizer.state[params[0]])
    optimizer.state[params[0]].move_to_end("step")
    optimizer.state[params[2]] = collections.defaultdict(int, optimizer.state[params[2]])
    set_grads(params, 2)
    set_grads(plain[0], 2)
    take_step(optimizer, params, one_by_one)
    take_step(plain[1], plain[0], one_by_one)
    assert_same_bits((params, optimizer), plain)
    for wrong in ([1], (1, 2), torch.ones(3), "text", 5):
        optimizer.state[params[0]] = wrong
        before = everything(params, optimizer)
        with pytest.raises(
            (RuntimeError, TypeError, ValueError), match=f"parameter 0 of group 0 is a {type(wrong).__name__}"
        ):
            take_step(optimizer, params, one_by_one)
        assert everything(params, optimizer) == before


def without_memory(count):
    count.untyped_storage().resize_(0)
    return count


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_a_counter_without_its_memory_is_refused(one_by_one):
    params, optimizer = make()
    set_grads(params, 2)
    optimizer.state[params[0]]["step"] = without_memory(torch.tensor(2))
    with pytest.raises(ValueError, match="state 'step' of parameter 0 of group 0 has .* a storage of 0 bytes"):
        take_step(optimizer, params, one_by_one)
    assert optimizer.state[params[2]]["step"] == 2


def test_a_smaller_storage_is_refused_wherever_it_lies():
    """Freed and taken anew, it may come back to the same address."""
    params, optimizer = make(shapes=[(256, 256)])
    state = optimizer.state[params[0]]
    for _ in range(20):
        state["exp_avg_codes"] = state["exp_avg_codes"].clone()
        set_grads(params, 2)
        optimizer.step()
        storage = state["exp_avg_codes"].untyped_storage()
        storage.resize_(0)
        storage.resize_(1000)
        with pytest.raises(RuntimeError, match="state 'exp_avg_codes' of parameter 0 of group 0 .* 1000 bytes"):
            optimizer.step()
        state["exp_avg_codes"] = torch.zeros(256, 256, dtype=torch.uint8)


@pytest.mark.parametrize("count", [-1, 2**53, 2**70, 0.5, float("nan"), torch.tensor(-1.0), torch.tensor([1, 2])])
@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_a_count_that_is_none(count, one_by_one):
    params, optimizer = make()
    set_grads(params, 2)
    optimizer.state[params[0]]["step"] = count
    before = everything(params, optimizer)
    with pytest.raises((ValueError, RuntimeError), match="parameter 0 of group 0"):
        take_step(optimizer, params, one_by_one)
    assert everything(params, optimizer) == before


def test_arrays_that_two_parameters_share_are_refused():
    shapes = [(64, 64), (64, 64), (64, 64)]
    shares = {
        "a state": lambda ps, o: o.state[ps[2]].update(exp_avg_codes=o.state[ps[0]]["exp_avg_codes"]),
        "all states": lambda ps, o: o.state.update({ps[2]: o.state[ps[0]]}),
        "memory": lambda ps, o: setattr(ps[2], "data", ps[0].data),
        "a part": lambda ps, o: setattr(o.state[ps[2]]["correction"], "data", o.state[ps[0]]["correction"].data),
    }
    for name, share in shares.items():
        params, optimizer = make(shapes=shapes)
        share(params, optimizer)
        set_grads(params, 2)
        before = everything(params, optimizer)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="share memory"):
                optimizer.step()
            assert everything(params, optimizer) == before, name


def test_memory_of_a_parameter_that_sits_out_may_be_used_again():
    """Where a frozen parameter's state has been freed, the next state may lie."""
    params, optimizer = make(shapes=[(64, 64), (64, 64), (64, 64)])
    frozen, growing = params[0], params[2]
    for step in range(2, 6):
        set_grads(params, step)
        frozen.grad = None
        held = optimizer.state.pop(frozen, None)
        state = optimizer.state[growing]
        if held is not None:  # the same memory, as an allocator would give it
            for key, value in held.items():
                if isinstance(value, torch.Tensor):
                    state[key] = value.copy_(state[key])
        if step == 4:
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(64, 64))]})
        optimizer.step()
    assert optimizer.state[growing]["step"] == 6


def test_groups_that_change():
    a, b = make(), make()
    extra = [torch.nn.Parameter(torch.arange(100.0)) for _ in range(2)]
    for (params, optimizer), more in zip((a, b), extra, strict=True):
        params.append(more)
        optimizer.add_param_group({"params": [more], "lr": 0.5})
        run(optimizer, params, 2, 4)
    group, other = a[1].param_groups
    moved = group["params"].pop(0)
    other["params"].append(moved)
    twin = b[1].param_groups[0]["params"].pop(0)
    b[1].param_groups[1]["params"].append(twin)
    for params, optimizer in (a, b):
        run(optimizer, params, 4, 6)
    assert_same_bits(a, b)
    assert a[1].state[moved]["step"] == 6
    del other["params"][-1]
    with pytest.raises(ValueError, match="in no group"):
        a[1].step_param(moved)
    before = bits(moved)
    run(a[1], a[0], 6, 7)
    assert bits(moved) == before


def test_a_parameter_sits_out_a_step():
    a, b = make(), make()
    for step in range(2, 6):
        for params, optimizer in (a, b):
            set_grads(params, step)
            if step % 2:
                params[0].grad = None
            take_step(optimizer, params, one_by_one=optimizer is b[1])
    assert_same_bits(a, b)
    assert [a[1].state[p]["step"] for p in a[0][:2]] == [4, 6]
    assert len(a[1]._store.records.plans) == 1
