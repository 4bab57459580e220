"""What training needs beside steps: gradient release, fp32 weights, casts, other ways to shard."""

from __future__ import annotations

from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import MAKE, SOME, Bag
from processes import device_type, run, worlds
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import flashoptim_native
from flashoptim_native import cast_model, describe_shard, enable_gradient_release

BF16, FP32 = torch.bfloat16, torch.float32


# Gradient release


def _input(rank: int, step: int) -> torch.Tensor:
    return torch.tensor(0.5 + 0.25 * rank + 0.125 * step, device=device_type())


def released(rank: int, world: int, layout: str, micro_batches: int, offload: bool) -> int:
    """Against the same training without release."""
    results, most = [], 0
    for releases in (True, False):
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=device_type() == "cuda")} if offload else {}
        model = layouts.lay_out(Bag(SOME), layout, world, **options)
        optimizer = MAKE["adamw"](model.named_parameters())
        params = list(model.parameters())
        handle = None
        if releases:

            def look(param: Any, group: Any, params: Any = params) -> None:
                nonlocal most
                most = max(most, sum(p.grad is not None for p in params))

            handle = enable_gradient_release(model, optimizer, pre_step=look)
        for step in range(4):
            for micro in range(micro_batches):
                if "fsdp" in layout or layout == "hsdp":
                    model.set_requires_gradient_sync(micro == micro_batches - 1)
                model(_input(rank, step * micro_batches + micro)).backward()
            if releases:
                assert all(p.grad is None for p in params)
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        results.append(layouts.whole_of(model, optimizer))
    # Those of one fully_shard, not of the model.
    assert most == 1
    return layouts.compare(*results, "release against none") if rank == 0 else 0


@pytest.mark.parametrize(
    ("layout", "most", "micro_batches", "offload"),
    [
        ("fsdp", 2, 1, False),
        ("fsdp", 2, 3, False),
        ("hsdp", 4, 1, False),
        ("fsdp-tp", 4, 1, False),
        ("tp0", 2, 1, False),
        ("tp0", 1, 1, False),
        ("fsdp", 2, 1, True),
    ],
    ids=["fsdp", "accumulation", "hsdp", "fsdp-x-tensor-parallel", "tensor-parallel", "mesh-of-one", "offload"],
)
def test_gradient_release_of_sharded_parameters(request, layout, most, micro_batches, offload):
    run(request, worlds(most)[-1], released, layout, micro_batches, offload)


def release_refused(rank: int, world: int) -> list[str]:
    said = []
    model = Bag(("bias",)).to(device_type())
    ddp = nn.parallel.DistributedDataParallel(model)
    for given in (ddp, model):
        try:
            enable_gradient_release(given, MAKE["adamw"](model.parameters()))
        except (TypeError, RuntimeError) as error:
            said.append(str(error))
    return said


def test_gradient_release_of_ddp_points_to_fsdp2(request):
    world = worlds(2)[-1]
    for said in run(request, world, release_refused):
        assert "DistributedDataParallel" in said[0] and "fully_shard" in said[0]
        assert world == 1 or (f"{world} processes" in said[1] and "fully_shard" in said[1])


# fp32 weights and casts


def fp32_weights(rank: int, world: int, layout: str, path: str) -> int:
    names = ("even", "uneven", "few_rows", "bias", "experts")
    model = layouts.lay_out(Bag(names), layout, world)
    optimizer = MAKE["adamw"](model.named_parameters())
    layouts.steps(model, optimizer, 0, 3)
    alone, alone_optimizer = layouts.alone(lambda: Bag(names), MAKE["adamw"], 3)
    want = alone_optimizer.get_fp32_model_state_dict(alone)
    sharded = optimizer.get_fp32_model_state_dict(model)
    got = {key: layouts.gathered(value) for key, value in sharded.items()}
    compared = layouts.compare(got, want, "sharded")
    whole = optimizer.get_fp32_model_state_dict(model, full_state_dict=True)
    if rank == 0:
        compared += layouts.compare(whole, want, "gathered")
    else:
        assert whole == {}
    dcp.save({"fp32": sharded}, checkpoint_id=path)
    for how in ("sharded", "whole", "broadcast", "checkpoint"):
        other = layouts.lay_out(Bag(names), layout, world)
        for param in other.parameters():
            param.detach().zero_()
        its = MAKE["adamw"](other.named_parameters())
        if how == "sharded":
            its.set_fp32_model_state_dict(other, sharded, strict=True)
        elif how == "whole":
            its.set_fp32_model_state_dict(other, want, strict=True)
        elif how == "broadcast":
            its.set_fp32_model_state_dict(other, whole, strict=True, broadcast_from_rank0=True)
        else:
            held = {"fp32": its.get_fp32_model_state_dict(other)}
            dcp.load(held, checkpoint_id=path)
            its.set_fp32_model_state_dict(other, held["fp32"])
        again = {key: layouts.gathered(value) for key, value in its.get_fp32_model_state_dict(other).items()}
        compared += layouts.compare(again, want, how)
    return compared if rank == 0 else 0


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp0"])
def test_fp32_model_state_dict(request, tmp_path, layout):
    run(request, worlds(4 if layout == "hsdp" else 3)[-1], fp32_weights, layout, str(tmp_path / "checkpoint"))


def cast(rank: int, world: int, when: str) -> int:
    model = layouts.MLP().to(device_type())
    if when == "before":
        cast_model(model, BF16)
    layouts.shard(model, dist.device_mesh.init_device_mesh(device_type(), (world,)))
    if when == "after":
        before = list(model.parameters())
        cast_model(model, BF16)
        assert all(a is b for a, b in zip(model.parameters(), before))
    optimizer = MAKE["adamw"](model.named_parameters())
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        x = torch.randn(8, 128, generator=generator).to(device_type(), BF16)
        assert model(x).dtype == BF16
        model(x).square().mean().backward()
        assert all(p.grad.dtype == BF16 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    try:
        cast_model(model, FP32)
    except RuntimeError as error:
        assert "forward" in str(error)
    else:
        raise AssertionError("cast after the first forward pass")
    whole = layouts.whole_of(model, optimizer)
    reference = layouts.whole_of(model, optimizer) if when == "before" else None
    return layouts.compare(whole, reference, "cast") if reference is not None and rank == 0 else 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_cast_model_before_or_after_fully_shard(request, when):
    run(request, worlds(2)[-1], cast, when)


def cast_agrees(rank: int, world: int) -> int:
    """Both orders give the same weights after the same training."""
    results = []
    for when in ("before", "after"):
        model = layouts.MLP().to(device_type())
        if when == "before":
            cast_model(model, BF16)
        layouts.shard(model, dist.device_mesh.init_device_mesh(device_type(), (world,)))
        if when == "after":
            cast_model(model, BF16)
        optimizer = MAKE["adamw"](model.named_parameters())
        for step in range(3):
            x = torch.full((4, 128), 0.1 * (step + 1), dtype=BF16, device=device_type())
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layouts.whole_of(model, optimizer))
    return layouts.compare(*results, "cast before against after") if rank == 0 else 0


def test_both_orders_of_cast_model_agree(request):
    run(request, worlds(2)[-1], cast_agrees)


# FSDP1, ZeRO, flat shards


def fsdp1(rank: int, world: int) -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    device = torch.device(device_type(), rank) if device_type() == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    model = FSDP(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), device_id=device, use_orig_params=True)
    optimizer = flashoptim_native.FlashAdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (model(torch.ones(4, 64, device=device)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    said = []
    for ask in (lambda: FSDP.optim_state_dict(model, optimizer), lambda: optimizer.get_fp32_model_state_dict(model)):
        try:
            ask()
        except (RuntimeError, TypeError) as error:
            said.append(str(error))
    own = optimizer.state_dict()
    optimizer.load_state_dict(own)
    return said


def test_fsdp1_trains_and_names_fsdp2(request):
    for said in run(request, worlds(2)[-1], fsdp1):
        assert len(said) == 2 and all("FSDP2" in one and "fully_shard" in one for one in said)


def zero_redundancy(rank: int, world: int) -> int:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = layouts.lay_out(Bag(SOME), "ddp", world)
    zero = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=flashoptim_native.FlashAdamW, lr=1e-3, weight_decay=0.1
    )
    layouts.steps(model, zero, 0, 4)
    got = {layouts.clean(name): layouts.gathered(p.detach()) for name, p in model.named_parameters()}
    want = layouts.bag_alone(SOME, "adamw", {}, BF16, 4)
    compared = layouts.compare(got, {key: value for key, value in want.items() if "/" not in key}, "ZeRO")
    zero.consolidate_state_dict(to=0)
    if rank == 0:
        alone = Bag(SOME)
        optimizer = MAKE["adamw"](alone.named_parameters())
        optimizer.load_state_dict(zero.state_dict())
        states = {key: value for key, value in layouts.whole_of(alone, optimizer).items() if "/" in key}
        compared += layouts.compare(states, {k: v for k, v in want.items() if "/" in k}, "consolidated")
    dist.barrier()
    return compared if rank == 0 else 0


def test_zero_redundancy_optimizer(request):
    run(request, worlds(2)[-1], zero_redundancy)


def flat_shards(rank: int, world: int, options: dict[str, Any], dtype: torch.dtype) -> int:
    """Parameters end to end in one buffer, which is cut into equal stretches, as Megatron-LM does; fp32 gradients."""
    names = ("even", "uneven", "bias", "long_bias") + (() if options.get("quantize", True) else ("odd_rows", "conv"))
    whole = Bag(names, dtype)
    flat = torch.cat([p.detach().reshape(-1) for p in whole.parameters()]).to(device_type())
    # Cuts at multiples of 64 elements, as its buffers are padded.
    each = -(-flat.numel() // world // 64) * 64
    begin, end = min(rank * each, flat.numel()), min((rank + 1) * each, flat.numel())
    pieces, first = [], 0
    for name, param in whole.named_parameters():
        a, b = max(begin, first), min(end, first + param.numel())
        piece = nn.Parameter(flat[a : max(a, b)].clone())
        piece.grad_dtype = FP32
        at = max(0, a - first) if b > a else 0
        pieces.append((name, describe_shard(piece, param.shape, at), at, param))
        first += param.numel()
    optimizer = MAKE["adamw"]([(name, piece) for name, piece, _, _ in pieces], **options)
    reference = MAKE["adamw"](whole.named_parameters(), **options)
    for step in range(4):
        for name, piece, at, param in pieces:
            main_grad = layouts.gradient(name, tuple(param.shape), step, FP32)
            param.grad_dtype = FP32
            param.grad = main_grad
            piece.grad = main_grad.reshape(-1)[at : at + piece.numel()].to(device_type())
        optimizer.step()
        reference.step()
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    compared = 0
    for name, piece, at, param in pieces:
        part = slice(at, at + piece.numel())
        assert layouts.same_bits(piece.detach().cpu(), param.detach().reshape(-1)[part]), name
        state, want = optimizer.state[piece], reference.state[param]
        assert state.keys() == want.keys(), (name, state.keys(), want.keys())
        for key, value in state.items():
            if key == "step":
                continue
            stretch = slice(at // 32, -(-(at + piece.numel()) // 32)) if key.endswith("_scale") else part
            if piece.numel() > 0:
                assert layouts.same_bits(value.cpu(), want[key].reshape(-1)[stretch]), f"{key} of {name}"
            compared += 1
    return compared


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("options", [{}, {"quantize": False}], ids=["8-bit", "fp32-states"])
def test_flat_shards(request, options, dtype):
    run(request, worlds(3)[-1], flat_shards, options, dtype)


def test_describe_shard_says_what_is_allowed():
    with pytest.raises(ValueError, match="one contiguous dimension"):
        describe_shard(torch.ones(2, 2), (4, 4), 0)
    with pytest.raises(ValueError, match="first_element = 10 with 8 elements"):
        describe_shard(torch.ones(8), (4, 4), 10)
    with pytest.raises(TypeError, match="plain torch.Tensor"):
        describe_shard([1.0], (4, 4), 0)
    piece = nn.Parameter(torch.ones(8000))
    describe_shard(piece, (100, 100), 7)
    piece.grad = torch.ones(8000)
    optimizer = flashoptim_native.FlashAdamW([("w", piece)])
    with pytest.raises(ValueError, match=r"'w' is elements 7 to 8007 .*\"quantize\": False"):
        optimizer.step()
    assert not optimizer.state and bool((piece == 1).all())


def test_fully_shard_is_there():
    assert callable(fully_shard)
