"""Real models on up to 1,024 ranks, by metadata alone: every element and every group belongs to one rank."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks" / "distributed"))

import shard_map
from shard_map import MODELS, boxes, is_quantized, partition, scale_boxes

from flashoptim_native import _ops

_ALL = [(model, *mesh) for model in MODELS for mesh in ((7, 1), (64, 1), (1024, 1), (64, 8), (1024, 8))]
_SHORT = [("GPT-2 124M", 1024, 1), ("ResNet-50", 1024, 1), ("Mixtral-8x7B", 64, 8), ("GPT-2 124M", 64, 8)]


@pytest.mark.parametrize(
    ("model", "ranks", "tensor_parallel"), _ALL if os.environ.get("FLASHOPTIM_TEST_ALL") else _SHORT
)
def test_every_element_and_group_belongs_to_one_rank(model, ranks, tensor_parallel):
    for weight in MODELS[model]:
        parts = boxes(weight.shape, ranks, tensor_parallel, weight.cut)
        partition(weight.shape, lambda parts=parts: iter(parts))
        if is_quantized(weight.shape):
            shape = weight.shape
            partition(_ops.scale_sizes(shape), lambda shape=shape, parts=parts: scale_boxes(shape, parts))


def test_published_numbers_of_parameters():
    def count(model):
        return sum(weight.count * math.prod(weight.shape) for weight in MODELS[model])

    assert count("Llama-3.1-8B") == 8_030_261_248
    assert count("Llama-3.1-70B") == 70_553_706_496
    assert count("Llama-3.1-405B") == 405_853_388_800
    assert abs(count("Mixtral-8x7B") - 46_702_792_704) < 1e7


def test_a_hole_and_an_overlap_are_found():
    box = shard_map.Box
    with pytest.raises(AssertionError):
        partition((4, 8), lambda: iter([box((0, 0), (2, 8))]))
    with pytest.raises(AssertionError):
        partition((4, 8), lambda: iter([box((0, 0), (2, 8)), box((1, 0), (2, 8))]))
    with pytest.raises(AssertionError):
        partition((4, 8), lambda: iter([box((0, 0), (4, 4)), box((0, 3), (4, 4))]))
    partition((4, 8), lambda: iter([box((0, 0), (4, 4)), box((0, 4), (4, 4))]))


def test_a_cut_inside_a_group_is_found():
    parts = boxes((4096, 4112), 64, 2, 1)
    with pytest.raises(ValueError, match="32"):
        list(scale_boxes((4096, 4112), parts))
