"""What all processes of a sharded model must agree about: norms, overflows, the largest weight.

Every function here is called by all processes of the meshes in question, in the order of the optimizer's groups, which
they share. Sums are taken in the order of the processes, so that each has the same bits, whatever the back end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _parameters

#: Process groups that hold different parts of a tensor; (): one process, or replicas.
Parts = tuple[Any, ...]


def meshes_of(params: Iterable[Tensor]) -> list[Any]:
    """The meshes of those that are DTensors, each once."""
    return list(dict.fromkeys(p._spec.mesh for p in params if _parameters.is_sharded(p)))  # type: ignore[attr-defined]


def parts_of(param: Tensor) -> Parts:
    """Over which process groups a parameter is cut: replicas of a part are not among it."""
    if not _parameters.is_sharded(param):
        return ()
    spec = param._spec  # type: ignore[attr-defined]
    cut = [dimension for dimension, placement in enumerate(spec.placements) if not placement.is_replicate()]
    return tuple(spec.mesh.get_group(dimension) for dimension in cut if spec.mesh.size(dimension) > 1)


def _travels_on(groups: Parts, value: Tensor) -> Tensor:
    """``value`` where the groups' back ends move it: with CPU offload, gradients lie elsewhere than the mesh."""
    import torch.distributed as dist

    if value.device.type == "cpu" and groups and dist.get_backend(groups[0]) == "nccl":
        return value.cuda()
    return value


def sum_over(groups: Parts, value: Tensor) -> Tensor:
    """The sum of a number over the processes that hold parts, in their order."""
    import torch.distributed as dist

    moved = _travels_on(groups, value.reshape(1))
    for group in groups:
        each = [torch.empty_like(moved) for _ in range(dist.get_world_size(group))]
        dist.all_gather(each, moved.contiguous(), group=group)
        moved = torch.cat(each).sum().reshape(1)
    return moved.reshape(()).to(value.device)


def counts_over(groups: Parts, counts: Tensor) -> Tensor:
    """Integers summed over the processes that hold parts."""
    import torch.distributed as dist

    moved = _travels_on(groups, counts).clone()
    for group in groups:
        dist.all_reduce(moved, dist.ReduceOp.SUM, group=group)
    return moved.to(counts.device)


def largest_over_parts(groups: Parts, values: Tensor) -> Tensor:
    """The largest of each of some numbers over the processes that hold parts."""
    import torch.distributed as dist

    moved = _travels_on(groups, values).clone()
    for group in groups:
        dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
    return moved.to(values.device)


def every_part(all_parts: Iterable[Parts]) -> Parts:
    """The process groups of several, each set of ranks once."""
    import torch.distributed as dist

    found: dict[tuple[int, ...], Any] = {}
    for parts in all_parts:
        for group in parts:
            found.setdefault(tuple(dist.get_process_group_ranks(group)), group)
    return tuple(found.values())


def largest_over(meshes: Iterable[Any], value: Tensor) -> Tensor:
    """The largest of a number over all processes of some meshes."""
    import torch.distributed as dist

    for mesh in meshes:
        groups = tuple(mesh.get_group(dimension) for dimension in range(mesh.ndim) if mesh.size(dimension) > 1)
        moved = _travels_on(groups, value)
        moved = moved.clone() if moved is value else moved
        for group in groups:
            dist.all_reduce(moved, dist.ReduceOp.MAX, group=group)
        value = moved.to(value.device)
    return value


def are_zero(params: Sequence[Tensor]) -> bool:
    """Whether the gradients of ``params`` are all zero, in every process of their meshes."""
    grads = [param.grad for param in params if param.grad is not None and param.grad.layout == torch.strided]
    is_zero = all(not bool(_parameters.plain(grad).count_nonzero()) for grad in grads)
    meshes = meshes_of(params)
    if not meshes:
        return is_zero
    return not bool(largest_over(meshes, torch.tensor(0 if is_zero else 1, dtype=torch.int32)))


def largest_magnitude(param: Tensor) -> float:
    """The largest magnitude of a whole parameter."""
    local = _parameters.plain(param).detach()
    largest = 0.0
    if local.numel() > 0:
        largest = max(abs(float(value)) for value in torch.aminmax(local))
    if not _parameters.is_sharded(param):
        return largest
    return float(largest_over(meshes_of([param]), torch.tensor(largest, dtype=torch.float64)))


def sums_of_squares(params: Sequence[Tensor]) -> dict[Parts, Tensor]:
    """Of the local gradients of ``params``, which have one, by what they are cut over: float64 numbers."""
    grads: dict[Parts, list[Tensor]] = {}
    for param in params:
        assert param.grad is not None
        grads.setdefault(parts_of(param), []).append(_parameters.local_gradient(param, param.grad).detach())
    found: dict[Parts, Tensor] = {}
    for parts, tensors in grads.items():
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            by_device.setdefault(tensor.device, []).append(tensor)
        total = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
        for held in by_device.values():
            filled = [tensor for tensor in held if tensor.numel() > 0]
            if filled:
                norms = torch._foreach_norm(filled, 2.0, dtype=torch.float64)
                total = total + torch.stack([norm.reshape(()) for norm in norms]).square().sum().to(total.device)
        found[parts] = total
    return found


def total_norm(sums: dict[Parts, Tensor]) -> Tensor:
    """The norm of whole gradients from the sums of squares of their parts; replicas count once. float32."""
    device = next(iter(sums.values())).device
    totals = [sum_over(parts, one).to(device) for parts, one in sums.items()]
    return torch.stack(totals).sum().sqrt().to(torch.float32)


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients of a norm are multiplied with, so that theirs is at most ``max_norm``: torch's formula."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients(params: Iterable[Tensor], coefficient: Tensor) -> None:
    """Multiplies gradients where they lie."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for param in params:
        if param.grad is not None:
            local = _parameters.plain(param.grad).detach()
            by_device.setdefault(local.device, []).append(local)
    for device, held in by_device.items():
        torch._foreach_mul_(held, coefficient.to(device))


__all__ = [
    *("are_zero", "clip_coefficient", "counts_over", "every_part", "largest_magnitude", "largest_over"),
    *("largest_over_parts", "meshes_of", "parts_of", "scale_gradients", "sum_over", "sums_of_squares", "total_norm"),
]
