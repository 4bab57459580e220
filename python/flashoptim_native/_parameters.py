"""How a parameter becomes a local tensor and its place in the whole: the one module that knows kinds of parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _ops

PARAMETER_DTYPES = tuple(_ops.DTYPES)
GROUP = 32  # elements of a group (kGroupSize of include/flashoptim/types.h)


_PLAIN_TYPES: set[type] = {Tensor, torch.nn.Parameter}


class Local(NamedTuple):
    """A parameter as the store sees it."""

    tensor: Tensor  # plain
    whole: tuple[int, ...]  # sizes of the whole
    #: What place_of_box gives for a shard; None: the whole.
    place: tuple[int, ...] | None = None
    #: Where a shard begins in the whole, for every dimension.
    offsets: tuple[int, ...] | None = None
    #: torch's description of how a DTensor is spread; None: a plain tensor. A replicated one has a spec and no place.
    spec: Any = None

    @property
    def leading(self) -> int:
        """Dimensions before those that form a row of groups."""
        return len(_ops.scale_sizes(self.whole)) - 1


#: What describe_shard() leaves at a tensor: sizes of the whole, and its place there.
_DESCRIPTION = "_flashoptim_shard"


def describe_shard(tensor: Tensor, whole_shape: Sequence[int], first_element: int) -> Tensor:
    """Says that a 1-D tensor is a stretch of a parameter that is spread over processes: a piece of a flat buffer.

    It is then stepped to the bits that these elements have in the whole: same formats, groups and rounding. For
    frameworks that shard by slices of flat buffers; DTensors (FSDP2, tensor parallelism) say it themselves. States are
    this stretch's own plain tensors, and so are those of ``state_dict()``.

    Args:
        tensor: contiguous, of one dimension; also one without elements.
        whole_shape: the parameter's shape.
        first_element: which element of the whole, counted row by row, is the first here.

    Returns:
        ``tensor``.

    Raises:
        TypeError, ValueError: it is none of that; a stretch that cuts a group of 32 elements that share a scale is
            refused at its first step, with the remedy.
    """
    if not isinstance(tensor, Tensor) or is_sharded(tensor):
        raise TypeError(f"tensor is a {type(tensor).__name__}; allowed is a plain torch.Tensor")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"tensor has shape {tuple(tensor.shape)} and stride {tensor.stride()}; allowed is one contiguous dimension"
        )
    if not isinstance(whole_shape, Sequence) or any(type(size) is not int for size in whole_shape):
        raise TypeError(f"whole_shape = {whole_shape!r} is not allowed; allowed are sizes, integers >= 0")
    if type(first_element) is not int:
        raise TypeError(f"first_element = {first_element!r} is a {type(first_element).__name__}; allowed is an integer")
    whole = tuple(whole_shape)
    if any(size < 0 for size in whole):
        raise ValueError(f"whole_shape = {whole} is not allowed; allowed are sizes >= 0")
    first, last = int(first_element), int(first_element) + tensor.numel()
    if first < 0 or last > math.prod(whole):
        raise ValueError(
            f"first_element = {first} with {tensor.numel()} elements is not allowed; allowed is a stretch within the "
            f"{math.prod(whole)} elements of whole_shape = {whole}"
        )
    leading = len(_ops.scale_sizes(whole)) - 1
    rows, row = math.prod(whole[:leading]), math.prod(whole[leading:])
    setattr(tensor, _DESCRIPTION, (whole, (first, 0, 0, rows, row, 0)))
    return tensor


def whole_shape(param: Tensor) -> tuple[int, ...]:
    """The sizes of the whole that a parameter is, or is a part of."""
    described = getattr(param, _DESCRIPTION, None) if not is_sharded(param) else None
    return tuple(param.shape) if described is None else described[0]


def is_described(param: Tensor) -> bool:
    """Whether a parameter is a slice of a flat buffer, by describe_shard()."""
    return not is_sharded(param) and getattr(param, _DESCRIPTION, None) is not None


_wrapped: list[type] = []


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor: spread over a mesh of processes, be it replicated."""
    if not _wrapped:
        module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it, there are none
        if module is None or not hasattr(module, "DTensor"):
            return False
        _ops.store.wrap(module.DTensor)
        _wrapped.append(module.DTensor)
    return type(tensor) is _wrapped[0]


def plain(tensor: Tensor) -> Tensor:
    """The tensor whose memory this is: a DTensor's local one."""
    if not is_sharded(tensor):
        return tensor
    local: Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def local(param: Tensor) -> Local:
    """The tensor whose memory a step reads and writes, and where it lies in the whole.

    Raises:
        RuntimeError: a shard is no box, or one that a step cannot tell the whole's elements of.
    """
    if not is_sharded(param):
        described = getattr(param, _DESCRIPTION, None)
        return Local(param, tuple(param.shape)) if described is None else Local(param, *described)
    tensor, whole = plain(param), tuple(param.shape)
    chunks = param.__create_chunk_list__()  # type: ignore[attr-defined]
    spec = param._spec  # type: ignore[attr-defined]
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(tensor.shape):
        raise RuntimeError(
            f"a DTensor of shape {whole} and placements {spec.placements} has {len(chunks)} local pieces, with a local "
            f"tensor of shape {tuple(tensor.shape)}; allowed is one box"
        )
    offsets = tuple(chunks[0].offsets)
    place = None if tuple(tensor.shape) == whole else _ops.place_of_box(whole, offsets, tuple(tensor.shape))
    return Local(tensor, whole, place, offsets, spec)


def check_cut(param: Local, name: str) -> None:
    """Raises ValueError where a shard is cut inside a group of 32 elements, which 8-bit states share a scale of."""
    if param.place is None or param.tensor.numel() == 0:
        return
    if param.offsets is None:
        _check_stretch(param, param.place, name)
        return
    leading, sizes = param.leading, tuple(param.tensor.shape)
    inner = math.prod(param.whole[leading + 1 :])
    begin, end = param.offsets[leading] * inner, (param.offsets[leading] + sizes[leading]) * inner
    row = math.prod(param.whole[leading:])
    ends_well = end == row or end % GROUP == 0
    if sizes[leading + 1 :] == param.whole[leading + 1 :] and begin % GROUP == 0 and ends_well:
        return
    how = "" if param.spec is None else f" by {param.spec.placements}"
    raise ValueError(
        f"{name} of shape {param.whole} is cut{how} so that this rank has {sizes} from {param.offsets} on: inside a "
        f"group of {GROUP} elements along dimensions {list(range(leading, len(sizes)))}, which share a scale. Allowed "
        f"are cuts before dimension {leading}, or at multiples of {GROUP} elements of a row; otherwise give this "
        'parameter a group with "quantize": False'
    )


def _check_stretch(param: Local, place: Sequence[int], name: str) -> None:
    first, rows, row = place[0], place[3], place[4]
    end = first + param.tensor.numel()
    ends_well = end % GROUP == 0 or end == rows * row
    if first % GROUP == 0 and ends_well and (row % GROUP == 0 or rows == 1):
        return
    raise ValueError(
        f"{name} is elements {first} to {end} of a parameter of shape {param.whole}, whose rows have {row}: allowed "
        f"for 8-bit states are rows of a multiple of {GROUP} elements, and cuts at such multiples; otherwise give this "
        'parameter a group with "quantize": False'
    )


def beside(tensor: Tensor, param: Tensor) -> Tensor:
    """A tensor of a parameter's state on the parameter's own device; a DTensor whose local part is not there, too."""
    device = plain(param).device
    if plain(tensor).device == device:
        return tensor
    return wrap(local(param), plain(tensor).to(device), tuple(tensor.shape), "state")


def wrap(param: Local, tensor: Tensor, whole: Sequence[int], name: str) -> Tensor:
    """A tensor of a sharded parameter's state as a DTensor of global sizes ``whole``, placed as the parameter is.

    Raises:
        ValueError: torch would expect another local shape there.
    """
    if param.spec is None:
        return tensor
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    mesh, placements = param.spec.mesh, param.spec.placements
    sizes = tuple(whole)
    expected = _local_sizes(sizes, mesh, placements)
    if expected != tuple(tensor.shape):
        raise ValueError(
            f"{name} of shape {param.whole} and placements {placements} has a state of shape {sizes}, of "
            f"which this rank holds {tuple(tensor.shape)}, where torch expects {expected}: its rows are not cut at "
            f"multiples of {GROUP} elements. Cut another dimension, or give this parameter a group with "
            '"quantize": False'
        )
    strides = tuple(math.prod(max(1, size) for size in sizes[dimension + 1 :]) for dimension in range(len(sizes)))
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(torch.Size(sizes), strides, tensor.dtype))
    # From a spec: DTensor.from_local() would move data to the mesh's device, which CPU offload does not want.
    return DTensor(tensor, spec, requires_grad=False)  # type: ignore[no-untyped-call]


#: What torch would give this rank of a DTensor; models repeat their shapes, and asking takes 0.1 ms.
_sizes: dict[Any, tuple[int, ...]] = {}
_MOST_SIZES = 4096


def _local_sizes(whole: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # Not by the mesh: one of other process groups, made later, equals it.
    key = (whole, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()), placements)
    found = _sizes.get(key)
    if found is None:
        if len(_sizes) >= _MOST_SIZES:
            _sizes.clear()
        found = _sizes[key] = tuple(compute_local_shape_and_global_offset(whole, mesh, placements)[0])
    return found


def gathered(value: Tensor) -> Tensor:
    """The whole of a tensor; all processes of a DTensor's mesh call this."""
    if not is_sharded(value):
        return value
    spec, local = value._spec, plain(value)  # type: ignore[attr-defined]
    if local.device.type != spec.mesh.device_type:  # offloaded: collectives take it where the mesh is
        described = Local(local.to(spec.mesh.device_type), tuple(value.shape), spec=spec)
        value = wrap(described, described.tensor, described.whole, "a tensor")
    whole: Tensor = value.full_tensor()  # type: ignore[attr-defined]
    return whole


def part_for(value: Tensor, target: Tensor) -> Tensor:
    """What of a tensor of a target's whole shape, a DTensor or whole, the target's local tensor holds."""
    if not is_sharded(target):
        return gathered(value)
    spec = target._spec  # type: ignore[attr-defined]
    if is_sharded(value):
        held = value._spec  # type: ignore[attr-defined]
        if held.mesh == spec.mesh and held.placements == spec.placements:
            return plain(value)
        value = gathered(value)
    described = local(target)
    assert described.offsets is not None
    return value[tuple(slice(o, o + n) for o, n in zip(described.offsets, described.tensor.shape))]


def is_placed_otherwise(param: Tensor, grad: Tensor) -> bool:
    """Whether a DTensor's gradient has other placements than it, be they the same on a mesh of one process."""
    if not is_sharded(grad):
        return False
    return bool(grad._spec.placements != param._spec.placements)  # type: ignore[attr-defined]


def local_gradient(param: Tensor, grad: Tensor) -> Tensor:
    """The plain gradient of a parameter, redistributed where it is placed otherwise: all processes do this together."""
    if not is_sharded(grad):
        return grad
    if is_placed_otherwise(param, grad):
        ours = param._spec  # type: ignore[attr-defined]
        grad = grad.redistribute(ours.mesh, ours.placements)  # type: ignore[attr-defined]
    found = plain(grad)
    if hasattr(found, "wait"):  # a collective that is under way
        found = found.wait()
    return found


def check_parameter(param: Any, name: str) -> None:
    """Raises where a tensor cannot be stepped at all; whether its device can is said when it is stepped.

    Raises:
        TypeError: no dense tensor of an allowed dtype.
        ValueError: its elements share memory.
    """
    if not isinstance(param, Tensor):
        return  # torch.optim.Optimizer.add_param_group names this error
    if is_sharded(param):
        placements = param._spec.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise TypeError(f"{name} is a DTensor with placements {placements}; allowed are Shard and Replicate")
        if plain(param).numel() > 0 and not plain(param).is_contiguous():
            raise ValueError(
                f"the local tensor of {name} has shape {tuple(plain(param).shape)} and stride "
                f"{plain(param).stride()}; allowed for "
                "a DTensor is a contiguous one"
            )
    if param.layout != torch.strided:
        raise TypeError(f"{name} has layout {param.layout}; allowed is torch.strided")
    _check_type(param, name)
    if param.dtype not in PARAMETER_DTYPES:
        allowed = ", ".join(map(str, PARAMETER_DTYPES))
        raise TypeError(f"{name} has dtype {param.dtype}; allowed are {allowed}")
    if torch.nn.parameter.is_lazy(param):
        return  # of no shape until the module's first batch
    if param.device.type != "meta" and not is_sharded(param) and overlaps(param):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} and stride {param.stride()} may refer to one element of memory "
            "twice; allowed are tensors whose elements are distinct"
        )


def check_gradient(param: Tensor, grad: Tensor, name: str) -> None:
    """Raises RuntimeError where a gradient does not go with its parameter."""
    if is_sharded(grad) != is_sharded(param):
        kinds = ["a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (grad, param)]
        raise RuntimeError(f"the gradient of {name} is {kinds[0]}; allowed is what the parameter is, {kinds[1]}")
    if is_sharded(grad):
        meshes = [tensor._spec.mesh for tensor in (grad, param)]  # type: ignore[attr-defined]
        if meshes[0] != meshes[1]:
            raise RuntimeError(
                f"the gradient of {name} is on mesh {meshes[0]}; allowed is the parameter's, {meshes[1]}"
            )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"the gradient of {name} has layout {grad.layout}; allowed is torch.strided (for an embedding, "
            "sparse=False)"
        )
    _check_type(grad, f"the gradient of {name}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"the gradient of {name} has shape {tuple(grad.shape)}; allowed is the parameter's, {tuple(param.shape)}"
        )
    if not has_memory(grad):
        raise RuntimeError(
            f"the gradient of {name} of shape {tuple(grad.shape)} and dtype {grad.dtype} needs more memory than its "
            f"storage has, {grad.untyped_storage().nbytes()} bytes: the storage has been resized"
        )
    if grad.device != param.device:
        raise RuntimeError(f"the gradient of {name} is on {grad.device}; allowed is the parameter's, {param.device}")
    if grad.dtype not in (param.dtype, torch.float32):
        allowed = " and ".join(dict.fromkeys((str(param.dtype), "torch.float32")))
        raise RuntimeError(
            f"the gradient of {name} has dtype {grad.dtype}; allowed are the parameter's dtype and torch.float32 "
            f"({allowed})"
        )


def _check_type(tensor: Tensor, name: str) -> None:
    """Makes a subclass of torch.Tensor known to the store; raises TypeError where its memory is not its own."""
    kind = type(plain(tensor))
    if kind in _PLAIN_TYPES:
        return
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(
            f"{name} is a {kind.__name__}, which has a __torch_dispatch__ of its own; allowed are plain tensors and "
            "subclasses without"
        )
    _ops.store.plain(kind)
    _PLAIN_TYPES.add(kind)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch's own, or of a subclass whose memory is its own."""
    kind = type(tensor)
    return kind in _PLAIN_TYPES or kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl


def has_memory(tensor: Tensor) -> bool:
    """Whether all elements are in the tensor's storage, which can be resized under it."""
    if tensor.numel() == 0:
        return True
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory, judged by strides (exact for all layouts that PyTorch itself makes)."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def check_not_flattened(groups: Sequence[Mapping[str, Any]], caller: str) -> None:
    """Raises RuntimeError where FSDP1 asks for states so to take them apart; ``caller``: the name of the module that
    asks.

    Its flat parameters are pieces of several of the model's, so scales and groups are, too; torch cannot know. A
    rank's own state_dict() is fine.
    """
    if not caller.startswith(("torch.distributed.fsdp.", "torch.distributed.checkpoint.")):
        return
    for group in groups:
        if any(hasattr(param, "_fsdp_flattened") or hasattr(param, "_is_flat_param") for param in group["params"]):
            raise RuntimeError(
                "optim_state_dict of FullyShardedDataParallel (FSDP1) cannot take apart states that groups of 32 "
                "elements share "
                "scales of; allowed are FSDP2 (torch.distributed.fsdp.fully_shard), whose checkpoints load on any "
                "number of "
                "processes, and each rank's own optimizer.state_dict()"
            )


def name_of(groups: Sequence[Mapping[str, Any]], group: int, position: int) -> str:
    """How messages call a parameter."""
    names = groups[group].get("param_names")
    if names is not None and position < len(names):
        return f"parameter {names[position]!r}"
    return f"parameter {position} of group {group}"


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Whether parameters of a group have the slots that momentum needs: all but SGD's do always."""
    return "momentum" not in group or group["momentum"] != 0
