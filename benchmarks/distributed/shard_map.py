"""Which rank holds what of a model, without memory or processes: torch's own arithmetic of shards, and this library's.

The shapes are those of published models; layouts are FSDP2 on a mesh of one dimension, and FSDP2 x tensor parallelism.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.distributed.tensor import Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from flashoptim_native import _ops, _packing, _parameters, _states

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    shape: Shape
    count: int
    #: The dimension that tensor parallelism cuts: 0 (Colwise), 1 (Rowwise); None: it is replicated there.
    cut: int | None = None


def llama(width: int, layers: int, ffn: int, key_value: int, vocabulary: int = 128_256) -> list[Weight]:
    return [
        Weight((vocabulary, width), 2, 0),
        Weight((width, width), layers, 0),
        Weight((key_value, width), 2 * layers, 0),
        Weight((width, width), layers, 1),
        Weight((ffn, width), 2 * layers, 0),
        Weight((width, ffn), layers, 1),
        Weight((width,), 2 * layers + 1),
    ]


MODELS: dict[str, list[Weight]] = {
    "Llama-3.1-8B": llama(4096, 32, 14_336, 1024),
    "Llama-3.1-70B": llama(8192, 80, 28_672, 1024),
    "Llama-3.1-405B": llama(16_384, 126, 53_248, 1024),
    "GPT-2 124M": [
        Weight((50_257, 768), 1, 0),
        Weight((1024, 768), 1),
        Weight((2304, 768), 12, 0),
        Weight((2304,), 12, 0),
        Weight((768, 768), 12, 1),
        Weight((3072, 768), 12, 0),
        Weight((3072,), 12, 0),
        Weight((768, 3072), 12, 1),
        Weight((768,), 74),
    ],
    "Mixtral-8x7B": [
        Weight((32_000, 4096), 2, 0),
        Weight((8, 4096), 32),
        Weight((8, 14_336, 4096), 64, 1),
        Weight((8, 4096, 14_336), 32, 2),
        Weight((4096, 4096), 64, 0),
        Weight((1024, 4096), 64, 0),
        Weight((4096,), 65),
    ],
    "ResNet-50": [
        Weight((64, 3, 7, 7), 1),
        Weight((64, 64, 1, 1), 1),
        Weight((256, 64, 1, 1), 4),
        Weight((512, 512, 3, 3), 3),
        Weight((2048, 512, 1, 1), 3),
        Weight((1000, 2048), 1),
        Weight((1000,), 1),
        Weight((2048,), 6),
    ],
}


@dataclass(frozen=True)
class Box:
    """What a rank holds of a parameter."""

    offsets: Shape
    sizes: Shape


@functools.cache
def boxes(shape: Shape, ranks: int, tensor_parallel: int, cut: int | None) -> tuple[Box, ...]:
    """Every rank's part, as DTensor has it. Replicas over the tensor parallel dimension are left out."""
    if tensor_parallel == 1 or cut is None:
        mesh, placements = (ranks // tensor_parallel,), [Shard(0)]
    else:
        mesh = (ranks // tensor_parallel, tensor_parallel)
        outer = _StridedShard(0, split_factor=tensor_parallel) if cut == 0 else Shard(0)
        placements = [outer, Shard(cut)]
    found = []
    for rank in range(math.prod(mesh)):
        coordinate = [rank] if len(mesh) == 1 else list(divmod(rank, mesh[1]))
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh, coordinate, placements)
        found.append(Box(tuple(offsets), tuple(sizes)))
    return tuple(found)


def local_of(shape: Shape, box: Box, dtype: torch.dtype = torch.bfloat16) -> _parameters.Local:
    """The library's description of a part, without memory."""
    place = None if box.sizes == shape else _ops.place_of_box(shape, box.offsets, box.sizes)
    return _parameters.Local(torch.empty(box.sizes, dtype=dtype, device="meta"), shape, place, box.offsets)


OPTIONS = {
    "quantize": True,
    "state_codec": "default",
    "master_weight_bits": 24,
    "stochastic_rounding": False,
    "min_quantized_numel": 4096,
}


def is_quantized(shape: Shape) -> bool:
    param = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return _states.format_of(param, OPTIONS).codec != _ops.StateCodec.FLOAT32


def scale_boxes(shape: Shape, parts: tuple[Box, ...]) -> Iterator[Box]:
    """What each rank holds of the scales. Raises ValueError where a group is cut."""
    for box in parts:
        if 0 in box.sizes:
            continue
        cuts = _packing._scale_box(local_of(shape, box), f"a parameter of shape {shape}")
        yield Box(tuple(c.start for c in cuts), tuple(c.stop - c.start for c in cuts))


def state_bytes(shape: Shape, box: Box) -> int:
    """Correction and states of AdamW, 24 bit, default codec, of one part."""
    count = math.prod(box.sizes)
    if not is_quantized(shape):
        return count * (1 + 8)
    if count == 0:
        return 0
    (scales,) = scale_boxes(shape, (box,))
    return count * 3 + 2 * 2 * math.prod(scales.sizes)


def partition(whole: Shape, parts: Callable[[], Iterator[Box]]) -> None:
    """Raises AssertionError where an element of ``whole`` is in no part, or in two.

    Parts are boxes, so it is enough that they lie within, that they do not meet, and that their sizes add up.
    """
    seen: dict[Shape, list[tuple[int, int]]] = {}
    total = 0
    for box in parts():
        if 0 in box.sizes:
            continue
        assert all(o >= 0 and o + n <= size for o, n, size in zip(box.offsets, box.sizes, whole)), (whole, box)
        total += math.prod(box.sizes)
        other = tuple(value for o, n in zip(box.offsets[1:], box.sizes[1:]) for value in (o, n))
        seen.setdefault(other, []).append((box.offsets[0], box.offsets[0] + box.sizes[0]))
    assert total == math.prod(whole), (whole, total)
    columns = list(seen)
    for a in range(len(columns)):
        for b in range(a):
            first, second = columns[a], columns[b]
            meet = all(
                first[i] < second[i] + second[i + 1] and second[i] < first[i] + first[i + 1]
                for i in range(0, len(first), 2)
            )
            assert not meet, (whole, first, second)
    for stretches in seen.values():
        stretches.sort()
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(stretches)), whole
