"""Checksums of states tell every changed bit, wherever it is, and any other order."""

import pytest
import torch

from flashoptim_native import _checksums


def checksum(array):
    return int(_checksums.of_states({0: {"array": array}}, 1)[0])


@pytest.mark.parametrize("size", [8, 4096, 8192, 8200])
def test_every_bit_of_a_word_counts(size):
    array = torch.zeros(size, dtype=torch.uint8)
    before = checksum(array)
    for at in range(0, size, 1 if size < 16 else 127):
        for bit in range(8):
            array[at] ^= 1 << bit
            assert checksum(array) != before, (at, bit)
            array[at] ^= 1 << bit
    assert checksum(array) == before


def test_order_dtype_name_and_shape_count():
    array = torch.arange(512)
    kinds = [array, array.flip(0), array.view(2, 256), array.view(torch.float64), torch.arange(511), array.roll(1)]
    assert len({checksum(kind) for kind in kinds}) == len(kinds)
    assert int(_checksums.of_states({0: {"other": array}}, 1)[0]) != checksum(array)
    assert int(_checksums.of_states({0: {"array": array, "note": 1}}, 1)[0]) != checksum(array)
    assert _checksums.of_states({1: {"array": array}}, 2).tolist()[0] == 0
