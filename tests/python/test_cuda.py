"""CUDA tensors: the CPU's bits through the whole front end, graphs, loss scaling, clipping, layouts, checkpoints."""

from __future__ import annotations

import copy
import os

import pytest
import torch

import flashoptim_native
from flashoptim_native import _ops, _parameters, _states
from helpers import CLASSES, HYPERS, assert_same_bits, bits, make_params, set_grads

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _ops.has_cuda()), reason="no CUDA device, or operators built without CUDA"
)

SHAPES = [(96, 64), (33,), (31,), (1,), (0,), (5000,), (8, 4, 3, 3), (), (257, 129), (64, 1024)]


def to_cuda(params):
    return [torch.nn.Parameter(p.detach().cuda()) for p in params]


def copy_grads(source, target):
    for p, q in zip(source, target, strict=True):
        q.grad = None if p.grad is None else p.grad.cuda()


def pair(kind, dtype=torch.bfloat16, shapes=SHAPES, **options):
    host = make_params(dtype, shapes)
    device = to_cuda(host)
    options = {"min_quantized_numel": 64, **HYPERS[kind], **options}
    return (host, CLASSES[kind](host, **options)), (device, CLASSES[kind](device, **options))


def run_both(a, b, first, last, skip=()):
    for step in range(first, last):
        set_grads(a[0], step)
        for i in skip:
            if step % 2:
                a[0][i].grad = None
        copy_grads(a[0], b[0])
        a[1].step()
        b[1].step()


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"master_weight_bits": 32},
        {"state_codec": "paper"},
        {"quantize": False},
        {"master_weight_bits": None, "stochastic_rounding": True},
        {"state_codec": "paper", "master_weight_bits": 32},
    ],
)
def test_same_bits_as_the_cpu(kind, dtype, options):
    a, b = pair(kind, dtype, **options)
    run_both(a, b, 0, 6, skip=(1, 5))
    assert_same_bits(a, b)


def test_several_groups_and_dtypes_share_the_step():
    host = make_params(torch.bfloat16) + make_params(torch.float32, seed=1)
    device = to_cuda(host)
    both = []
    for params in (host, device):
        groups = [
            {"params": params[: len(host) // 2], "lr": 1e-2},
            {"params": params[len(host) // 2 :], "weight_decay": 0.0},
        ]
        both.append((params, flashoptim_native.FlashAdamW(groups, lr=1e-3, min_quantized_numel=64)))
    run_both(*both, 0, 5)
    assert_same_bits(*both)
    assert len(both[1][1]._store.records.plans) == 1


def test_sgd_groups_with_and_without_momentum():
    host = make_params(torch.bfloat16) + make_params(torch.bfloat16, seed=1)
    device = to_cuda(host)
    both = []
    for params in (host, device):
        half = len(params) // 2
        groups = [{"params": params[:half], "momentum": 0.9}, {"params": params[half:]}]
        both.append((params, flashoptim_native.FlashSGD(groups, lr=1e-2, min_quantized_numel=64)))
    run_both(*both, 0, 5)
    assert_same_bits(*both)


@pytest.mark.parametrize("which", ["channels_last", "transposed", "expanded_grad", "other_grad_strides", "misaligned"])
def test_layouts(which):
    def make(device):
        generator = torch.Generator().manual_seed(7)
        data = torch.randn(16, 8, 6, 10, generator=generator).bfloat16().to(device)
        if which == "channels_last":
            data = data.to(memory_format=torch.channels_last)
        if which == "transposed":
            data = data.permute(3, 1, 0, 2)
        if which == "misaligned":
            room = torch.zeros(data.numel() + 3, dtype=torch.bfloat16, device=device)
            view = room[3:].view(data.shape)
            view.copy_(data)
            data = view
        return torch.nn.Parameter(data)

    both = []
    for device in ("cpu", "cuda"):
        p = make(device)
        both.append(([p], flashoptim_native.FlashAdamW([p], lr=1e-2, min_quantized_numel=64)))
    for step in range(4):
        for (p,), optimizer in both:
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            grad = grad.bfloat16().to(p.device)
            if which == "expanded_grad":
                grad = grad[:1].expand(p.shape)
            elif which == "other_grad_strides":
                grad = grad.to(memory_format=torch.channels_last)
            else:
                grad = torch.empty_like(p).copy_(grad)
            p.grad = grad
            optimizer.step()
    assert_same_bits(*both)


def test_replayed_graph_equals_eager_steps():
    def make():
        params = to_cuda(make_params(torch.bfloat16))
        for p in params:
            p.grad = torch.zeros_like(p)
        lr = torch.tensor(1e-2, device="cuda")
        return (
            params,
            flashoptim_native.FlashAdamW(params, lr=lr, capturable=True, min_quantized_numel=64, weight_decay=0.1),
            lr,
        )

    def fill(params, step):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator).to(p.dtype))

    (eager, optimizer_e, lr_e), (graphed, optimizer_g, lr_g) = make(), make()
    for params, optimizer in ((eager, optimizer_e), (graphed, optimizer_g)):
        fill(params, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer_g.step()
    for step in range(1, 8):
        for lr in (lr_e, lr_g):
            lr.fill_(1e-2 / step)
        fill(eager, step)
        fill(graphed, step)
        optimizer_e.step()
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits((eager, optimizer_e), (graphed, optimizer_g))
    assert int(optimizer_g.state[graphed[0]]["step"]) == 8
    # A host-side learning rate and count give the same bytes.
    plain = to_cuda(make_params(torch.bfloat16))
    optimizer = flashoptim_native.FlashAdamW(plain, lr=1e-2, min_quantized_numel=64, weight_decay=0.1)
    for step in range(8):
        for p in plain:
            p.grad = torch.zeros_like(p)
        fill(plain, step)
        optimizer.param_groups[0]["lr"] = float(torch.tensor(1e-2 / max(1, step)))
        optimizer.step()
    for p, q in zip(plain, graphed, strict=True):
        assert bits(p) == bits(q)


def test_a_step_that_is_not_ready_cannot_be_captured():
    p = torch.nn.Parameter(torch.zeros(4096, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = flashoptim_native.FlashAdamW([p], lr=1e-2, capturable=True)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="capture"), torch.cuda.graph(graph):
        optimizer.step()


def test_grad_scaler_skips_on_the_device():
    params, plain = to_cuda(make_params(torch.float32)), to_cuda(make_params(torch.float32))
    scaled = flashoptim_native.FlashAdamW(params, lr=1e-2, min_quantized_numel=64)
    unscaled = flashoptim_native.FlashAdamW(plain, lr=1e-2, min_quantized_numel=64)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=1000)
    for step in range(6):
        set_grads_on(params, step, 1024.0 if step != 3 else float("inf"))
        scaler.scale(torch.zeros(1, device="cuda"))
        before = [bits(p) for p in params]
        scaler.step(scaled)
        scaler.update(1024.0)
        if step == 3:
            assert [bits(p) for p in params] == before
            continue
        set_grads_on(plain, step, 1.0)
        unscaled.step()
    assert int(scaled.state[params[0]]["step"]) == unscaled.state[plain[0]]["step"] == 5
    for p, q in zip(params, plain, strict=True):
        assert bits(p) == bits(q)
    # A checkpoint holds the count, and a plain run goes on from it.
    again = flashoptim_native.FlashAdamW(params, lr=1e-2, min_quantized_numel=64)
    again.load_state_dict(copy.deepcopy(scaled.state_dict()))
    assert again.state[params[0]]["step"] == 5
    for optimizer, tensors in ((again, params), (unscaled, plain)):
        set_grads_on(tensors, 9, 1.0)
        optimizer.step()
    for p, q in zip(params, plain, strict=True):
        assert bits(p) == bits(q)


def set_grads_on(params, step, factor):
    set_grads(cpu := [torch.nn.Parameter(p.detach().cpu()) for p in params], step)
    for p, q in zip(params, cpu, strict=True):
        p.grad = (q.grad * factor).cuda()


def test_fused_clipping():
    a, b = pair("adamw", torch.float32)
    set_grads(a[0], 0, scale=3.0)
    copy_grads(a[0], b[0])
    exact = torch.cat([p.grad.double().reshape(-1) for p in a[0]]).norm()
    before = [bits(p.grad) for p in b[0]]
    norm = b[1].clip_grad_norm_(1.0)
    assert abs(float(norm) - float(exact)) <= 1e-6 * float(exact)
    coefficient = b[1]._stepper.clip.item()
    assert coefficient == pytest.approx(1.0 / (float(exact) + 1e-6), rel=1e-6)
    b[1].step()
    assert [bits(p.grad) for p in b[0]] == before
    for p in a[0]:
        p.grad.mul_(torch.tensor(coefficient))
    a[1].step()
    assert_same_bits(a, b)
    assert b[1]._stepper.clip is None
    # Below the limit nothing is scaled; zero_grad() forgets.
    copy_grads(a[0], b[0])
    b[1].clip_grad_norm_(1e6)
    assert b[1]._stepper.clip.item() == 1.0
    b[1].zero_grad()
    assert b[1]._stepper.clip is None


def test_the_norm_is_the_same_every_time():
    _, (params, optimizer) = pair("sgd", torch.bfloat16)
    set_grads_on(params, 1, 1.0)
    norms = {bits(optimizer.clip_grad_norm_(1.0)) for _ in range(20)}
    assert len(norms) == 1


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("codec", ["default", "paper"])
def test_conversions_give_the_cpus_bits(kind, codec):
    a, b = pair(kind, torch.bfloat16, state_codec=codec)
    run_both(a, b, 0, 3)
    for compressed in (True, False):
        dicts = []
        for _, optimizer in (a, b):
            optimizer._compress_state_dict = compressed
            dicts.append(optimizer.state_dict())
        for p, q in zip(dicts[0]["state"].values(), dicts[1]["state"].values(), strict=True):
            for key, value in p.items():
                assert bits(value) == bits(q[key]) if isinstance(value, torch.Tensor) else value == q[key], key
    # fp32 states into codes, and on.
    for (_, optimizer), state in zip((a, b), dicts, strict=True):
        optimizer.load_state_dict(state)
    assert_same_bits(a, b)
    run_both(a, b, 3, 5)
    assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 32])
def test_export_and_import_of_weights(dtype, width):
    host = torch.nn.Linear(129, 65).to(dtype)
    device = copy.deepcopy(host).cuda()
    exported = []
    for model in (host, device):
        optimizer = flashoptim_native.FlashAdamW(
            model.parameters(), lr=1e-2, min_quantized_numel=64, master_weight_bits=width
        )
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        optimizer.step()
        exported.append(flashoptim_native.get_fp32_model_state_dict(model, optimizer))
        moved = {name: value * 1.0001 for name, value in exported[-1].items()}
        flashoptim_native.set_fp32_model_state_dict(model, moved, optimizer)
        exported.append(flashoptim_native.get_fp32_model_state_dict(model, optimizer))
    for name in exported[0]:
        assert bits(exported[0][name]) == bits(exported[2][name])
        assert bits(exported[1][name]) == bits(exported[3][name])


def test_a_run_moves_between_devices():
    a, b = pair("adamw")
    run_both(a, b, 0, 2)
    host = make_params(shapes=SHAPES)
    for p, q in zip(host, b[0], strict=True):
        p.data.copy_(q.detach().cpu())
    moved = flashoptim_native.FlashAdamW(host, **HYPERS["adamw"], min_quantized_numel=64)
    moved.load_state_dict(b[1].state_dict())
    set_grads(a[0], 7)
    set_grads(host, 7)
    a[1].step()
    moved.step()
    assert_same_bits(a, (host, moved))


def test_telemetry_equals_the_cpus():
    a, b = pair("adamw", state_codec="default", check_numerics=True)
    run_both(a, b, 0, 4)
    assert a[1].numerics_report() == b[1].numerics_report()
    assert b[1].numerics_report().sampled_updates > 0


def test_another_stream_and_parameters_that_move():
    a, b = pair("adamw")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_both(a, b, 0, 3)
    torch.cuda.current_stream().wait_stream(stream)
    for p in b[0]:
        p.data = p.data.clone()
    for state in b[1].state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = value.clone()
    run_both(a, b, 3, 6)
    assert_same_bits(a, b)


def test_gradient_release():
    def model():
        torch.manual_seed(3)
        return (
            torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).bfloat16().cuda()
        )

    results = []
    for release in (False, True):
        net = model()
        optimizer = flashoptim_native.FlashAdamW(net.parameters(), lr=1e-2, min_quantized_numel=64)
        handle = flashoptim_native.enable_gradient_release(net, optimizer) if release else None
        for step in range(3):
            x = torch.full((4, 64), 0.1 * (step + 1), device="cuda", dtype=torch.bfloat16)
            net(x).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        results.append(([*net.parameters()], optimizer))
    assert_same_bits(*results)


def launches(function):
    """Names of the kernels and memsets that a function puts on the device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in names if "kernel" in name or name.startswith("Mem")]  # the others are ranges of the host


def test_states_are_zeroed_in_one_launch():
    forms = [
        _states.Format(_ops.MasterWeights.CORRECTION8, _ops.StateCodec.DEFAULT, True),
        _states.Format(_ops.MasterWeights.CORRECTION16_NEAREST, _ops.StateCodec.PAPER, True),
        _states.Format(_ops.MasterWeights.NONE, _ops.StateCodec.FLOAT32, True),
    ]
    params = to_cuda(make_params(torch.bfloat16, SHAPES))
    items = [(_parameters.local(p), form, "p") for p in params for form in forms]
    torch.full((1 << 24,), 0x5A, dtype=torch.uint8, device="cuda")  # what the allocator hands out next is not zero
    made = []
    names = launches(lambda: made.extend(_states.new_states("adamw", items)))
    assert len(names) == 1 and "zero_kernel" in names[0]
    for (_, form, _), state in zip(items, made, strict=True):
        arrays = list(state)[1:]
        assert arrays == list(_ops.array_names("adamw", True, form.master_weights, form.codec))
        storages = {state[name].untyped_storage().data_ptr() for name in arrays if state[name].numel()}
        assert len(storages) == sum(state[name].numel() != 0 for name in arrays)  # each has memory of its own
        for name in arrays:
            assert state[name].data_ptr() % 16 == 0 and state[name].count_nonzero() == 0


def test_new_gradients_take_one_launch_more():
    params = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device="cuda")) for _ in range(300)]
    optimizer = flashoptim_native.FlashAdamW(params, min_quantized_numel=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(launches(optimizer.step)) == 1
    for p in params:
        p.grad = torch.ones_like(p)
    assert len(launches(optimizer.step)) == 2


def test_zero_operator_on_the_current_stream():
    tensor = torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        tensor.fill_(1.0)
        torch.ops.flashoptim.zero_([tensor])  # on another stream it would be overtaken by fill_
    stream.synchronize()
    assert tensor.count_nonzero() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_states_on_a_device_that_is_not_current():
    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda:1")) for _ in range(3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = flashoptim_native.FlashAdamW(params, min_quantized_numel=64)
    optimizer.step()
    assert torch.cuda.current_device() == 0
    assert {state["exp_avg_codes"].device for state in optimizer.state.values()} == {torch.device("cuda:1")}


@pytest.mark.skipif(not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="30 GB and a minute: FLASHOPTIM_TEST_ALL=1")
def test_more_than_two_to_the_31_elements():
    numel = 2**31 + 4097
    results = []
    for device in ("cuda", "cpu"):
        p = torch.nn.Parameter(torch.ones(numel, dtype=torch.bfloat16, device=device))
        p.grad = torch.zeros_like(p)
        p.grad[-5000:] = 0.5
        p.grad[:5000] = -0.25
        optimizer = flashoptim_native.FlashAdamW([p], lr=1e-3)
        optimizer.step()
        state = optimizer.state[p]
        results.append(
            [
                bits(t[-9000:]) + bits(t[:9000])
                for t in (p, state["correction"], state["exp_avg_codes"], state["exp_avg_sq_codes"])
            ]
        )
        del p, optimizer, state
    assert results[0] == results[1]


def test_a_graph_outlives_what_is_done_to_its_optimizer():
    """reset_numerics(), a first gradient of a parameter, an odd gradient: a replay still steps what was captured."""
    names = ("graphed", "plain")
    runs = {name: to_cuda(make_params(torch.bfloat16)) for name in names}
    options = {"lr": 1e-2, "capturable": True, "min_quantized_numel": 64}
    optimizers = {name: flashoptim_native.FlashAdamW(runs[name], **options) for name in names}
    late = 0  # has its first gradient after the capture
    for name in names:
        for index, p in enumerate(runs[name]):
            p.grad = None if index == late else torch.ones_like(p)
        optimizers[name].step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers["graphed"].step()
    graph.replay()
    optimizers["graphed"].reset_numerics()
    runs["graphed"][late].grad = torch.ones_like(runs["graphed"][late])
    captured = [p.grad for p in runs["graphed"]]  # a replay reads them: they are the caller's to keep
    for p in runs["graphed"][1:]:
        p.grad = None
    optimizers["graphed"].step()  # another plan
    junk = [torch.full((1 << 20,), 0x5A, dtype=torch.uint8, device="cuda") for _ in range(64)]
    graph.replay()
    torch.cuda.synchronize()
    del captured
    assert all(int(one[0]) == 0x5A and bool((one == 0x5A).all()) for one in junk)
    for _ in range(2):
        optimizers["plain"].step()
    for p in runs["plain"][1:]:
        p.grad = None
    runs["plain"][late].grad = torch.ones_like(runs["plain"][late])
    optimizers["plain"].step()
    for p, q in zip(runs["graphed"], runs["plain"], strict=True):
        assert bits(p) == bits(q)


def test_one_parameter_at_a_time_is_one_launch():
    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")) for _ in range(2000)]
    together = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizer = flashoptim_native.FlashAdamW(params, min_quantized_numel=64)
    other = flashoptim_native.FlashAdamW(together, min_quantized_numel=64)
    for step in range(3):
        for p, q in zip(params, together, strict=True):
            p.grad = torch.full_like(p, 0.5 + step)
            q.grad = p.grad.clone()
        for p in params[:-1]:
            optimizer.step_param(p)
        names = launches(lambda: optimizer.step_param(params[-1]))
        if step == 2:  # in the first they are new, in the second they are planned together
            assert len(names) == 1
        other.step()
    assert_same_bits((params, optimizer), (together, other))


def test_states_moved_behind_the_optimizer():
    """What the much-copied optimizer_to(device) does, there and back."""
    host, device = pair("adamw", torch.bfloat16)
    _, optimizer = device
    run_both(host, device, 0, 2)
    for target in ("cpu", "cuda"):
        for held in optimizer.state.values():
            for value in held.values():
                if isinstance(value, torch.Tensor):
                    value.data = value.data.to(target)
    junk = [torch.full((1 << 16,), 0x5A, dtype=torch.uint8, device="cuda") for _ in range(64)]
    run_both(host, device, 2, 4)
    torch.cuda.synchronize()
    assert all(bool((one == 0x5A).all()) for one in junk)
    assert_same_bits(host, device)
