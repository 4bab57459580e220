"""Formats that change in mid-training: dtypes of parameters, options of groups; weights edited from outside."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import flashoptim_native
from flashoptim_native import reconstruct_fp32_param
from helpers import CLASSES, assert_same_bits, bits, make_params, run, set_grads
from store_helpers import everything, make, take_step

SHAPES = [(64, 64), (40,), ()]


def fp32(param, optimizer):
    correction = optimizer.state[param].get("correction")
    return param.detach().float() if correction is None else reconstruct_fp32_param(param, correction)


def idle_step(params, optimizer, one_by_one):
    """A step that leaves every weight where it is."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for param in params:
        param.grad = torch.zeros_like(param)
    take_step(optimizer, params, one_by_one)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("way", ["data", "swap", "both ways"])
def test_master_weights_outlive_a_cast_to_32_bits(way, codec, one_by_one):
    params, optimizer = make(shapes=SHAPES, state_codec=codec)
    before = [fp32(p, optimizer) for p in params]
    for param in params:
        if way == "swap":
            torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach().float()))
        else:
            param.data = param.data.float()
    idle_step(params, optimizer, one_by_one)
    for param, weights in zip(params, before, strict=True):
        assert bits(param) == bits(weights) and "correction" not in optimizer.state[param]
    if way != "both ways":
        return
    for param in params:
        param.data = param.data.bfloat16()
    with pytest.warns(UserWarning, match="was torch.float32 at its last step and is torch.bfloat16 now"):
        idle_step(params, optimizer, one_by_one)
    for param, weights in zip(params, before, strict=True):
        assert bits(param) == bits(weights.bfloat16()) and not optimizer.state[param]["correction"].any()


def as_bf16_values(params):
    """Of a size that fp16 holds exactly."""
    for param in params:
        param.data = param.data.clamp(-4, 4)
        small = param.data.abs() < 2**-6
        param.data[small] = 0.5


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("bits_kept", [24, 32])
def test_master_weights_outlive_a_cast_from_bf16_to_fp16(bits_kept, one_by_one):
    """In fp16 the same weights are other digits: parameter and correction change together."""
    params, optimizer = make(shapes=SHAPES, master_weight_bits=bits_kept)
    as_bf16_values(params)
    before = [fp32(p, optimizer).double() for p in params]
    for param in params:
        param.data = param.data.half()
    moved = [bits(p) for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idle_step(params, optimizer, one_by_one)
    assert moved != [bits(p) for p in params]
    for param, weights in zip(params, before, strict=True):
        steps = 2 * 127 if bits_kept == 24 else 2 * 32767
        spacing = 2.0 ** (np.floor(np.log2(weights.abs().clamp(min=2**-14).numpy())) - 10)
        assert (np.abs(fp32(param, optimizer).double().numpy() - weights.numpy()) <= spacing / steps * 1.01).all()


@pytest.mark.filterwarnings("ignore:the correction of parameter [12]")
@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
def test_a_cast_that_loses_digits_is_warned_of(one_by_one):
    params, optimizer = make(shapes=SHAPES, dtype=torch.float16)
    for param in params:
        param.data = param.data.bfloat16()
    now = [bits(p) for p in params]
    with pytest.warns(UserWarning, match=r"the correction of parameter 0 of group 0 belongs to torch.float16 weights"):
        idle_step(params, optimizer, one_by_one)
    assert [bits(p) for p in params] == now
    assert not any(optimizer.state[p]["correction"].any() for p in params)


@pytest.mark.parametrize("now", [torch.float32, torch.float16])
def test_fp32_weights_between_a_cast_and_the_next_step(now):
    """What is exported is what the next step goes on from."""
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-3, min_quantized_numel=64)
    params = list(model.parameters())
    run(optimizer, params, 0, 3)
    as_bf16_values(params)
    before = optimizer.get_fp32_model_state_dict(model)
    model.to(now)
    between = optimizer.get_fp32_model_state_dict(model)
    assert all(torch.equal(before[key], between[key]) for key in before)
    idle_step(params, optimizer, one_by_one=False)
    after = optimizer.get_fp32_model_state_dict(model)
    tolerance = (
        0.0 if now == torch.float32 else 2**-9 / 254
    )  # weights below 4: the spacing of fp16, over the correction's
    assert all((before[key] - after[key]).abs().max() <= tolerance for key in before)


@pytest.mark.parametrize("now", [torch.float32, torch.float16])
def test_fp32_weights_taken_before_a_cast_and_given_back_behind_it(now):
    """As the warning says; and then nothing is lost, and nothing is warned of."""
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-3, min_quantized_numel=64)
    params = list(model.parameters())
    run(optimizer, params, 0, 3)
    weights = optimizer.get_fp32_model_state_dict(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.to(now)
        optimizer.set_fp32_model_state_dict(model, weights)
        idle_step(params, optimizer, one_by_one=False)
        after = optimizer.get_fp32_model_state_dict(model)
    for key, weight in weights.items():
        assert (weight - after[key]).abs().max() <= (0.0 if now == torch.float32 else 2**-13)


def test_a_new_state_of_a_cast_parameter_is_not_warned_of():
    params, optimizer = make(shapes=SHAPES, dtype=torch.float16)
    optimizer.state.clear()
    for param in params:
        param.data = torch.randn(param.shape).bfloat16()
    now = [bits(p) for p in params]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idle_step(params, optimizer, one_by_one=False)
    assert [bits(p) for p in params] == now


def test_weights_swapped_in_and_out_come_back_to_the_same_bits():
    """As averages of weights do it, by copies and by other memory; a step between would have seen the others."""
    a, b = make(shapes=SHAPES), make(shapes=SHAPES)
    params, optimizer = a
    for step in range(2, 6):
        kept = [p.detach().clone() for p in params]
        corrections = [optimizer.state[p]["correction"].clone() for p in params]
        for p in params:
            if step % 2:
                p.data.copy_(torch.randn(p.shape))
            else:
                p.data = torch.randn(p.shape).bfloat16()
        for p, values in zip(params, kept, strict=True):
            p.data.copy_(values)
        assert all(torch.equal(optimizer.state[p]["correction"], c) for p, c in zip(params, corrections, strict=True))
        for pair in (a, b):
            run(pair[1], pair[0], step, step + 1)
    assert_same_bits(a, b)


def test_reset_corrections():
    params, optimizer = make(shapes=SHAPES)
    new = [torch.randn(p.shape).bfloat16() for p in params]
    for p, values in zip(params, new, strict=True):
        p.data.copy_(values)
    kept = optimizer.state[params[1]]["correction"].clone()
    optimizer.reset_corrections(p for p in params[:1])
    assert bits(fp32(params[0], optimizer)) == bits(new[0].float())
    assert torch.equal(optimizer.state[params[1]]["correction"], kept) and kept.any()
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) and dtype torch.float32 is in no group"):
        optimizer.reset_corrections([params[1], torch.nn.Parameter(torch.ones(3))])
    assert everything(params, optimizer) == before
    optimizer.reset_corrections()
    assert all(bits(fp32(p, optimizer)) == bits(v.float()) for p, v in zip(params, new, strict=True))


def test_corrections_that_are_reset_belong_to_the_weights_of_now():
    params, optimizer = make(shapes=SHAPES, dtype=torch.bfloat16)
    new = [torch.randn(p.shape).half() for p in params]
    for p, values in zip(params, new, strict=True):
        p.data = values.clone()
    optimizer.reset_corrections()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idle_step(params, optimizer, one_by_one=False)
    assert all(bits(fp32(p, optimizer)) == bits(v.float()) for p, v in zip(params, new, strict=True))


CHANGES = {
    "quantize": [False, True],
    "state_codec": ["paper", "default"],
    "master_weight_bits": [32, 24],
    "min_quantized_numel": [10**6, 64],
}


@pytest.mark.parametrize("one_by_one", [False, True], ids=["step", "step_param"])
@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("option", list(CHANGES))
def test_a_changed_option_is_as_a_checkpoint_loaded_into_an_optimizer_with_it(option, kind, one_by_one):
    params, optimizer = make(kind)
    for value in CHANGES[option]:
        twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
        options = {key: optimizer.param_groups[0][key] for key in CHANGES} | {option: value}
        twin = CLASSES[kind](twins, momentum=0.9, **options) if "sgd" in kind else CLASSES[kind](twins, **options)
        twin.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0][option] = value
        for step in (7, 8):
            for pair in ((params, optimizer), (twins, twin)):
                set_grads(pair[0], step)
                take_step(pair[1], pair[0], one_by_one)
        assert_same_bits((params, optimizer), (twins, twin))


@pytest.mark.filterwarnings("ignore:the state of parameter [12]")
def test_correction_that_is_given_up_is_warned_of():
    params, optimizer = make(shapes=SHAPES)
    weights = [bits(p) for p in params]
    optimizer.param_groups[0]["master_weight_bits"] = None
    with pytest.warns(UserWarning, match="weights lose the bits below their own precision"):
        idle_step(params, optimizer, one_by_one=False)
    assert [bits(p) for p in params] == weights


@pytest.mark.parametrize("kind", ["sgd", "sgdw"])
def test_momentum_that_comes_and_goes(kind):
    """A buffer rests while momentum is 0, as PyTorch's does; a parameter that had none begins with its gradient."""
    params = make_params(shapes=[(64, 64)], dtype=torch.float32)
    plain = make_params(shapes=[(64, 64)], dtype=torch.float32)
    optimizer = CLASSES[kind](params, lr=0.1, quantize=False)
    torchs = torch.optim.SGD(plain, lr=0.1)
    for step, momentum in enumerate([0.0, 0.0, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9]):
        optimizer.param_groups[0]["momentum"] = torchs.param_groups[0]["momentum"] = momentum
        for tensors, one in ((params, optimizer), (plain, torchs)):
            set_grads(tensors, step)
            one.step()
        torch.testing.assert_close(params[0], plain[0], rtol=1e-6, atol=1e-6)
    assert ("momentum_buffer" in optimizer.state[params[0]]) and optimizer.state[params[0]]["step"] == 6


@pytest.mark.parametrize("kind", list(CLASSES))
def test_odd_parameters_are_converted_too(kind):
    """Options change, and checkpoints are loaded, where a parameter has gaps."""
    values = torch.randn(32, 96)
    room = torch.zeros(32, 192)
    params, twins = [torch.nn.Parameter(room[:, ::2])], [torch.nn.Parameter(values.clone())]
    params[0].data.copy_(values)
    options = {"momentum": 0.9} if "sgd" in kind else {}
    pairs = [(p, CLASSES[kind](p, lr=1e-2, quantize=False, **options)) for p in (params, twins)]
    for ps, optimizer in pairs:
        run(optimizer, ps, 0, 2)
        optimizer.param_groups[0].update(quantize=True, min_quantized_numel=64)
        run(optimizer, ps, 2, 4)
        optimizer.load_state_dict(optimizer.state_dict())
        run(optimizer, ps, 4, 6)
    assert params[0].stride() == (192, 2)
    assert_same_bits(*pairs)


def test_hyperparameters_that_change_in_place_are_read():
    """Tensors and lists stay the same objects."""
    params, optimizer = make("adamw", shapes=SHAPES)
    twins, twin = make("adamw", shapes=SHAPES)
    group, other = optimizer.param_groups[0], twin.param_groups[0]
    group["weight_decay"], group["betas"] = torch.tensor(0.1, dtype=torch.float64), [0.8, 0.95]
    for step, (decay, beta) in enumerate([(0.1, 0.8), (0.5, 0.8), (0.5, 0.3)]):
        group["weight_decay"].fill_(decay)
        group["betas"][0] = beta
        other["weight_decay"], other["betas"] = decay, (beta, 0.95)
        run(optimizer, params, step, step + 1)
        run(twin, twins, step, step + 1)
        assert_same_bits((params, optimizer), (twins, twin))
    group["betas"][1] = 1.5
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match=r"betas\[1\] = 1.5"):
        optimizer.step()
    assert everything(params, optimizer) == before
