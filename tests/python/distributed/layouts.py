"""Models with hard shapes, their layouts over processes, and comparisons of every bit; runs in the processes."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from processes import device_type
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import flashoptim_native
from flashoptim_native import FlashOptimizer

SHAPES = {
    "even": (96, 64),
    "uneven": (33, 160),  # 33 rows on 4 processes
    "few_rows": (3, 2080),  # none on the last of 4
    "one_row": (1, 4224),
    "odd_rows": (130, 45),  # rows of 32 and 13 elements
    "thin_rows": (515, 20),  # rows shorter than a group: one row of the whole
    "long_bias": (8195,),  # cuts fall inside a group
    "bias": (33,),
    "scalarlike": (1,),
    "small_shard": (130, 33),  # quantized as a whole, below min_quantized_numel on every process
    "conv": (34, 8, 5, 5),
    "experts": (6, 33, 64),
}
ALL = tuple(SHAPES)
SHAPES |= {  # for cuts of other dimensions than the first
    "wide": (33, 192),
    "narrow_experts": (5, 40, 128),
    "grid_experts": (4, 6, 264),
}
#: The dimension that tensor and expert parallelism cut; the first of those that are not named.
CUT = {"wide": 1, "experts": 1, "narrow_experts": 2, "grid_experts": 1}
SOME = ("uneven", "few_rows", "long_bias", "conv")

MAKE: dict[str, Callable[..., FlashOptimizer]] = {
    "adamw": functools.partial(flashoptim_native.FlashAdamW, lr=1e-3, weight_decay=0.1),
    "adam": functools.partial(flashoptim_native.FlashAdam, lr=1e-3, weight_decay=0.01),
    "sgd": functools.partial(flashoptim_native.FlashSGD, lr=1e-2, momentum=0.9, nesterov=True),
    "sgdw": functools.partial(flashoptim_native.FlashSGDW, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "lion": functools.partial(flashoptim_native.FlashLion, lr=1e-4, weight_decay=0.1),
    "ademamix": functools.partial(flashoptim_native.FlashAdEMAMix, lr=1e-3, weight_decay=0.1),
    "adopt": functools.partial(flashoptim_native.FlashADOPT, lr=1e-3, weight_decay=0.1),
}


class Weight(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)

    def forward(self, x: Tensor) -> Tensor:
        """Something of which every parameter has a gradient of its own."""
        weight = self.weight.float()
        return (weight * x).square().sum() / weight.numel() + 0.01 * weight.sin().sum()


class Bag(nn.Module):
    """Parameters of some of SHAPES, one submodule each."""

    def __init__(self, names: Iterable[str] = ALL, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name in names:
            values = torch.randn(SHAPES[name], generator=generator) * 0.1
            self.add_module(name, Weight(values.to(device=device, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for module in self.children():
            total = total + module(x)
        return total


def gradient(name: str, shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    """The whole gradient of a parameter, the same in every process."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return (torch.randn(shape, generator=generator) * 0.01).to(dtype)


def clean(name: str) -> str:
    """A parameter's name in the model before it was wrapped."""
    return name.replace("module.", "").replace("_orig_mod.", "")


def as_placed(full: Tensor, param: Tensor) -> Tensor:
    """A whole tensor, spread over processes as a parameter is."""
    if not isinstance(param, DTensor):
        return full.to(param.device)
    local, (box,) = param._local_tensor, param.__create_chunk_list__()
    part = full[tuple(slice(begin, begin + size) for begin, size in zip(box.offsets, box.sizes))]
    return DTensor.from_local(
        part.to(local.device, copy=True, memory_format=torch.contiguous_format), param.device_mesh, param.placements,
        run_check=False, shape=param.shape, stride=param.stride(),
    )  # fmt: skip


def set_gradients(model: nn.Module, step: int) -> None:
    for name, param in model.named_parameters():
        if param.requires_grad:
            whole = gradient(clean(name), tuple(param.shape), step, param.dtype)
            param.grad = as_placed(whole, param)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


# Layouts


def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh(device_type(), shape, mesh_dim_names=names)


def two_dimensional(world: int) -> tuple[int, int]:
    """2 x 2 of 4 processes, 1 x 2 of 2, else 1 x world."""
    return (2, world // 2) if world == 4 else (1, world)


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for child in model.children():
        fully_shard(child, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _distribute(model: nn.Module, mesh: DeviceMesh, placement_of: Callable[[str], Any]) -> None:
    for name, child in model.named_children():
        whole = child.weight
        placed = distribute_tensor(whole.detach(), mesh, [placement_of(name)])
        child.weight = nn.Parameter(placed, requires_grad=whole.requires_grad)


def lay_out(model: nn.Module, layout: str, world: int, **options: Any) -> nn.Module:
    """A model over ``world`` processes.

    single, ddp, fsdp, hsdp (replicate x shard), replicate, tp<dimension>; of a Bag, cut along ``CUT``: tp, fsdp-tp
    (FSDP2 on top of it), fsdp-cut (by FSDP2 itself).
    """
    model = model.to(device_type())
    if layout == "single":
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if layout == "fsdp":
        return shard(model, _mesh((world,), ("shard",)), **options)
    if layout == "hsdp":
        return shard(model, _mesh(two_dimensional(world), ("replicate", "shard")), **options)
    if layout == "fsdp-cut":
        cuts = {}
        for name, child in model.named_children():
            dimension = CUT.get(name, 0)  # FSDP2 cuts others than the first evenly alone
            cuts[child.weight] = Shard(dimension if child.weight.shape[dimension] % world == 0 else 0)
        return shard(model, _mesh((world,), ("shard",)), shard_placement_fn=cuts.get, **options)
    if layout == "fsdp-tp":
        mesh = _mesh(two_dimensional(world), ("dp", "tp"))
        _distribute(model, mesh["tp"], lambda name: Shard(CUT.get(name, 0)))
        return shard(model, mesh["dp"], **options)
    if layout == "tp":
        _distribute(model, _mesh((world,), ("tp",)), lambda name: Shard(CUT.get(name, 0)))
        return model
    placement = Replicate() if layout == "replicate" else Shard(int(layout.removeprefix("tp")))
    _distribute(model, _mesh((world,), ("tp",)), lambda name: placement)
    return model


class MLP(nn.Module):
    def __init__(self, inner: int = 192) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(128, inner)
        self.down = nn.Linear(inner, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def parallel_mlp(world: int, with_fsdp: bool, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Colwise and Rowwise tensor parallelism, over all processes or over the second dimension of FSDP x TP."""
    model = MLP().to(device_type(), dtype)
    mesh = _mesh(two_dimensional(world) if with_fsdp else (1, world), ("dp", "tp"))
    model = parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return shard(model, mesh["dp"]) if with_fsdp else model


# Comparisons


def gathered(value: Any) -> Any:
    """The whole of a tensor on the host, 16-bit integers through int32, which back ends can move."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        local = value._local_tensor
        if local.device.type != value.device_mesh.device_type:  # offloaded
            moved = local.to(value.device_mesh.device_type)
            value = DTensor.from_local(
                moved, value.device_mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
            )
        narrow = value.dtype in (torch.int16, torch.uint16)
        whole = (value.to(torch.int32) if narrow else value).full_tensor()
        value = whole.to(value.dtype)
    return value.detach().cpu()


def whole_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Parameters and states by name, whole and on the host."""
    result: dict[str, Any] = {}
    for name, param in model.named_parameters():
        name = clean(name)
        result[name] = gathered(param.detach()).clone()
        for key, value in optimizer.state.get(param, {}).items():
            value = gathered(value)
            result[f"{name}/{key}"] = value.clone() if isinstance(value, Tensor) else value
    return result


def same_bits(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return int(a) == int(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (one.contiguous().reshape(-1).view(torch.uint8) for one in (a, b))
    return torch.equal(a, b)


def compare(got: dict[str, Any], want: dict[str, Any], what: str) -> int:
    """Raises AssertionError where a bit differs; the number of arrays compared."""
    assert got.keys() == want.keys(), f"{what}: entries differ: {sorted(got.keys() ^ want.keys())[:6]}"
    bad = [key for key in want if not same_bits(got[key], want[key])]
    if bad:
        a, b = got[bad[0]], want[bad[0]]
        about = f"{a} against {b}"
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            differ = int((a != b).sum()) if a.shape == b.shape else "all"
            about = f"{tuple(a.shape)} {a.dtype} against {tuple(b.shape)} {b.dtype}, {differ} elements differ"
        raise AssertionError(f"{what}: {len(bad)} of {len(want)} differ, first {bad[0]}: {about}")
    return len(want)


def alone(
    make_model: Callable[[], nn.Module], make_optimizer: Callable[..., FlashOptimizer], count: int
) -> tuple[nn.Module, FlashOptimizer]:
    """The same steps in one process, on the host."""
    model = make_model()
    optimizer = make_optimizer(model.named_parameters())
    steps(model, optimizer, 0, count)
    return model, optimizer


@functools.lru_cache(maxsize=64)
def _whole_alone(
    names: tuple[str, ...], kind: str, options: tuple[Any, ...], dtype: torch.dtype, count: int, frozen: int
) -> Any:
    def make() -> nn.Module:
        bag = Bag(names, dtype)
        for param in list(bag.parameters())[:frozen]:
            param.requires_grad_(False)
        return bag

    return whole_of(*alone(make, functools.partial(MAKE[kind], **dict(options)), count))


def bag_alone(
    names: tuple[str, ...], kind: str, options: dict[str, Any], dtype: torch.dtype, count: int, frozen: int = 0
) -> dict[str, Any]:
    """What one process has after ``count`` steps of a Bag, whose first ``frozen`` have no gradient; remembered."""
    return dict(_whole_alone(names, kind, tuple(sorted(options.items())), dtype, count, frozen))


def check_kinds(model: nn.Module, optimizer: FlashOptimizer) -> None:
    """Arrays of a DTensor's state are DTensors of its mesh and placements, with the shape and stride of the whole."""
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            if not isinstance(param, DTensor) or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if key == "step":
                continue
            assert isinstance(value, DTensor), f"state {key} of {name} is a {type(value).__name__}"
            assert value.device_mesh == param.device_mesh and value.placements == param.placements
            if not key.endswith("_scale"):
                assert value.shape == param.shape and value.stride() == param.stride(), f"{key} of {name}"


def replicas_agree(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every process has gathered the same bytes."""
    digest = 0
    for key, value in sorted(whole_of(model, optimizer).items()):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if isinstance(value, Tensor) else b""
        digest = zlib.crc32(key.encode() + data, digest)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digest)
    assert len(set(everyone)) == 1, f"processes disagree: {everyone}"
