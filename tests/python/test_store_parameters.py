"""Odd parameters and gradients: each costs one copy, the others nothing, and all results are those of plain ones."""

from __future__ import annotations

import pytest
import torch

import flashoptim_native
from helpers import CLASSES, assert_same_bits, bits, set_grads
from store_helpers import everything, make, take_step

SHAPES = [(64, 64)] * 50 + [(8, 6, 4, 16)]


class Subclass(torch.Tensor):
    """A tensor whose memory is its own."""


class SubParameter(torch.nn.Parameter):
    """The same for parameters."""


def strided(tensor):
    """The same values with gaps between them."""
    room = torch.zeros(tensor.numel() * 2, dtype=tensor.dtype)
    return room[::2].view(tensor.shape).copy_(tensor)


def as_data(change):
    def do(param):
        param.data = change(param.data)

    return do


def as_gradient(change):
    def do(param):
        param.grad = change(param.grad)

    return do


def single_precision(param):
    param.grad_dtype = None
    param.grad = param.grad.float()


ODD = {
    "a parameter with gaps": as_data(strided),
    "a parameter in another order": as_data(lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)),
    "a parameter in channels_last": as_data(lambda t: t.to(memory_format=torch.channels_last)),
    "a parameter of a subclass": as_data(lambda t: t.as_subclass(Subclass)),
    "a gradient with gaps": as_gradient(strided),
    "a gradient in another order": as_gradient(lambda t: t.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)),
    "a gradient of a subclass": as_gradient(lambda t: t.as_subclass(Subclass)),
    "a gradient in single precision": single_precision,
    "a gradient with a history": as_gradient(lambda t: t.float().requires_grad_().bfloat16()),
    "a gradient with the other sign in memory": as_gradient(lambda t: imaginary(t)),
}


def imaginary(tensor):
    found = torch.complex(torch.zeros(tensor.shape), -tensor.float()).conj().imag
    assert found.is_neg()
    return found


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("what", list(ODD))
def test_one_odd_parameter_beside_fifty(what, one_by_one, monkeypatch):
    """It becomes odd in mid-training: states stay as they lie, and so do the bits."""
    (params, optimizer), plain = make(shapes=SHAPES), make(shapes=SHAPES)
    described = []
    describe = flashoptim_native._ops.store.describe
    monkeypatch.setattr(flashoptim_native._ops.store, "describe", lambda *a: (described.append(a[1]), describe(*a))[1])
    generation = optimizer._store.records.generation
    for step in range(2, 6):
        for tensors in (params, plain[0]):
            set_grads(tensors, step)
            if what == "a gradient with the other sign in memory":
                tensors[-1].grad_dtype = None
        if step == 2 or "gradient" in what:
            ODD[what](params[-1])
        if "sign" in what:
            plain[0][-1].grad = plain[0][-1].grad.float()
        take_step(optimizer, params, one_by_one)
        described_by_optimizer = list(described)
        take_step(plain[1], plain[0], one_by_one)
        described[:] = described_by_optimizer
        assert_same_bits((params, optimizer), plain)
    assert set(described) <= {len(params) - 1}
    if "precision" not in what and "sign" not in what:  # another dtype of gradient is another plan
        assert optimizer._store.records.generation == generation
    assert len(optimizer._store.records.plans) == 1


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("what", ["gaps", "order"])
def test_odd_from_the_first_step_on(kind, what):
    """States lie as their parameter does, as far as it fills its memory."""
    torch.manual_seed(3)
    values = torch.randn(16, 96)
    change = strided if what == "gaps" else (lambda t: t.t().contiguous().t())
    odd = [torch.nn.Parameter(change(values.clone()))]
    plain = [torch.nn.Parameter(values.clone())]
    a, b = (CLASSES[kind](p, lr=1e-2, quantize=False) for p in (odd, plain))
    for step in range(3):
        set_grads(odd, step)
        set_grads(plain, step)
        a.step()
        b.step()
    assert odd[0].stride() == change(values).stride()
    assert ("storage_order" in a.state[odd[0]]) == (
        what == "order" and "sgd" not in kind
    )  # without momentum, no arrays
    a.state[odd[0]].pop("storage_order", None)
    assert_same_bits((odd, a), (plain, b))


def test_an_expanded_gradient_is_one_copy():
    a, b = make(), make()
    for params, optimizer in (a, b):
        set_grads(params, 2)
        row = params[0].grad[:, :1].clone()
        params[0].grad = row.expand(64, 64) if optimizer is a[1] else row.repeat(1, 64)
        optimizer.step()
    assert_same_bits(a, b)


def test_parameters_and_gradients_of_one_element_with_the_other_sign():
    """torch.complex() of parameters of one element gives such gradients, and no stride tells."""
    results = []
    for resolved in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))]
        optimizer = flashoptim_native.FlashSGD(params, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            (torch.complex(*params).conj() * (1 + 2j)).real.sum().backward()
            assert params[1].grad.is_neg()
            if resolved:
                params[1].grad = params[1].grad.resolve_neg()
            optimizer.step()
        results.append(bits(params[1]))
        assert params[1].item() == 1.0 - 0.5 * 2.0 * 2
    assert results[0] == results[1]


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_parameters_of_subclasses(one_by_one):
    values = torch.randn(64, 64)
    odd = [SubParameter(values.clone()), torch.nn.Parameter(values.clone().as_subclass(Subclass))]
    plain = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    a, b = (flashoptim_native.FlashAdamW(p, lr=1e-2, min_quantized_numel=64) for p in (odd, plain))
    for step in range(3):
        for params, optimizer in ((odd, a), (plain, b)):
            set_grads(params, step)
            take_step(optimizer, params, one_by_one)
    assert_same_bits((odd, a), (plain, b))


def test_subclasses_whose_memory_is_elsewhere_are_named():
    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            return NotImplemented

    with pytest.raises(TypeError, match="parameter 0 of group 0 is a Elsewhere, which has a __torch_dispatch__"):
        flashoptim_native.FlashAdamW([torch.randn(4, 4).as_subclass(Elsewhere)])


REFUSED = {
    "layout torch.sparse_coo": lambda p: setattr(p, "grad", p.grad.to_sparse()),
    "shape": lambda p: setattr(p.grad, "data", p.grad.data[:3].clone()),
    "dtype torch.float64": lambda p: setattr(p.grad, "data", p.grad.data.double()),
}


@pytest.mark.parametrize("state", ["new", "old"])
@pytest.mark.parametrize("what", list(REFUSED))
def test_a_step_that_is_refused_for_the_last_parameter_has_changed_nothing(what, state):
    """Conversions, counts, dtypes, staged copies and new states of those before it are taken back."""
    params, optimizer = make(shapes=[(64, 64)] * 5)
    plain = make(shapes=[(64, 64)] * 5)
    for pair in ((params, optimizer), plain):
        if state == "new":
            pair[1].state.clear()
        else:
            pair[1].param_groups[0]["quantize"] = False
            pair[0][1].data = pair[0][1].data.half()  # its correction is of another dtype now
            pair[0][2].data = pair[0][2].data.t().contiguous().t()
            pair[1].state[pair[0][3]]["step"] = torch.tensor(2.0)
            pair[1].state[pair[0][0]] = None if state == "new" else pair[1].state[pair[0][0]]
        set_grads(pair[0], 2)
    good = params[-1].grad.clone()
    REFUSED[what](params[-1])
    before, known = everything(params, optimizer), dict(optimizer.state)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"the gradient of parameter 4 of group 0 has {what}"):
            optimizer.step()
        assert everything(params, optimizer) == before
        assert list(optimizer.state.items()) == list(known.items())
    params[-1].grad = good
    optimizer.step()
    plain[1].step()
    assert_same_bits((params, optimizer), plain)


def test_steps_counted_on_the_device_are_taken_back_too():
    params, optimizer = make(shapes=[(64, 64)] * 3)
    set_grads(params, 2)
    optimizer.found_inf = torch.zeros(1)
    optimizer.grad_scale = torch.ones(1)
    params[-1].grad = params[-1].grad.to_sparse()
    before = everything(params, optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert everything(params, optimizer) == before


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_parameters_on_the_meta_device_beside_those_of_the_cpu(one_by_one):
    cpu = torch.nn.Parameter(torch.randn(64, 64))
    meta = torch.nn.Parameter(torch.empty(64, 64, device="meta"))
    optimizer = flashoptim_native.FlashAdamW([meta, cpu], min_quantized_numel=64)
    for _ in range(3):
        cpu.grad, meta.grad = torch.ones_like(cpu), torch.ones_like(meta)
        take_step(optimizer, [cpu, meta], one_by_one)
    assert optimizer.state[meta]["step"] == optimizer.state[cpu]["step"] == 3
    assert optimizer.state[meta]["exp_avg_codes"].device.type == "meta"
    # A state that has lost its values cannot come back.
    optimizer.state[cpu]["exp_avg_codes"] = optimizer.state[cpu]["exp_avg_codes"].to("meta")
    before = everything([cpu, meta], optimizer)
    with pytest.raises(ValueError, match="the state of parameter 1 of group 0 cannot be converted"):
        take_step(optimizer, [cpu, meta], one_by_one)
    assert one_by_one or everything([cpu, meta], optimizer) == before
