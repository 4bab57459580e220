"""The manners of torch.optim.Optimizer: groups, schedulers, gradients of all kinds, closures, hooks, layouts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.optim import lr_scheduler

import flashoptim_native
from helpers import CLASSES, HYPERS, assert_same_bits, bits, make_params, run, set_grads

KINDS = list(CLASSES)


def test_names_and_types():
    for cls in CLASSES.values():
        assert issubclass(cls, torch.optim.Optimizer) and issubclass(cls, flashoptim_native.FlashOptimizer)
    from flashoptim_native import optimizers

    assert all(hasattr(optimizers, name) for name in optimizers.__all__)
    assert all(hasattr(flashoptim_native, name) for name in flashoptim_native.__all__)
    assert flashoptim_native.cpu_isa() in ("scalar", "avx2", "avx512", "avx512_bf16")


def test_defaults_hold_no_initial_lr_and_repr_works():
    optimizer = flashoptim_native.FlashAdamW(make_params())
    assert "initial_lr" not in optimizer.defaults and "initial_lr" not in optimizer.param_groups[0]
    assert "lr: 0.001" in repr(optimizer)


# Groups and schedulers


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, eta_min=1e-5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda e: 1 / (e + 1), lambda e: (e + 1) / 8]),
    "warmup": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=9),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_give_the_lrs_of_torch_and_they_are_respected(scheduler, tensor_lr):
    def make(cls, params, **options):
        lrs = [torch.tensor(0.01), torch.tensor(0.03)] if tensor_lr else [0.01, 0.03]
        groups = [{"params": params[:4], "lr": lrs[0]}, {"params": params[4:], "lr": lrs[1]}]
        return cls(groups, lr=1e-3, weight_decay=0.1, **options)

    ours_params, theirs_params = make_params(torch.float32), make_params(torch.float32)
    ours = make(flashoptim_native.FlashAdamW, ours_params, quantize=False)
    theirs = make(torch.optim.AdamW, theirs_params)
    ours_schedule, theirs_schedule = SCHEDULERS[scheduler](ours), SCHEDULERS[scheduler](theirs)
    for step in range(8):
        assert [float(g["lr"]) for g in ours.param_groups] == [float(g["lr"]) for g in theirs.param_groups]
        run(ours, ours_params, step, step + 1)
        run(theirs, theirs_params, step, step + 1)
        ours_schedule.step()
        theirs_schedule.step()
    for p, q in zip(ours_params, theirs_params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_one_cycle_changes_betas_of_each_step():
    params = make_params(torch.float32)
    optimizer = flashoptim_native.FlashAdamW(params, quantize=False)
    other_params = make_params(torch.float32)
    other = torch.optim.AdamW(other_params)
    schedules = [lr_scheduler.OneCycleLR(o, 0.1, total_steps=9) for o in (optimizer, other)]
    for step in range(8):
        run(optimizer, params, step, step + 1)
        run(other, other_params, step, step + 1)
        for schedule in schedules:
            schedule.step()
    for p, q in zip(params, other_params):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_reduce_on_plateau_and_swa_wrap_it():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params, lr=1.0)
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] < 1.0


def test_groups_have_their_own_options():
    params = make_params()
    groups = [
        {"params": params[:1], "lr": 0.5, "master_weight_bits": 32},
        {"params": params[1:2], "quantize": False},
        {"params": params[2:5], "state_codec": "paper", "min_quantized_numel": 0, "weight_decay": 0.0},
        {"params": params[5:], "betas": (0.1, 0.2), "eps": 1.0, "seed": 7, "maximize": True},
    ]
    optimizer = flashoptim_native.FlashAdamW(groups, lr=1e-3)
    run(optimizer, params, 0, 2)
    assert optimizer.state[params[0]]["correction"].dtype == torch.int16
    assert optimizer.state[params[1]]["exp_avg"].dtype == torch.float32
    assert optimizer.state[params[2]]["exp_avg_codes"].dtype == torch.int8
    separate = make_params()
    for number, group in enumerate(groups):
        options = {
            k: v for k, v in group.items() if k in ("lr", "master_weight_bits", "quantize", "state_codec", "betas")
        }
        options |= {
            k: v for k, v in group.items() if k in ("min_quantized_numel", "weight_decay", "eps", "seed", "maximize")
        }
        indices = [i for i, p in enumerate(params) if any(p is q for q in group["params"])]
        alone = flashoptim_native.FlashAdamW([separate[i] for i in indices], **{"lr": 1e-3, **options})
        run(alone, separate, 0, 2)
        for i in indices:
            assert bits(params[i]) == bits(separate[i]), number


def test_options_changed_between_steps_take_effect():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    optimizer.param_groups[0]["state_codec"] = "paper"
    optimizer.param_groups[0]["master_weight_bits"] = 32
    run(optimizer, params, 2, 3)
    assert optimizer.state[params[0]]["exp_avg_codes"].dtype == torch.int8
    assert optimizer.state[params[0]]["correction"].dtype == torch.int16
    assert optimizer.state[params[0]]["step"] == 3


def test_add_param_group_and_replaced_parameters():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params[:4])
    run(optimizer, params, 0, 2)
    optimizer.add_param_group({"params": params[4:], "lr": 0.1})
    run(optimizer, params, 2, 4)
    assert [optimizer.state[p]["step"] for p in params] == [4] * 4 + [2] * 4
    new = torch.nn.Parameter(torch.randn(10, dtype=torch.bfloat16))  # as densification and pruning do
    optimizer.state.pop(params[0])
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones_like(new)
    before = bits(params[0])
    optimizer.step()
    assert optimizer.state[new]["step"] == 1 and bits(params[0]) == before


def test_named_parameters_are_named_in_messages():
    model = torch.nn.Linear(4, 4).to(torch.bfloat16)
    optimizer = flashoptim_native.FlashAdamW(model.named_parameters())
    model.bias.grad = torch.ones(4, dtype=torch.bfloat16).to_sparse()
    with pytest.raises(RuntimeError, match="'bias'"):
        optimizer.step()


# Gradients


def test_none_gradients_are_skipped():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    set_grads(params, 2)
    params[0].grad = params[5].grad = None
    before = bits(params[0]), bits(optimizer.state[params[0]]["exp_avg_codes"])
    optimizer.step()
    assert (bits(params[0]), bits(optimizer.state[params[0]]["exp_avg_codes"])) == before
    assert [optimizer.state[p]["step"] for p in params] == [2, 3, 3, 3, 3, 2, 3, 3]
    optimizer.zero_grad()
    optimizer.step()  # nothing to do
    fresh = flashoptim_native.FlashAdamW(make_params())
    fresh.step()
    assert fresh.state_dict()["state"] == {}


@pytest.mark.parametrize("kind", KINDS)
def test_skipped_parameters_do_not_disturb_the_others(kind):
    params, others = make_params(), make_params()
    optimizer, reference = CLASSES[kind](params, **HYPERS[kind]), CLASSES[kind](others[1:], **HYPERS[kind])
    for step in range(4):
        set_grads(params, step)
        set_grads(others, step)
        params[0].grad = None
        optimizer.step()
        reference.step()
    assert_same_bits((params[1:], optimizer), (others[1:], reference))


def test_fp32_gradients_of_16_bit_parameters():
    params, exact = make_params(), make_params(torch.float32)
    optimizer = flashoptim_native.FlashSGD(params, lr=0.5)
    set_grads(exact, 0)
    for p, q in zip(params, exact):
        p.grad_dtype = None
        p.grad = q.grad.clone()
    before = [p.detach().float() for p in params]
    optimizer.step()
    for p, w, q in zip(params, before, exact):
        ours = flashoptim_native.reconstruct_fp32_param(p, optimizer.state[p]["correction"])
        torch.testing.assert_close(ours, w - 0.5 * q.grad, rtol=2.0**-15, atol=1e-6)


@pytest.mark.parametrize("quantized", [0, 10**9])
@pytest.mark.parametrize(
    "relayout",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    ],
)
def test_dense_layouts_step_in_storage_order(relayout, quantized):
    """A permuted parameter steps as its contiguous permutation would, whatever the gradient's strides."""
    start = relayout(torch.randn(16, 8, 4, 5).to(torch.bfloat16))
    p = torch.nn.Parameter(start.clone())
    assert not p.is_contiguous() and p.stride() == start.stride()
    order = sorted(range(4), key=lambda d: -p.stride(d))
    q = torch.nn.Parameter(p.detach().clone().permute(order))
    assert q.is_contiguous()
    a = flashoptim_native.FlashAdamW([p], lr=0.1, min_quantized_numel=quantized)
    b = flashoptim_native.FlashAdamW([q], lr=0.1, min_quantized_numel=quantized)
    for step in range(4):
        grad = torch.randn(16, 8, 4, 5).to(torch.bfloat16)
        p.grad = [grad, relayout(grad), grad[:1].expand_as(grad), torch.randn(32, 8, 4, 5).to(grad.dtype)[::2]][step]
        q.grad = p.grad.permute(order).contiguous()
        a.step()
        b.step()
    assert p.stride() == start.stride()
    assert torch.equal(p.permute(order), q)
    assert torch.equal(a.state[p]["correction"].permute(order), b.state[q]["correction"])
    slot = "exp_avg" if "exp_avg" in b.state[q] else "exp_avg_codes"
    assert torch.equal(a.state[p][slot].permute(order), b.state[q][slot])


def test_strided_parameters_with_gaps():
    whole = torch.randn(64, 40).to(torch.bfloat16)
    rest = whole[:, 1::2].clone()
    p = torch.nn.Parameter(whole[:, ::2])
    q = torch.nn.Parameter(whole[:, ::2].clone())
    a, b = (
        flashoptim_native.FlashAdamW([p], min_quantized_numel=0),
        flashoptim_native.FlashAdamW([q], min_quantized_numel=0),
    )
    for _ in range(3):
        p.grad = torch.randn(64, 20).to(torch.bfloat16)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    assert torch.equal(p, q) and torch.equal(whole[:, 1::2], rest)
    assert_same_bits(([p], a), ([q], b))


def test_a_layout_that_changes_between_steps():
    p, q = (torch.nn.Parameter(t) for t in [torch.randn(16, 8, 4, 5).to(torch.bfloat16)] * 2)
    q.data = q.data.clone()
    a, b = (
        flashoptim_native.FlashAdamW([p], min_quantized_numel=0),
        flashoptim_native.FlashAdamW([q], min_quantized_numel=0),
    )
    for step in range(4):
        if step == 2:
            p.data = p.data.to(memory_format=torch.channels_last)
        p.grad = torch.randn(16, 8, 4, 5).to(torch.bfloat16)
        q.grad = p.grad.clone()
        a.step()
        b.step()
        assert_same_bits(([p], a), ([q], b))
    assert p.is_contiguous(memory_format=torch.channels_last)


def test_misaligned_views_and_zero_size():
    storage = torch.randn(2001).to(torch.bfloat16)
    p = torch.nn.Parameter(storage[1:])
    q = torch.nn.Parameter(storage[1:].clone())
    empty = torch.nn.Parameter(torch.empty(0, 5, dtype=torch.bfloat16))
    a = flashoptim_native.FlashAdamW([p, empty], min_quantized_numel=0)
    b = flashoptim_native.FlashAdamW([q], min_quantized_numel=0)
    for _ in range(3):
        p.grad = torch.randn(4001).to(torch.bfloat16)[1:2001]
        q.grad = p.grad.clone()
        empty.grad = torch.empty_like(empty)
        a.step()
        b.step()
    assert_same_bits(([p], a), ([q], b))
    assert a.state[empty]["step"] == 3


def test_tied_weights_step_once():
    embedding, head = (
        torch.nn.Embedding(100, 64).to(torch.bfloat16),
        torch.nn.Linear(64, 100, bias=False).to(torch.bfloat16),
    )
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=0.1)
    model(torch.arange(10)).float().logsumexp(-1).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1 and optimizer.state[head.weight]["step"] == 1
    assert embedding.weight is head.weight


def test_a_model_cast_after_construction_and_mixed_dtypes():
    model = torch.nn.Sequential(torch.nn.Linear(80, 80), torch.nn.Linear(80, 4))
    optimizer = flashoptim_native.FlashAdamW(model.parameters())
    model[0].to(torch.bfloat16)
    params = list(model.parameters())
    run(optimizer, params, 0, 2)
    assert "correction" in optimizer.state[params[0]] and "correction" not in optimizer.state[params[2]]
    weights = flashoptim_native.reconstruct_fp32_param(params[0], optimizer.state[params[0]]["correction"])
    model[0].to(torch.float32)
    optimizer.param_groups[0].update(lr=0.0)
    run(optimizer, params, 2, 3)
    assert "correction" not in optimizer.state[params[0]]  # it is in the weight now, which is what it was
    assert torch.equal(params[0], weights) and optimizer.state[params[0]]["step"] == 3


def test_all_fp32_models_work_with_the_default_arguments():
    params = make_params(torch.float32)
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 2)
    assert (
        "correction" not in optimizer.state[params[0]]
        and optimizer.state[params[0]]["exp_avg_codes"].dtype == torch.uint8
    )


# Calls


def test_closures_and_step_hooks():
    p = torch.nn.Parameter(torch.ones(40, dtype=torch.bfloat16))
    optimizer = flashoptim_native.FlashSGD([p], lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("pre"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("post"))

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (p.float() ** 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 40.0
    assert optimizer.step(closure=closure).item() < 40.0
    assert seen == ["pre", "post"] * 2


def test_step_under_grad_mode_makes_no_graph():
    params = make_params()
    optimizer = flashoptim_native.FlashAdamW(params)
    run(optimizer, params, 0, 1)
    assert all(p.is_leaf and p.requires_grad and p.grad_fn is None for p in params)
    with torch.inference_mode(False), torch.enable_grad():
        run(optimizer, params, 1, 2)
    assert all(not v.requires_grad for v in optimizer.state[params[0]].values() if isinstance(v, torch.Tensor))


def test_step_param_equals_step():
    params, others = make_params(), make_params()
    optimizer, reference = flashoptim_native.FlashAdamW(params), flashoptim_native.FlashAdamW(others)
    for step in range(3):
        set_grads(params, step)
        for p in params:
            optimizer.step_param(p)
        run(reference, others, step, step + 1)
    assert_same_bits((params, optimizer), (others, reference))
    with pytest.raises(ValueError, match="in no group"):
        optimizer.step_param(torch.nn.Parameter(torch.ones(1)))


def test_states_may_be_moved_replaced_and_deleted():
    params, others = make_params(), make_params()
    optimizer, reference = flashoptim_native.FlashAdamW(params), flashoptim_native.FlashAdamW(others)
    for step in range(6):
        run(optimizer, params, step, step + 1)
        run(reference, others, step, step + 1)
        for p in params:
            optimizer.state[p] = {
                k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()
            }
        if step == 3:
            for p in params:
                optimizer.state[p]["step"] = torch.tensor(float(optimizer.state[p]["step"]))
    assert_same_bits((params, optimizer), (others, reference))
    optimizer.state.clear()
    run(optimizer, params, 6, 7)
    assert optimizer.state[params[0]]["step"] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_grad_scaler(dtype):
    """An unscaled run, a scaled one, and a scaled one with clipping agree; an overflow changes nothing."""
    results = []
    for scale in (False, True):
        params = make_params(dtype)
        optimizer = flashoptim_native.FlashAdamW(params)
        scaler = torch.amp.GradScaler("cpu", enabled=scale, init_scale=1024.0)
        for step in range(4):
            set_grads(params, step)
            with torch.no_grad():
                for p in params:
                    p.grad *= 1024.0 if scale else 1.0
            if scale and dtype == torch.float32 and step == 2:
                scaler.unscale_(optimizer)
            if scale:
                scaler.scale(torch.ones(()))  # makes the scale
            if step == 3 and scale:
                before = [bits(p) for p in params], optimizer.state[params[0]]["step"]
                params[0].grad.view(-1)[0] = float("inf")
                scaler.step(optimizer)
                assert ([bits(p) for p in params], optimizer.state[params[0]]["step"]) == before
            elif step < 3:
                scaler.step(optimizer)
            scaler.update()
        results.append((params, optimizer))
    assert not hasattr(results[1][1], "found_inf")
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_grad_scaler_skips_is_not_called_where_accelerate_looks(dtype):
    """As its AcceleratedOptimizer does: a function of its own in step's place, while GradScaler's step() runs."""
    results = []
    for is_watched in (False, True):
        params = make_params(dtype)
        optimizer = flashoptim_native.FlashAdamW(params)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        called = []
        for step in range(3):
            set_grads(params, step)
            scaler.scale(torch.ones(()))  # makes the scale
            if step == 1:
                params[0].grad.view(-1)[0] = float("inf")
            if is_watched:
                inner = optimizer.step

                def watched(*arguments, count=step, method=inner, seen=called, **named):
                    seen.append(count)
                    return method(*arguments, **named)

                watched.__module__ = "accelerate.optimizer"
                optimizer.step = watched
            scaler.step(optimizer)
            scaler.update()
            if is_watched:
                optimizer.step = inner
        # GradScaler refuses to unscale fp16 gradients: they go on to be unscaled by step(), as with torch's fused ones.
        assert called == ([] if not is_watched else [0, 1, 2] if dtype == torch.float16 else [0, 2])
        results.append((params, optimizer))
    assert_same_bits(*results)


@pytest.mark.parametrize("quantize", [False, True])
def test_decoded_states_are_copies(quantize):
    results = []
    for looks in (False, True):
        params = make_params(torch.bfloat16)
        optimizer = flashoptim_native.FlashAdEMAMix(params, quantize=quantize, min_quantized_numel=0)
        run(optimizer, params, 0, 2)
        if looks:
            seen = [value for p in params for value in optimizer.decoded_state(p).values()]
            before = [bits(value) for value in seen]
        run(optimizer, params, 2, 4)
        if looks:
            assert [bits(value) for value in seen] == before
            for p in params:
                for value in optimizer.decoded_state(p).values():
                    value.fill_(7.0)
        run(optimizer, params, 4, 6)
        results.append((params, optimizer))
    assert_same_bits(*results)


def test_hostile_gradients_spoil_their_own_group_and_are_counted():
    p = torch.nn.Parameter(torch.ones(128, 64, dtype=torch.bfloat16))
    optimizer = flashoptim_native.FlashAdamW([p])
    p.grad = torch.full_like(p, 0.5)
    p.grad[3, 40] = float("nan")
    p.grad[5, 2] = float("inf")
    optimizer.step()
    bad = ~p.isfinite()
    assert bad[3, 40] and not bad[:3].any() and not bad[3, :32].any() and not bad[6:].any()
    assert optimizer.numerics_report().nonfinite_gradients == 2
    optimizer.reset_numerics()
    assert optimizer.numerics_report().nonfinite_gradients == 0


# Numerics


def test_check_numerics_raises_before_anything_changes():
    p = torch.nn.Parameter(torch.full((100,), 1.0, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    for options, lr, raises in [
        ({"state_codec": "paper"}, 1e-6, True),
        ({"state_codec": "paper"}, 1e-2, False),
        ({"state_codec": "paper"}, 0.0, False),
        ({"state_codec": "paper", "master_weight_bits": 32}, 1e-5, False),
        ({"state_codec": "default"}, 1e-9, False),
        ({"master_weight_bits": None, "stochastic_rounding": True}, 1e-9, False),
    ]:
        optimizer = flashoptim_native.FlashAdamW([p], lr=lr, check_numerics=True, **options)
        if raises:
            before = bits(p)
            with pytest.raises(flashoptim_native.NumericsError, match="lr = 1e-06 is too small for parameter 0"):
                optimizer.step()
            assert bits(p) == before and not optimizer.state
        else:
            optimizer.step()


def test_check_numerics_measures_weights_when_told():
    p = torch.nn.Parameter(torch.full((100,), 1e-4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = flashoptim_native.FlashSGD([p], lr=1e-5, check_numerics=True, state_codec="paper")
    optimizer.step()
    with torch.no_grad():
        p.fill_(100.0)
    optimizer.step()  # still the measure of the first step
    optimizer.recompute_param_stats()
    with pytest.raises(flashoptim_native.NumericsError):
        optimizer.step()


def test_lost_updates_are_counted():
    def lost(**options):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = flashoptim_native.FlashSGD([p], lr=1e-6, check_numerics=True, **options)
        optimizer._stepper.monitor.largest[id(p)] = 0.0  # the sample alone, without the check of lr
        for _ in range(5):
            p.grad = torch.ones_like(p)
            optimizer.step()
        report = optimizer.numerics_report()
        return report.unchanged_weights / report.sampled_updates

    assert lost(state_codec="paper") == 1.0
    assert lost(state_codec="default") < 1.0
    assert lost(state_codec="paper", master_weight_bits=32) == 0.0


def test_import_is_quick_and_needs_no_cuda():
    code = (
        "import sys, torch, time; t = time.perf_counter(); import flashoptim_native; "
        "assert not {'triton', 'torch._dynamo', 'torch._inductor'} & set(sys.modules); print(time.perf_counter() - t)"
    )
    seconds = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert seconds < 2.0


def test_step_tells_autograd_that_parameters_changed():
    param = torch.nn.Parameter(torch.ones(8))
    opt = flashoptim_native.FlashAdamW([param])
    loss = (param * param).sum()
    param.grad = torch.ones(8)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "cls", [flashoptim_native.FlashAdamW, flashoptim_native.FlashSGDW, flashoptim_native.FlashLion]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_infinite_weight_becomes_nan_and_spoils_nothing_else(cls, weight_decay):
    torch.manual_seed(0)
    options = {"momentum": 0.9} if cls is flashoptim_native.FlashSGDW else {}
    values, grads = torch.randn(64).bfloat16(), torch.randn(3, 64).bfloat16()
    params = [torch.nn.Parameter(values.clone()) for _ in range(2)]
    with torch.no_grad():
        params[0][5] = float("inf")
    for param in params:
        optimizer = cls([param], lr=1e-2, weight_decay=weight_decay, min_quantized_numel=0, **options)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
    others = torch.arange(64) != 5
    assert params[0][5].isnan()
    assert torch.equal(params[0][others], params[1][others])
