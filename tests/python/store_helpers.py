"""What the tests of the store share: equal optimizers, looks at everything that a step may change, memory that is
watched."""

from __future__ import annotations

import torch

from helpers import CLASSES, HYPERS, bits, make_params, run

SHAPES = [(64, 64), (33,), (96, 64), (0,), (), (8, 4, 3, 3)]


def make(kind="adamw", steps=2, shapes=SHAPES, dtype=torch.bfloat16, **options):
    """Parameters and an optimizer of theirs, some steps on their way; the same at every call."""
    params = make_params(dtype=dtype, shapes=shapes)
    optimizer = CLASSES[kind](params, **{"min_quantized_numel": 64, **HYPERS[kind], **options})
    run(optimizer, params, 0, steps)
    return params, optimizer


def take_step(optimizer, params, one_by_one):
    """A step of all parameters, or of each alone."""
    if one_by_one:
        for param in params:
            optimizer.step_param(param)
    else:
        optimizer.step()


def everything(params, optimizer):
    """What a step that fails must leave as it is: objects, bytes, layouts, counts."""
    found = []
    for param in params:
        found.append((param.dtype, tuple(param.shape), param.stride(), bits(param) if _has_memory(param) else None))
        held = optimizer.state.get(param)
        found.append(id(held))
        if not isinstance(held, dict):
            continue
        for key, value in held.items():
            if isinstance(value, torch.Tensor) and _has_memory(value):
                found.append((key, id(value), value.dtype, tuple(value.shape), value.stride(), bits(value)))
            else:
                found.append((key, id(value), str(value) if not isinstance(value, torch.Tensor) else None))
    return found


def _has_memory(tensor):
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    available = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.numel() == 0 or reach <= available


class Watched:
    """The memory of a tensor as it is now. Once the tensor has left it, nobody may write to it."""

    PATTERN = 0x5A

    def __init__(self, tensor):
        self.tensor = tensor
        self.address = tensor.data_ptr()
        self.memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())

    def fill_if_left(self):
        self.is_left = self.tensor.data_ptr() != self.address
        if self.is_left:
            self.memory.fill_(self.PATTERN)

    def check(self):
        assert not self.is_left or bool((self.memory == self.PATTERN).all())
