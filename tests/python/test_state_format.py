"""State format 2: what a state dict holds survives copies, is not taken for what it is not, and format 1 still
loads.
"""

from __future__ import annotations

import copy

import pytest
import torch

import flashoptim_native
from helpers import CLASSES, HYPERS, assert_same_bits, bits, make_params, run

SHAPES = [(96, 64), (33,), (515, 20), (5000,), (64, 3, 7, 7), (4, 48, 64)]


def contiguous(value):
    if isinstance(value, dict):
        return {key: contiguous(item) for key, item in value.items()}
    if isinstance(value, list):
        return [contiguous(item) for item in value]
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value


def format_1(optimizer):
    """A dict as format 1 wrote it, of states whose rows are the same in both."""
    saved = torch.optim.Optimizer.state_dict(optimizer)
    state = {}
    for (number, held), p in zip(saved["state"].items(), optimizer.param_groups[0]["params"]):
        rows = p.shape[0] if p.dim() > 1 and p[0].numel() >= 32 else 1
        state[number] = {
            key.replace("_codes", ""): value.reshape(rows, -1) if key.endswith("_scale") else value
            for key, value in held.items()
        }
    (group,) = saved["param_groups"]
    options = group.pop(next(key for key in group if key.startswith("flashoptim_native.")))
    return {"state": state, "param_groups": [{**group, **options}]}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("options", [{}, {"state_codec": "paper"}, {"master_weight_bits": 32}])
def test_contiguous_copies_of_permuted_parameters_load_to_the_same_bits(kind, options):
    start = torch.randn(64, 48, 3, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    p = torch.nn.Parameter(start)
    optimizer = CLASSES[kind]([p], **HYPERS[kind], **options)
    run(optimizer, [p], 0, 3)
    saved = contiguous(optimizer.state_dict())
    q = torch.nn.Parameter(p.detach().clone())
    other = CLASSES[kind]([q], **HYPERS[kind], **options)
    other.load_state_dict(saved)
    assert_same_bits(([p], optimizer), ([q], other))
    assert optimizer.state[p].keys() == saved["state"][0].keys()


@pytest.mark.parametrize("ours", [flashoptim_native.FlashAdamW, flashoptim_native.FlashAdam])
def test_plain_pytorch_raises_for_codes(ours):
    params = make_params(shapes=[(96, 64)])
    optimizer = ours(params)
    run(optimizer, params, 0, 1)
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match="exp_avg"):
        run(theirs, params, 1, 2)


def test_what_is_said_of_a_file_is_checked():
    params = make_params(shapes=SHAPES)
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"adamw.2; allowed is flashoptim_native.adam.2"):
        flashoptim_native.FlashAdam(params).load_state_dict(saved)
    saved["state"][0]["exp_avg_codes"][3, 5] ^= 1
    before = bits(optimizer.state[params[0]]["exp_avg_codes"])
    with pytest.raises(ValueError, match="parameter 0 is not what its checksum says"):
        optimizer.load_state_dict(saved)
    assert bits(optimizer.state[params[0]]["exp_avg_codes"]) == before
    optimizer.load_state_dict(saved, verify=False)
    assert bits(optimizer.state[params[0]]["exp_avg_codes"]) != before


def test_items_are_at_most_those_of_torch():
    params = make_params(shapes=[(96, 64)])
    counts = []
    for optimizer in (flashoptim_native.FlashAdamW(params), torch.optim.AdamW(params)):
        run(optimizer, params, 0, 1)
        saved = optimizer.state_dict()
        counts.append(len(saved["state"][0]) + len(saved["param_groups"][0]) - 1)
    assert counts[0] <= counts[1]


YOUNGER = ("ademamix", "adopt")  # than format 1


@pytest.mark.parametrize("kind", YOUNGER)
def test_a_dict_without_a_description_is_no_younger_optimizers(kind):
    """AdamW's has ADOPT's names and other meanings."""
    params = make_params()
    optimizer = CLASSES[kind](params, **HYPERS[kind])
    run(optimizer, params, 0, 2)
    saved = format_1(optimizer)
    with pytest.raises(ValueError, match=rf"does not say whose it is.*flashoptim_native\.{kind}\.2"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in YOUNGER])
def test_format_1_loads(kind):
    shapes = [shape for shape in SHAPES if len(shape) < 3]
    params, others = make_params(shapes=shapes), make_params(shapes=shapes)
    optimizer, other = CLASSES[kind](params, **HYPERS[kind]), CLASSES[kind](others)
    run(optimizer, params, 0, 3)
    run(other, others, 0, 1)
    with torch.no_grad():
        for p, q in zip(params, others):
            q.copy_(p)
    other.load_state_dict(format_1(optimizer))
    assert_same_bits((params, optimizer), (others, other))


def test_rows_of_format_1_are_converted():
    (p,) = params = make_params(shapes=[(64, 3, 7, 7)])
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 3)
    values = optimizer.decoded_state(p)
    old = torch.nn.Parameter(p.detach().reshape(64, 147))  # the rows that format 1 has
    before = flashoptim_native.FlashAdamW([old])
    before.load_state_dict({"state": {0: {"step": 3, **{k: v.reshape(64, 147) for k, v in values.items()}}},
                            "param_groups": [{**before.param_groups[0], "params": [0]}]})  # fmt: skip
    saved = format_1(before)
    for slot in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][slot] = saved["state"][0][slot].reshape(p.shape)
    saved["state"][0].pop("correction")
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["exp_avg_scale"].shape == (64, 3, 2)
    for slot, value in optimizer.decoded_state(p).items():
        assert (value - values[slot]).abs().max() < 0.05 * values[slot].abs().max()


def test_first_step_of_zeros_at_lr_0_makes_states_and_counts_nothing():
    params, others = make_params(), make_params()
    optimizer, other = flashoptim_native.FlashAdamW(params, lr=0.0), flashoptim_native.FlashAdamW(others)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert {held["step"] for held in optimizer.state.values()} == {0}
    optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"]
    run(optimizer, params, 0, 3)
    run(other, others, 0, 3)
    assert_same_bits((params, optimizer), (others, other))


def test_states_of_the_reference_implementation_are_refused_by_name():
    params = make_params(shapes=[(96, 64)])
    optimizer = flashoptim_native.FlashSGD(params, momentum=0.9)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"momentum_buffer::quantized": torch.zeros(96, 64, dtype=torch.int8)}}
    with pytest.raises(ValueError, match="momentum_buffer::quantized.*reference implementation"):
        optimizer.load_state_dict(saved)
