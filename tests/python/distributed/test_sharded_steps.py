"""Sharded parameters are stepped to the bits of whole ones: every layout, optimizer, codec, width and dtype."""

from __future__ import annotations

import functools
import os
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
from layouts import ALL, MAKE, SOME, Bag
from processes import device_type, run, worlds
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

LONG = bool(os.environ.get("FLASHOPTIM_TEST_ALL"))
STEPS = 100 if LONG else 6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def given_gradients(
    rank: int, world: int, layout: str, names: tuple[str, ...], kind: str, options: dict[str, Any], dtype: torch.dtype
) -> int:
    model = layouts.lay_out(Bag(names, dtype), layout, world)
    optimizer = MAKE[kind](model.named_parameters(), **options)
    layouts.steps(model, optimizer, 0, STEPS)
    layouts.check_kinds(model, optimizer)
    got = layouts.whole_of(model, optimizer)
    if layout in ("hsdp", "ddp", "replicate"):
        layouts.replicas_agree(model, optimizer)
    if rank != 0:
        return 0
    return layouts.compare(got, layouts.bag_alone(names, kind, options, dtype, STEPS), f"{layout} of {world}")


@pytest.mark.parametrize("world", worlds(1, 2, 3, 4))
def test_fsdp2(request, world):
    run(request, world, given_gradients, "fsdp", ALL, "adamw", {}, BF16)


@pytest.mark.parametrize("world", worlds(2, 4))
def test_hsdp(request, world):
    run(request, world, given_gradients, "hsdp", ALL, "adamw", {}, BF16)


@pytest.mark.parametrize("world", worlds(2))
def test_replicated_dtensors(request, world):
    run(request, world, given_gradients, "replicate", SOME, "adamw", {}, BF16)


@pytest.mark.parametrize("world", worlds(2))
def test_ddp(request, world):
    run(request, world, given_gradients, "ddp", SOME, "adamw", {}, BF16)


FORMATS = {
    "paper": {"state_codec": "paper"},
    "32-bit": {"master_weight_bits": 32},
    "stochastic": {"master_weight_bits": None, "stochastic_rounding": True},
    "fp32-states": {"quantize": False},
    "all-quantized": {"min_quantized_numel": 0},
}
#: What of formats has no cut anywhere: small parameters that are quantized are cut at groups alone.
_CUT_AT_GROUPS = ("uneven", "few_rows", "conv", "experts")


def _cases() -> list[Any]:
    if not LONG:
        one_each = [(kind, "default", BF16) for kind in MAKE if kind != "adamw"]
        one_each += [("adamw", form, BF16) for form in FORMATS]
        one_each += [("adamw", "default", FP32), ("adamw", "default", FP16), ("lion", "paper", FP16)]
        return one_each
    return [(kind, form, dtype) for kind in MAKE for form in ("default", *FORMATS) for dtype in (BF16, FP16, FP32)]


@pytest.mark.parametrize("world", worlds(3))
@pytest.mark.parametrize(
    ("kind", "form", "dtype"), _cases(), ids=lambda value: str(value).removeprefix("torch.")
)  # fmt: skip
def test_fsdp2_formats(request, world, kind, form, dtype):
    options = {} if form == "default" else FORMATS[form]
    names = _CUT_AT_GROUPS if form == "all-quantized" else ALL
    run(request, world, given_gradients, "fsdp", names, kind, options, dtype)


# Tensor parallelism


def tensor_parallel(rank: int, world: int, with_fsdp: bool, options: dict[str, Any]) -> int:
    model = layouts.parallel_mlp(world, with_fsdp)
    optimizer = MAKE["adamw"](model.named_parameters(), **options)
    layouts.steps(model, optimizer, 0, STEPS)
    layouts.check_kinds(model, optimizer)
    got = layouts.whole_of(model, optimizer)
    if rank != 0:
        return 0
    make = functools.partial(MAKE["adamw"], **options)
    want = layouts.whole_of(*layouts.alone(lambda: layouts.MLP().to(BF16), make, STEPS))
    return layouts.compare(got, want, f"tensor parallel on {world}")


@pytest.mark.parametrize("options", [{}, {"quantize": False}, {"state_codec": "paper"}], ids=["", "fp32", "paper"])
@pytest.mark.parametrize("world", worlds(2, 3))
def test_tensor_parallel_colwise_and_rowwise(request, world, options):
    run(request, world, tensor_parallel, False, options)


@pytest.mark.parametrize("world", worlds(4))
def test_fsdp2_x_tensor_parallel(request, world):
    run(request, world, tensor_parallel, True, {})


def experts(rank: int, world: int, dimension: int, shape: tuple[int, ...], by_fsdp: bool) -> int:
    def build() -> nn.Module:
        module = nn.Module()
        generator = torch.Generator().manual_seed(2)
        module.weight = nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(BF16))
        return module

    model = build().to(device_type())
    mesh = dist.device_mesh.init_device_mesh(device_type(), (world,))
    if by_fsdp:
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda param: Shard(dimension))
    else:
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(dimension)]))
    optimizer = MAKE["adamw"](model.named_parameters())
    layouts.steps(model, optimizer, 0, STEPS)
    layouts.check_kinds(model, optimizer)
    got = layouts.whole_of(model, optimizer)
    if rank != 0:
        return 0
    return layouts.compare(got, layouts.whole_of(*layouts.alone(build, MAKE["adamw"], STEPS)), "experts")


@pytest.mark.parametrize("world", worlds(2))
@pytest.mark.parametrize(
    ("dimension", "shape", "by_fsdp"),
    [(0, (3, 64, 96), False), (1, (3, 64, 96), False), (1, (3, 5, 1056), False), (2, (3, 40, 128), False)]
    + [(0, (3, 64, 96), True), (1, (3, 64, 96), True)],
    ids=["shard0", "shard1", "shard1-uneven", "shard2", "fsdp-shard0", "fsdp-shard1"],
)
def test_experts(request, world, dimension, shape, by_fsdp):
    run(request, world, experts, dimension, shape, by_fsdp)


# A cut inside a group


def cut_inside_a_group(rank: int, world: int, options: dict[str, Any]) -> str:
    mesh = dist.device_mesh.init_device_mesh(device_type(), (world,))
    param = nn.Parameter(distribute_tensor(torch.ones(64, 80 * world, dtype=BF16), mesh, [Shard(1)]))
    optimizer = MAKE["adamw"]([("odd", param)], **options)
    param.grad = distribute_tensor(torch.ones(64, 80 * world, dtype=BF16), mesh, [Shard(1)])
    try:
        optimizer.step()
    except ValueError as error:
        assert not optimizer.state and bool((param._local_tensor == 1).all())
        return str(error)
    return ""


@pytest.mark.parametrize("world", worlds(2))
def test_cut_inside_a_group_is_refused_with_the_remedy(request, world):
    if world == 1:
        pytest.skip("a cut needs two processes")
    for message in run(request, world, cut_inside_a_group, {}):
        assert "'odd'" in message and "80" in message and '"quantize": False' in message
    assert run(request, world, cut_inside_a_group, {"quantize": False}) == ["", ""]


# Gradients of backward()


def _forward(model: nn.Module, rank: int, step: int) -> None:
    x = torch.tensor(0.5 + 0.25 * rank + 0.125 * step, device=device_type())
    model(x).backward()


def trained(rank: int, world: int, policy: str, micro_batches: int, dtype: torch.dtype) -> int:
    """Gradients come from backward(); the reference takes their whole, gathered before every step."""
    options: dict[str, Any] = {}
    if policy == "mixed":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=FP32)
    if policy == "reduced-in-fp32":
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=FP32)
    if policy == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device_type() == "cuda")
    # FSDP2 reduces in one dtype a group: two dtypes need no test here.
    model = Bag(SOME, dtype)
    frozen = "uneven.weight" if policy == "frozen" else None
    for name, param in model.named_parameters():
        param.requires_grad_(name != frozen)
    model = layouts.lay_out(model, "hsdp" if policy == "hsdp" else "fsdp", world, **options)
    optimizer = MAKE["adamw"](model.named_parameters())
    reference = Bag(SOME, dtype)
    for name, param in reference.named_parameters():
        param.requires_grad_(name != frozen)
    reference_optimizer = MAKE["adamw"](reference.named_parameters())
    for step in range(5):
        for micro in range(micro_batches):
            model.set_requires_gradient_sync(micro == micro_batches - 1)
            _forward(model, rank, step * micro_batches + micro)
        for (_, ours), (_, theirs) in zip(model.named_parameters(), reference.named_parameters()):
            theirs.grad = None if ours.grad is None else layouts.gathered(ours.grad)
        optimizer.step()
        optimizer.zero_grad()
        reference_optimizer.step()
        reference_optimizer.zero_grad()
    layouts.check_kinds(model, optimizer)
    if policy == "offload":
        for param, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, DTensor) or value._local_tensor.device.type == "cpu"
            assert param._local_tensor.device.type == "cpu"
    got = layouts.whole_of(model, optimizer)
    if frozen is not None:
        assert torch.equal(got[frozen], layouts.whole_of(Bag(SOME, dtype), optimizer)[frozen])
        assert frozen + "/step" not in got
    return layouts.compare(got, layouts.whole_of(reference, reference_optimizer), policy) if rank == 0 else 0


@pytest.mark.parametrize(
    ("policy", "micro_batches", "dtype"),
    [
        ("plain", 1, BF16),
        ("mixed", 1, FP32),
        ("reduced-in-fp32", 1, BF16),
        ("offload", 1, BF16),
        ("frozen", 1, BF16),
        ("accumulation", 3, BF16),
        ("hsdp", 2, BF16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_backward_then_step(request, policy, micro_batches, dtype):
    run(request, worlds(4)[-1] if policy == "hsdp" else worlds(2)[-1], trained, policy, micro_batches, dtype)
