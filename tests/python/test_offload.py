"""Offloaded states: the bits of states that stay on the device, wherever and whenever their copies come.

On the CPU the device is simulated: parameters lie in plain memory, states in the optimizer's host memory, and copies
are made as late as they may (libtorch/store/late_copies.h), so that a wait that is missing is seen.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashoptim_native import (
    FlashAdam,
    FlashAdamW,
    FlashAdEMAMix,
    FlashADOPT,
    FlashLion,
    FlashSGD,
    FlashSGDW,
    _offload,
    _ops,
    enable_gradient_release,
)

MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": FlashAdamW,
    "adam": FlashAdam,
    "sgd": lambda params, **kw: FlashSGD(params, lr=1e-2, momentum=0.9, **kw),
    "sgd_plain": lambda params, **kw: FlashSGD(params, lr=1e-2, **kw),
    "sgdw": lambda params, **kw: FlashSGDW(params, lr=1e-2, momentum=0.9, **kw),
    "lion": FlashLion,
    "ademamix": FlashAdEMAMix,
    "adopt": FlashADOPT,
}
FORMATS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"state_codec": "paper"},
    "fp32 states": {"quantize": False},
    "32 bits": {"master_weight_bits": 32},
    "stochastic": {"master_weight_bits": None, "stochastic_rounding": True},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Small enough that several records share a slot and others are cut.
SMALL = 64 << 10


@pytest.fixture(autouse=True)
def simulated() -> Iterator[None]:
    if DEVICE == "cuda":
        yield
        return
    _offload.simulate(True)
    yield
    _offload.simulate(False)


class Net(nn.Module):
    """Layers of all kinds: long rows, short rows, odd rows, one row, and some that are shared by a slot."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = [(64, 300), (513, 67), (70, 9), (5000,), (3, 5, 40), (33, 1500), (17,), (130, 128)]
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.randn(shape, generator=generator).to(dtype).to(DEVICE)) for shape in shapes]
        )

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 + step)
        total = torch.zeros((), device=DEVICE)
        for weight in self.weights:
            total = total + (weight.float() * torch.randn(weight.shape, generator=generator).to(DEVICE)).pow(2).sum()
        return total


def step_with(optimizer: Any, net: Net, step: int) -> None:
    net.loss(step).backward()
    optimizer.step()
    optimizer.zero_grad()


def parts(optimizer: Any, net: Net) -> list[Tensor]:
    """Everything that a step leaves, on the CPU."""
    optimizer.synchronize()
    found: list[Tensor] = []
    for weight in net.weights:
        found.append(weight.detach().cpu())
        for key, value in sorted(optimizer.state[weight].items()):
            found.append(value.cpu() if isinstance(value, Tensor) else torch.tensor(value))
            assert key == "step" or not isinstance(value, Tensor) or value.device.type in ("cpu", DEVICE)
    return found


def _raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


def assert_same(left: Any, left_net: Net, right: Any, right_net: Net) -> None:
    one, other = parts(left, left_net), parts(right, right_net)
    assert len(one) == len(other)
    for index, (a, b) in enumerate(zip(one, other)):
        assert a.dtype == b.dtype and torch.equal(_raw(a), _raw(b)), index


def pair(maker: str = "adamw", dtype: torch.dtype = torch.bfloat16, **options: Any) -> tuple[Any, Net, Any, Net]:
    """A resident optimizer and an offloaded one, with equal models."""
    nets = Net(dtype), Net(dtype)
    resident = MAKERS[maker](nets[0].weights, **options)
    return resident, nets[0], MAKERS[maker](nets[1].weights, offload="states", offload_buffer=SMALL, **options), nets[1]


@pytest.mark.parametrize("maker", MAKERS)
def test_every_optimizer_leaves_the_resident_bits(maker: str) -> None:
    resident, net, offloaded, other = pair(maker)
    for step in range(4):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_format_leaves_the_resident_bits(form: str, dtype: torch.dtype) -> None:
    resident, net, offloaded, other = pair("adamw", dtype, min_quantized_numel=0, **FORMATS[form])
    for step in range(3):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


@pytest.mark.parametrize("calls_step", [True, False])
def test_gradient_release_leaves_the_resident_bits(calls_step: bool) -> None:
    resident, net, offloaded, other = pair()
    with enable_gradient_release(other, offloaded):
        for step in range(5):
            step_with(resident, net, step)
            other.loss(step).backward()
            if calls_step:
                offloaded.step()
                offloaded.zero_grad()
    assert_same(resident, net, offloaded, other)


def test_release_brings_states_up_ahead_once_the_order_is_known() -> None:
    _, _, offloaded, net = pair()
    fetched = []
    with enable_gradient_release(net, offloaded):
        for step in range(6):
            before = _copied(offloaded)
            net.loss(step).backward()
            offloaded.step()
            fetched.append(_copied(offloaded)[5] - before[5])
    # The first pass steps each parameter with a ring of its own; the second makes the ring of all.
    assert fetched[2:] == [0, 0, 0, 0]
    assert _copied(offloaded)[4] > 0


def _copied(optimizer: Any) -> list[int]:
    copied: list[int] = _ops.store.copied(optimizer._store.records.handle)
    return copied


def test_parameters_that_sit_out_and_come_back() -> None:
    resident, net, offloaded, other = pair()
    for step in range(6):
        for one in (net, other):
            for index, weight in enumerate(one.weights):
                weight.requires_grad_(step % 2 == 0 or index not in (1, 3, 6))
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


def test_release_with_parameters_that_sit_out() -> None:
    resident, net, offloaded, other = pair()
    with enable_gradient_release(other, offloaded):
        for step in range(6):
            for one in (net, other):
                for index, weight in enumerate(one.weights):
                    weight.requires_grad_(step in (0, 3) or index not in (0, 3, 6))
            step_with(resident, net, step)
            other.loss(step).backward()
            offloaded.step()
    assert_same(resident, net, offloaded, other)


def test_groups_of_their_own() -> None:
    nets = Net(), Net()
    resident = FlashAdamW(nets[0].weights)
    halves = [{"params": list(nets[1].weights)[:4], "offload": "states"}, {"params": list(nets[1].weights)[4:]}]
    mixed = FlashAdamW(halves, offload_buffer=SMALL)
    for step in range(3):
        step_with(resident, nets[0], step)
        step_with(mixed, nets[1], step)
    assert_same(resident, nets[0], mixed, nets[1])
    on_host = [_is_on_host(mixed.state[weight]["exp_avg_sq_scale"]) for weight in list(nets[1].weights)[:2]]
    assert on_host == [True, True] and not _is_on_host(mixed.state[nets[1].weights[5]]["exp_avg_sq_codes"])


def _is_on_host(tensor: Tensor) -> bool:
    """In the memory of offloaded states: a storage that torch cannot resize, of just this tensor."""
    return tensor.device.type == "cpu" and not tensor.untyped_storage().resizable()


def test_an_overflow_leaves_every_byte() -> None:
    resident, net, offloaded, other = pair()
    step_with(resident, net, 0)
    step_with(offloaded, other, 0)
    for optimizer, one in ((resident, net), (offloaded, other)):
        one.loss(1).backward()
        optimizer.found_inf = torch.ones(1, device=DEVICE)
        optimizer.grad_scale = torch.full((1,), 2.0, device=DEVICE)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        optimizer.zero_grad()
    assert_same(resident, net, offloaded, other)
    for step in (2, 3):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


def test_clipping_by_the_norm_of_all() -> None:
    resident, net, offloaded, other = pair()
    for step in range(3):
        norms = []
        for optimizer, one in ((resident, net), (offloaded, other)):
            one.loss(step).backward()
            norms.append(optimizer.clip_grad_norm_(1.0).cpu())
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(norms[0], norms[1])
    assert_same(resident, net, offloaded, other)


def test_capturable_counts_on_the_device() -> None:
    resident, net, offloaded, other = pair(capturable=True)
    for step in range(3):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


def test_states_move_in_mid_run_and_their_memory_is_free() -> None:
    gc.collect()
    free = _offload.host_memory()
    resident, net, moving, other = pair()
    for step in range(7):
        if step:
            moving.to(states="device" if step % 2 else "host")
            gc.collect()
            held = _offload.host_memory() - free
            assert (held == 0) == bool(step % 2), step
        step_with(resident, net, step)
        step_with(moving, other, step)
    assert_same(resident, net, moving, other)
    del moving, other, resident, net
    gc.collect()
    assert _offload.host_memory() == free


def test_host_memory_is_exactly_what_states_take() -> None:
    gc.collect()
    free = _offload.host_memory()
    _, _, offloaded, net = pair()
    step_with(offloaded, net, 0)
    arrays = [value for weight in net.weights for key, value in offloaded.state[weight].items() if key != "step"]
    wanted = sum((array.numel() * array.element_size() + 255) // 256 * 256 for array in arrays)
    assert _offload.host_memory() - free == (wanted + 4095) // 4096 * 4096
    starts = sorted(array.data_ptr() for array in arrays)
    assert starts[-1] - starts[0] < wanted  # in one stretch


def test_the_plan_of_8b_fits_26_gb() -> None:
    """Llama-3.1-8B's shape, by arithmetic: what host_states() would ask for, with its gaps of up to 255 bytes."""
    dim, ffn, kv, vocab = 4096, 14336, 1024, 128256
    block = [(dim, dim)] * 2 + [(kv, dim)] * 2 + [(ffn, dim)] * 2 + [(dim, ffn)] + [(dim,)] * 2
    shapes = block * 32 + [(vocab, dim)] * 2 + [(dim,)]
    count = sum(torch.Size(shape).numel() for shape in shapes)
    assert count == 8_030_261_248
    states = gradients = 0
    for shape in shapes:
        numel = torch.Size(shape).numel()
        arrays = [numel, numel // 16, numel, numel // 16, numel]  # codes and scales of two slots, corrections
        states += sum((size + 255) // 256 * 256 for size in arrays)
        gradients += (2 * numel + 255) // 256 * 256
    assert states / count == pytest.approx(3.125, abs=1e-3)
    assert states < 26e9 and states + gradients < 42e9


@pytest.mark.parametrize("from_offloaded", [True, False])
def test_checkpoints_load_into_each_other(from_offloaded: bool) -> None:
    resident, net, offloaded, other = pair()
    for step in range(3):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in (resident, offloaded)]
    assert _bytes_of(saved[0]) == _bytes_of(saved[1])
    file = io.BytesIO()
    torch.save(saved[1 if from_offloaded else 0], file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    target, target_net = (resident, net) if from_offloaded else (offloaded, other)
    step_with(target, target_net, 77)  # goes another way, and is taken back
    for mine, theirs in zip(target_net.weights, (other if from_offloaded else net).weights):
        mine.data.copy_(theirs.data)
    target.load_state_dict(loaded)
    for step in range(3, 6):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


def _bytes_of(value: Any) -> Any:
    """A state dict as what can be compared, wherever tensors are."""
    if isinstance(value, Tensor):
        return (value.dtype, tuple(value.shape), _raw(value.detach().cpu()).numpy().tobytes())
    if isinstance(value, dict):
        return {key: _bytes_of(one) for key, one in value.items() if "checksums" not in str(key)}
    if isinstance(value, (list, tuple)):
        return [_bytes_of(one) for one in value]
    return value


def test_a_state_dict_waits_for_copies_on_their_way() -> None:
    resident, net, offloaded, other = pair()
    with enable_gradient_release(other, offloaded):
        for step in range(3):
            step_with(resident, net, step)
            other.loss(step).backward()
            assert _bytes_of(offloaded.state_dict()["state"]) == _bytes_of(resident.state_dict()["state"]), step
            offloaded.step()


def test_what_is_written_to_states_between_steps_is_read() -> None:
    resident, net, offloaded, other = pair()
    for step in range(5):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
        offloaded.synchronize()
        for optimizer, one in ((resident, net), (offloaded, other)):
            state = optimizer.state[one.weights[step]]
            state["exp_avg_codes" if "exp_avg_codes" in state else "exp_avg"].zero_()
    assert_same(resident, net, offloaded, other)


def test_copies_and_pickles_go_on() -> None:
    resident, net, offloaded, other = pair()
    step_with(resident, net, 0)
    step_with(offloaded, other, 0)
    twin_net, twin = copy.deepcopy((other, offloaded))
    for step in (1, 2):
        step_with(resident, net, step)
        step_with(twin, twin_net, step)
    assert_same(resident, net, twin, twin_net)
    assert _is_on_host(twin.state[twin_net.weights[0]]["exp_avg_codes"])


def test_weights_in_fp32_and_loads_of_the_model() -> None:
    resident, net, offloaded, other = pair()
    for step in range(2):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    one, two = resident.get_fp32_model_state_dict(net), offloaded.get_fp32_model_state_dict(other)
    assert all(torch.equal(one[key], two[key]) for key in one)
    changed = {key: value * 1.5 for key, value in one.items()}
    resident.set_fp32_model_state_dict(net, changed)
    offloaded.set_fp32_model_state_dict(other, changed)
    step_with(resident, net, 5)
    step_with(offloaded, other, 5)
    net.load_state_dict({key: value.to(torch.bfloat16) for key, value in changed.items()})
    other.load_state_dict({key: value.to(torch.bfloat16) for key, value in changed.items()})
    step_with(resident, net, 6)
    step_with(offloaded, other, 6)
    assert_same(resident, net, offloaded, other)


def test_a_state_that_is_taken_away_begins_anew() -> None:
    resident, net, offloaded, other = pair()
    for step in range(4):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
        for optimizer, one in ((resident, net), (offloaded, other)):
            del optimizer.state[one.weights[step]]
    step_with(resident, net, 9)
    step_with(offloaded, other, 9)
    assert_same(resident, net, offloaded, other)


def test_parameters_in_another_order_of_memory() -> None:
    resident, net, offloaded, other = pair()
    for one in (net, other):
        one.weights[0].data = one.weights[0].data.t().contiguous().t()
    for step in range(3):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
    assert_same(resident, net, offloaded, other)


def test_a_parameter_that_moves() -> None:
    resident, net, offloaded, other = pair()
    for step in range(4):
        step_with(resident, net, step)
        step_with(offloaded, other, step)
        for one in (net, other):
            one.weights[5].data = one.weights[5].data.clone()
    assert_same(resident, net, offloaded, other)


@pytest.mark.parametrize("offload", [None, "states"])
def test_exact_clipping_under_release_is_that_of_two_passes(offload: str | None) -> None:
    nets = Net(), Net()
    two_pass = FlashAdamW(nets[0].weights)
    exact = FlashAdamW(nets[1].weights, offload=offload, offload_buffer=SMALL)
    first = enable_gradient_release(nets[0], two_pass, clip="two_pass", max_norm=3.0)
    second = enable_gradient_release(nets[1], exact, clip="exact", max_norm=3.0)
    for step in range(4):
        loss = nets[0].loss(step)
        with first.measure_norm():
            loss.backward(retain_graph=True)
        loss.backward()
        two_pass.step()
        nets[1].loss(step).backward()
        assert all(weight.grad is None for weight in nets[1].weights)
        assert torch.equal(exact.clip_grad_norm_(3.0), first.grad_norm)
        exact.step()
        exact.zero_grad()
        assert first.grad_norm is not None and second.grad_norm is not None
        assert torch.equal(first.grad_norm, second.grad_norm) and float(first.grad_norm) > 3.0
    assert_same(two_pass, nets[0], exact, nets[1])


def test_exact_clipping_adds_up_what_several_backward_passes_give() -> None:
    nets = Net(), Net()
    plain = FlashAdamW(nets[0].weights)
    exact = FlashAdamW(nets[1].weights, offload="states", offload_buffer=SMALL)
    enable_gradient_release(nets[1], exact, clip="exact", max_norm=1e9)  # a coefficient of 1
    for step in range(3):
        for part in range(3):
            nets[0].loss(10 * step + part).backward()
            nets[1].loss(10 * step + part).backward()
        plain.step()
        plain.zero_grad()
        exact.step()
    assert_same(plain, nets[0], exact, nets[1])


def test_gradients_that_wait_are_forgotten_or_given_back() -> None:
    net = Net()
    optimizer = FlashAdamW(net.weights, offload="states", offload_buffer=SMALL)
    handle = enable_gradient_release(net, optimizer, clip="exact", max_norm=1.0)
    before = [weight.detach().clone() for weight in net.weights]
    net.loss(0).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.weights))
    net.loss(0).backward()
    handle.remove()
    other = Net()
    other.loss(0).backward()
    for mine, theirs in zip(net.weights, other.weights):
        assert mine.grad is not None and theirs.grad is not None and torch.equal(mine.grad, theirs.grad)


def test_an_exact_step_that_fails_goes_on_where_it_was() -> None:
    nets = Net(), Net()
    optimizers = [FlashAdamW(net.weights, offload="states", offload_buffer=SMALL) for net in nets]
    for net, optimizer in zip(nets, optimizers):
        enable_gradient_release(net, optimizer, clip="exact", max_norm=1.0)
        net.loss(0).backward()
        optimizer.step()
        net.loss(1).backward()
    optimizers[0].step()
    failing = optimizers[1]._stepper
    calls = []

    def step_param(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        type(failing).step_param(failing, *arguments)

    failing.step_param = step_param
    with pytest.raises(KeyboardInterrupt):
        optimizers[1].step()
    counts = sorted(optimizers[1].state[weight]["step"] for weight in nets[1].weights)
    assert counts == [1] * 5 + [2] * 3
    del failing.step_param
    optimizers[1].step()
    assert_same(optimizers[0], nets[0], optimizers[1], nets[1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"offload": "disk"}, "offload = 'disk' is not allowed; allowed are None, 'states'"),
        ({"offload": True}, "offload = True is not allowed"),
        ({"offload": "states", "check_numerics": True}, "offload = 'states' with check_numerics = True"),
        ({"offload": "states", "offload_buffer": 100}, "offload_buffer = 100 is not allowed"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlashAdamW(Net().weights, **options)


def test_an_option_of_the_optimizer_is_no_groups() -> None:
    with pytest.raises(ValueError, match="offload_pin is the whole optimizer's"):
        FlashAdamW([{"params": list(Net().weights), "offload_pin": False}])


def test_parameters_on_the_cpu_are_refused_before_anything_changes() -> None:
    _offload.simulate(False)
    net = nn.Linear(64, 64)
    before = net.weight.detach().clone()
    optimizer = FlashAdamW(net.parameters(), offload="states")
    net(torch.ones(1, 64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"is on cpu, with offload = 'states'.*Move the model to a CUDA device"):
        optimizer.step()
    assert torch.equal(net.weight, before) and not optimizer.state
