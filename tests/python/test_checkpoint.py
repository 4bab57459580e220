"""State dicts, files, copies: a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import flashoptim_native
from helpers import (
    CLASSES,
    HYPERS,
    assert_same_bits,
    assert_untouched,
    bits,
    make_params,
    relative_error,
    run,
    set_grads,
    snapshot,
    to_numpy,
)

KINDS = list(CLASSES)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def through_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def copies_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("transport", [through_file, copy.deepcopy, lambda value: value])
@pytest.mark.parametrize("options", [{}, {"state_codec": "paper"}, {"master_weight_bits": 32}, {"quantize": False}])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted(kind, options, transport):
    params = make_params()
    optimizer = CLASSES[kind](params, seed=12345, **HYPERS[kind], **options)
    run(optimizer, params, 0, 5)
    saved = transport(optimizer.state_dict())
    resumed_params = copies_of(params)
    resumed = CLASSES[kind](resumed_params, **options)  # hyperparameters, seed and step come from the state dict
    resumed.load_state_dict(saved)
    run(optimizer, params, 5, 10)
    run(resumed, resumed_params, 5, 10)
    assert_same_bits((params, optimizer), (resumed_params, resumed))
    assert resumed.param_groups[0]["seed"] == 12345 and resumed.state[resumed_params[0]]["step"] == 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_resume_with_parameters_at_different_steps(dtype):
    params = make_params(dtype)
    optimizer = flashoptim_native.FlashAdamW(params)

    def step(optimizer, params, number):
        set_grads(params, number)
        for i, p in enumerate(params):
            if i % 3 == number % 3:
                p.grad = None
        optimizer.step()

    for number in range(5):
        step(optimizer, params, number)
    assert len({optimizer.state[p]["step"] for p in params}) > 1
    resumed_params = copies_of(params)
    resumed = flashoptim_native.FlashAdamW(resumed_params)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    for number in range(5, 9):
        step(optimizer, params, number)
        step(resumed, resumed_params, number)
    assert_same_bits((params, optimizer), (resumed_params, resumed))


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_before_the_first_step(kind):
    params, fresh = make_params(), make_params()
    optimizer, other = CLASSES[kind](params, **HYPERS[kind]), CLASSES[kind](fresh)
    saved = optimizer.state_dict()
    assert saved["state"] == {}
    other.load_state_dict(through_file(saved))
    run(optimizer, params, 0, 3)
    run(other, fresh, 0, 3)
    assert_same_bits((params, optimizer), (fresh, other))


def test_the_seed_matters_and_is_saved():
    runs = []
    for seed in (0, 1):
        params = make_params()
        optimizer = flashoptim_native.FlashAdamW(params, seed=seed)
        run(optimizer, params, 0, 3)
        runs.append([bits(p) for p in params] + [bits(optimizer.state[p]["correction"]) for p in params])
    assert runs[0] != runs[1]


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle(kind, make_copy):
    params = make_params()
    optimizer = CLASSES[kind](params, compress_state_dict=False, check_numerics=False, **HYPERS[kind])
    run(optimizer, params, 0, 3)
    twin = make_copy(optimizer)
    twin_params = [p for group in twin.param_groups for p in group["params"]]
    assert not twin.state_dict()["state"][0].get("exp_avg_scale")
    run(optimizer, params, 3, 6)
    run(twin, twin_params, 3, 6)
    assert_same_bits((params, optimizer), (twin_params, twin))


def test_a_loaded_optimizer_shares_nothing_with_its_source():
    params, other_params = make_params(), make_params()
    optimizer, other = flashoptim_native.FlashAdamW(params), flashoptim_native.FlashAdamW(other_params)
    run(optimizer, params, 0, 2)
    other.load_state_dict(optimizer.state_dict())
    before = snapshot(optimizer)
    run(other, other_params, 2, 5)
    assert_untouched(optimizer, before)


def test_states_keep_their_dtypes_on_load():
    params, other_params = make_params(), make_params()
    optimizer, other = flashoptim_native.FlashAdamW(params), flashoptim_native.FlashAdamW(other_params)
    run(optimizer, params, 0, 1)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[other_params[0]]
    assert {k: v.dtype for k, v in state.items() if k != "step"} == {
        "exp_avg_codes": torch.uint8,
        "exp_avg_scale": torch.int16,
        "exp_avg_sq_codes": torch.uint8,
        "exp_avg_sq_scale": torch.int16,
        "correction": torch.int8,
    }
    assert other.state[other_params[1]]["exp_avg"].dtype == torch.float32  # a small tensor's


@pytest.mark.parametrize("codec", ["default", "paper"])
@pytest.mark.parametrize("kind", KINDS)
def test_uncompressed_state_dict_is_fp32_and_loads(kind, codec):
    params = make_params()
    optimizer = CLASSES[kind](params, compress_state_dict=False, state_codec=codec, **HYPERS[kind])
    run(optimizer, params, 0, 4)
    saved = through_file(optimizer.state_dict())
    for state in saved["state"].values():
        assert not any(key.endswith("_scale") for key in state)
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            assert key not in state or state[key].dtype == torch.float32
        assert state["correction"].dtype == torch.int8
    slot = next(iter(set(saved["state"][0]) - {"step", "correction"}))
    assert optimizer.state[params[0]][slot + "_codes"].element_size() == 1
    resumed_params = copies_of(params)
    resumed = CLASSES[kind](resumed_params, state_codec=codec, **HYPERS[kind])
    resumed.load_state_dict(saved)
    for p, q in zip(params, resumed_params):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for name, value in optimizer.decoded_state(p).items():
            if p.numel() and value.abs().max() > 0:
                assert relative_error(to_numpy(resumed.decoded_state(q)[name]), to_numpy(value)) < 0.02
    run(resumed, resumed_params, 4, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (flashoptim_native.FlashAdamW, torch.optim.AdamW),
        (flashoptim_native.FlashAdam, torch.optim.Adam),
        (
            lambda p, **k: flashoptim_native.FlashSGD(p, momentum=0.9, **k),
            lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
        ),
        (flashoptim_native.FlashSGD, lambda p: torch.optim.SGD(p, lr=1e-3)),
    ],
)
def test_plain_pytorch_checkpoints_both_ways(ours, theirs, dtype):
    params = make_params(dtype)
    theirs_first = theirs(params)
    run(theirs_first, params, 0, 3)
    mine = ours(params, compress_state_dict=False)
    mine.load_state_dict(through_file(theirs_first.state_dict()))
    assert "fused" not in mine.param_groups[0] and mine.param_groups[0]["seed"] == 0
    for p in params:
        for name, value in mine.decoded_state(p).items():
            expected = theirs_first.state[p][name].float()
            if p.numel() and expected.abs().max() > 0:
                assert relative_error(to_numpy(value), to_numpy(expected)) < 0.05
        if "step" in theirs_first.state[p]:
            assert mine.state[p]["step"] == 3
    run(mine, params, 3, 5)
    theirs_again = theirs(params)
    theirs_again.load_state_dict(through_file(mine.state_dict()))
    run(theirs_again, params, 5, 6)
    if dtype != torch.float16:  # where PyTorch's own Adam, its state in fp16, makes infinities
        assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.bfloat16])
def test_a_lion_that_counts_no_steps_is_taken(value_dtype):
    """As lion-pytorch and timm keep it: exp_avg alone, which is all that the rule needs."""
    params = make_params(torch.bfloat16)
    momenta = [torch.randn_like(p, dtype=value_dtype) for p in params]
    opt = flashoptim_native.FlashLion(params, lr=1e-3, quantize=False)
    groups = [{"params": list(range(len(params))), "lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}]
    opt.load_state_dict({"state": {i: {"exp_avg": m} for i, m in enumerate(momenta)}, "param_groups": groups})
    for p, momentum in zip(params, momenta):
        assert opt.state[p]["step"] == 1
        assert torch.equal(opt.decoded_state(p)["exp_avg"], momentum.float())
    run(opt, params, 0, 2)
    coded = opt.state_dict()["state"][0] | {"exp_avg_codes": torch.zeros(2), "exp_avg_scale": torch.zeros(2)}
    coded = {key: value for key, value in coded.items() if key.startswith("exp_avg_")}
    with pytest.raises(ValueError, match="lacks step"):  # codes are ours, which counts
        opt.load_state_dict({"state": {0: coded}, "param_groups": groups})


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"state_codec": "paper"}, {"state_codec": "default"}),
        ({"state_codec": "default"}, {"state_codec": "paper"}),
        ({"quantize": False}, {"quantize": True}),
        ({"quantize": True}, {"quantize": False}),
        ({"min_quantized_numel": 4096}, {"min_quantized_numel": 0}),
    ],
)
def test_other_formats_are_converted_to_the_optimizers_own(before, after):
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params, **before)
    run(optimizer, params, 0, 3)
    other = flashoptim_native.FlashAdamW(params, **after)
    other.load_state_dict(optimizer.state_dict())
    expected = flashoptim_native.FlashAdamW(make_params(), **after)
    run(expected, expected.param_groups[0]["params"], 0, 1)
    for p, q in zip(params, expected.param_groups[0]["params"]):
        ours, theirs = other.state[p], expected.state[q]
        assert {k: getattr(v, "dtype", None) for k, v in ours.items()} == {
            k: getattr(v, "dtype", None) for k, v in theirs.items()
        }
        for name, value in optimizer.decoded_state(p).items():
            if p.numel():
                assert relative_error(to_numpy(other.decoded_state(p)[name]), to_numpy(value)) < 0.05
    run(other, params, 3, 4)


def test_corrections_of_another_width_are_converted():
    params = make_params()
    narrow = flashoptim_native.FlashAdamW(params, master_weight_bits=24)
    run(narrow, params, 0, 3)
    wide = flashoptim_native.FlashAdamW(params, master_weight_bits=32)
    wide.load_state_dict(narrow.state_dict())
    for p in params:
        a = flashoptim_native.reconstruct_fp32_param(p, narrow.state[p]["correction"])
        b = flashoptim_native.reconstruct_fp32_param(p, wide.state[p]["correction"])
        torch.testing.assert_close(a, b, rtol=2.0**-22, atol=0)
    back = flashoptim_native.FlashAdamW(params, master_weight_bits=24)
    back.load_state_dict(wide.state_dict())
    assert_same_bits((params, narrow), (params, back))
    none = flashoptim_native.FlashAdamW(params, master_weight_bits=None, stochastic_rounding=True)
    with pytest.warns(UserWarning, match="correction"):
        none.load_state_dict(wide.state_dict())
    assert "correction" not in none.state[params[0]]


def test_another_storage_order_is_converted():
    p = torch.nn.Parameter(torch.randn(64, 96).to(torch.bfloat16))
    q = torch.nn.Parameter(p.detach().t().contiguous().t())
    a, b = flashoptim_native.FlashAdamW([p]), flashoptim_native.FlashAdamW([q])
    p.grad = torch.randn_like(p)
    a.step()
    b.load_state_dict(a.state_dict())
    assert b.state[q]["exp_avg_codes"].stride() == q.stride()
    for name, value in a.decoded_state(p).items():
        assert relative_error(to_numpy(b.decoded_state(q)[name]), to_numpy(value)) < 0.05
    assert torch.equal(b.state[q]["correction"], a.state[p]["correction"])


def test_groups_of_a_checkpoint():
    params = make_params()
    groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.2, "betas": (0.5, 0.6)}]
    optimizer = flashoptim_native.FlashAdamW(groups, decouple_lr=True, weight_decay=1e-4)
    optimizer.param_groups[0]["lr"] = 0.05
    optimizer.param_groups[0]["my_own"] = "kept"
    saved = through_file(optimizer.state_dict())
    other = flashoptim_native.FlashAdamW([{"params": params[:3]}, {"params": params[3:]}], decouple_lr=True)
    other.load_state_dict(saved)
    assert [g["lr"] for g in other.param_groups] == [0.05, 0.2]
    assert [g["decay_lr"] for g in other.param_groups] == [0.1, 0.2]
    assert other.param_groups[1]["betas"] == (0.5, 0.6) and other.param_groups[0]["my_own"] == "kept"
    one = flashoptim_native.FlashAdamW(params)
    with pytest.raises(ValueError, match="2 parameter groups"):
        one.load_state_dict(saved)
    uneven = flashoptim_native.FlashAdamW([{"params": params[:2]}, {"params": params[2:]}])
    with pytest.raises(ValueError, match="group 0 of the state dict has 3 parameters"):
        uneven.load_state_dict(saved)


def test_load_hooks_and_state_dict_hooks():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda opt, state_dict: seen.append(sorted(state_dict)))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda opt, state_dict: {**state_dict, "extra": 1})
    state_dict = optimizer.state_dict()
    assert state_dict["extra"] == 1
    optimizer.load_state_dict(state_dict)
    own = ["flashoptim_native.checksums", "flashoptim_native.weights"]
    assert seen == [["extra", *own, "param_groups", "state"], "post"]


def _broken(change):
    def apply(state_dict):
        state_dict = copy.deepcopy(state_dict)
        change(state_dict["state"][0], state_dict)
        return state_dict

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, d: s.pop("exp_avg_codes"), "lacks exp_avg"),
        (lambda s, d: s.update(exp_avg_codes=s["exp_avg_codes"][:5]), "'exp_avg_codes' of parameter 0 .* has shape"),
        (lambda s, d: s.update(correction=s["correction"][:5]), "'correction' of parameter 0 .* has shape"),
        (
            lambda s, d: s.update(correction=s["correction"].float()),
            "'correction' .* dtype float32; allowed are int8 and int16",
        ),
        (lambda s, d: s.update(exp_avg_scale=s["exp_avg_scale"][:5]), "'exp_avg_scale' of parameter 0 .* has shape"),
        (lambda s, d: s.update(exp_avg_scale=s["exp_avg_scale"].float()), "no known format"),
        (lambda s, d: s.update(exp_avg_codes=s["exp_avg_codes"].to(torch.int32)), "no known format"),
        (lambda s, d: (s.pop("exp_avg_scale"), s.update(exp_avg=s.pop("exp_avg_codes").float())), "different formats"),
        (lambda s, d: s.update(step=-1), "'step' of parameter 0"),
        (lambda s, d: s.update(step=1.5), "'step' of parameter 0"),
        (lambda s, d: s.update(momentum_buffer=s["correction"]), "momentum_buffer"),
        (lambda s, d: d["param_groups"][0].update(lr=float("nan")), "lr = nan"),
        (lambda s, d: d["param_groups"][0].update(betas=(0.9, 1.0)), r"betas\[1\] = 1.0"),
        (lambda s, d: d["param_groups"][0].update(seed=-1), "seed = -1"),
    ],
)
def test_a_bad_state_dict_changes_nothing(change, message):
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    bad = _broken(change)(optimizer.state_dict())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(bad, verify=False)
    assert_untouched(optimizer, before)
    run(optimizer, params, 2, 3)


def test_distributed_checkpoint_helpers_in_one_process():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 3)).to(torch.bfloat16)
        return model, flashoptim_native.FlashAdamW(model.parameters(), lr=1e-2)

    for options in (StateDictOptions(), StateDictOptions(flatten_optimizer_state_dict=True)):
        model, optimizer = make()
        run(optimizer, list(model.parameters()), 0, 3)
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        other, resumed = make()
        other.load_state_dict(model.state_dict())
        set_optimizer_state_dict(other, resumed, copy.deepcopy(saved), options=options)
        run(optimizer, list(model.parameters()), 3, 5)
        run(resumed, list(other.parameters()), 3, 5)
        assert_same_bits((list(model.parameters()), optimizer), (list(other.parameters()), resumed))


def test_checkpoint_size_is_that_of_the_byte_budget():
    p = torch.nn.Parameter(torch.zeros(1024, 1024, dtype=torch.bfloat16))
    optimizer = flashoptim_native.FlashAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    per_parameter = buffer.tell() / p.numel()
    assert 3.125 <= per_parameter <= 3.13  # 1 correction + 1 + 1 states + 2 x 2/32 headers
    assert np.isclose(sum(v.nbytes for v in optimizer.state[p].values() if hasattr(v, "nbytes")) / p.numel(), 3.125)
