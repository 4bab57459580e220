"""Norms, scalers and counts over all processes: clipping without waiting for the device, overflows, telemetry."""

from __future__ import annotations

import functools
import math
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
from layouts import ALL, MAKE, SOME, Bag
from processes import device_type, run, worlds
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashoptim_native
from flashoptim_native import describe_shard

BF16 = torch.bfloat16


# Norms and scalers


def clipped(rank: int, world: int, layout: str, by_torch: bool) -> int:
    """The global norm; replicas count once; the same on every rank and in every run."""
    norms, results = [], []
    names = ALL if layout == "fsdp" else SOME
    for _ in range(2):
        is_both = layout == "fsdp-tp"
        model = layouts.parallel_mlp(world, True) if is_both else layouts.lay_out(Bag(names), layout, world)
        optimizer = MAKE["adamw"](model.named_parameters())
        layouts.set_gradients(model, 0)
        if by_torch:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        else:
            norm = optimizer.clip_grad_norm_(0.25)
            assert type(norm) is torch.Tensor
        optimizer.step()
        norms.append(norm)
        results.append(layouts.whole_of(model, optimizer))
    whole = layouts.MLP().to(BF16) if layout == "fsdp-tp" else Bag(names)
    layouts.set_gradients(whole, 0)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in whole.parameters()))
    assert abs(float(norms[0]) - expected) <= (1e-2 if by_torch else 1e-6) * expected, (float(norms[0]), expected)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, [float(norm) for norm in norms])
    assert len({value for both in everyone for value in both}) == 1
    for parameter in whole.parameters():  # as the sharded ones were clipped
        if device_type() == "cpu":
            parameter.grad.mul_(min(1.0, 0.25 / (float(norms[0]) + 1e-6)))
    return layouts.compare(results[0], results[1], "again") if rank == 0 else 0


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "replicate", "tp0", "fsdp-tp"])
def test_clip_grad_norm_is_global(request, layout):
    run(request, worlds(2 if layout in ("replicate", "tp0") else 4)[-1], clipped, layout, False)


def test_torch_clip_grad_norm(request):
    run(request, worlds(3)[-1], clipped, "fsdp", True)


class _NoAnswers(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers read out of tensors, and copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "unique", "masked_select"):
            self.found.append(name)
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in (result, *args) if isinstance(one, torch.Tensor)]
        if name in ("_to_copy", "copy_") and tensors[0].device.type == "cpu" != tensors[-1].device.type:
            self.found.append(f"{name} to the host")
        return result


def clipped_unasked(rank: int, world: int, layout: str) -> tuple[list[str], int, list[str]]:
    """What clipping, and the step behind it, read on the host; and that the same look finds an ``item()``."""
    model = layouts.lay_out(Bag(SOME), layout, world)
    optimizer = MAKE["adamw"](model.named_parameters())
    for step in range(2):  # the first makes states
        layouts.set_gradients(model, step)
        # Where there is a device, torch raises at what waits for it.
        if step == 1 and device_type() == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        with _NoAnswers() as mode:
            norm = optimizer.clip_grad_norm_(0.25)
            optimizer.step()
    if device_type() == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    with _NoAnswers() as other:
        float(norm)
    return mode.found, mode.seen, other.found


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "replicate"])
def test_clip_grad_norm_does_not_wait_for_the_device(request, layout):
    for found, seen, control in run(request, worlds(2)[-1], clipped_unasked, layout):
        assert found == [] and seen > 5 and control != []


def scaled(rank: int, world: int, layout: str) -> int:
    """An infinity on the last rank's shard alone makes all skip; steps without one equal those without a scaler."""
    model = layouts.lay_out(Bag(SOME, torch.float16), layout, world)
    optimizer = MAKE["adamw"](model.named_parameters())
    scaler = torch.amp.GradScaler(device_type(), init_scale=256.0, growth_interval=1000)
    scaler.scale(torch.ones((), device=device_type()))  # makes the scale
    before = layouts.whole_of(model, optimizer)
    layouts.set_gradients(model, 0)
    largest = max(model.parameters(), key=lambda p: p._local_tensor.numel())
    shards = layouts.two_dimensional(world)[1] if layout == "hsdp" else world
    if rank % shards == shards - 1:  # replicas hold the same
        largest.grad._local_tensor.view(-1)[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    compared = layouts.compare({k: v for k, v in layouts.whole_of(model, optimizer).items() if "/" not in k},
                               before, "skipped")  # fmt: skip
    assert scaler.get_scale() == 128.0
    for step in range(3):
        layouts.set_gradients(model, step)
        for param in model.parameters():
            param.grad._local_tensor.mul_(128.0)
        scaler.step(optimizer)
        scaler.update()
    if rank != 0:
        layouts.whole_of(model, optimizer)
        return 0
    got = {k: v for k, v in layouts.whole_of(model, optimizer).items()}
    want = layouts.bag_alone(SOME, "adamw", {}, torch.float16, 3)
    return compared + layouts.compare(got, want, "with a scaler")


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
def test_an_infinity_on_one_rank_makes_all_skip(request, layout):
    run(request, worlds(2 if layout == "fsdp" else 4)[-1], scaled, layout)


def found_on_one_rank(rank: int, world: int) -> int:
    """Somebody who sets found_inf himself, on one rank."""
    model = layouts.lay_out(Bag(SOME), "fsdp", world)
    optimizer = MAKE["adamw"](model.named_parameters())
    before = layouts.whole_of(model, optimizer)
    layouts.set_gradients(model, 0)
    optimizer.found_inf = torch.full((), float(rank == world - 1), device=device_type())
    optimizer.step()
    got = {key: value for key, value in layouts.whole_of(model, optimizer).items() if "/" not in key}
    return layouts.compare(got, before, "found_inf") if rank == 0 else 0


def test_found_inf_on_one_rank(request):
    run(request, worlds(3)[-1], found_on_one_rank)


# Numerics


def numerics(rank: int, world: int) -> tuple[bool, str]:
    model = layouts.lay_out(Bag(("even", "few_rows")), "fsdp", world)
    with torch.no_grad():  # the largest weight is on one rank alone
        if rank == world - 1:
            next(iter(model.parameters()))._local_tensor[-1, -1] = 64.0
    make = functools.partial(MAKE["adamw"], state_codec="paper", check_numerics=True)
    optimizer = make(model.named_parameters(), lr=1e-4)
    layouts.set_gradients(model, 0)
    try:
        optimizer.step()
    except flashoptim_native.NumericsError as error:
        return optimizer.numerics_report().is_local, str(error)
    return optimizer.numerics_report().is_local, ""


def test_check_numerics_agrees_and_says_what_is_local(request):
    for is_local, said in run(request, worlds(3)[-1], numerics):
        assert is_local and "64" in said and "even" in said
    assert not MAKE["adamw"]([nn.Parameter(torch.ones(2))]).numerics_report().is_local


def reported(rank: int, world: int, layout: str) -> tuple[Any, Any, Any, Any]:
    """Reports of this process and of all, and of one process that has the whole; and what that counted."""
    reports = []
    for is_alone in (False, True):
        model = Bag(("even", "few_rows", "bias", "experts"))
        model = model if is_alone else layouts.lay_out(model, layout, world)
        optimizer = MAKE["adamw"](model.named_parameters(), check_numerics=True)
        for step in range(2):
            layouts.set_gradients(model, step)
            for name, param in model.named_parameters():
                whole = layouts.gradient(layouts.clean(name), tuple(param.shape), step, param.dtype)
                whole.view(-1)[-5:] = math.nan  # on one rank alone
                param.grad = layouts.as_placed(whole, param)
            optimizer.step()
        reports.append(optimizer.numerics_report())
        if not is_alone:
            reports.append(optimizer.numerics_report(reduce=True))
    return (*reports, world)


@pytest.mark.parametrize(("layout", "most"), [("fsdp", 3), ("hsdp", 4), ("fsdp-tp", 4), ("replicate", 2)])
def test_reduced_report_is_that_of_one_process(request, layout, most):
    results = run(request, worlds(most)[-1], reported, layout)
    for local, all_together, alone, _ in results:
        assert all_together == alone and not alone.is_local and local.is_local
        assert alone.nonfinite_gradients == 2 * 4 * 5 and alone.sampled_updates > 0
    # Replicas count once; shards add up.
    if layout == "fsdp":
        assert sum(local.sampled_updates for local, *_ in results) == results[0][2].sampled_updates


def mixed(rank: int, world: int) -> tuple[int, dict[str, int]]:
    """A sharded and a replicated parameter in one optimizer."""
    mesh = dist.device_mesh.init_device_mesh(device_type(), (world,))
    params = [(name, nn.Parameter(distribute_tensor(torch.ones(96, 64, dtype=BF16), mesh, [placement])))
              for name, placement in (("cut", Shard(0)), ("whole", Replicate()))]  # fmt: skip
    optimizer = MAKE["adamw"](params, check_numerics=True)
    for _, param in params:
        grad = torch.ones(96, 64, dtype=BF16)
        grad[:3] = math.nan
        param.grad = layouts.as_placed(grad, param)
    optimizer.step()
    report = optimizer.numerics_report(reduce=True)
    return report.nonfinite_gradients, {k: one.nonfinite_gradients for k, one in report.parameters.items()}


def test_reduced_report_of_parameters_of_different_placements(request):
    world = worlds(2)[-1]
    for total, each in run(request, world, mixed):
        assert each == {"parameter 'cut'": 192, "parameter 'whole'": 192}
        assert total == 192 + world * 192  # counted by process: the replicas, too


def test_reduced_report_says_what_is_allowed():
    piece = nn.Parameter(torch.ones(96))
    describe_shard(piece, (64, 96), 96)
    optimizer = flashoptim_native.FlashAdamW([("w", piece)])
    assert optimizer.numerics_report().is_local
    with pytest.raises(RuntimeError, match="'w' is a slice of a flat buffer"):
        optimizer.numerics_report(reduce=True)
    with pytest.raises(TypeError, match="reduce = 1"):
        optimizer.numerics_report(reduce=1)
    plain = flashoptim_native.FlashAdamW([nn.Parameter(torch.ones(2))])
    assert plain.numerics_report(reduce=True) == plain.numerics_report()
