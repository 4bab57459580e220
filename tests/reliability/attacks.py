"""What the attacks share: counting, looking at everything that a refusal must leave as it was, small optimizers."""

from __future__ import annotations

import collections
import os

import torch

import flashoptim_native
from helpers import CLASSES, HYPERS, make_params, run

#: The long form: every place and value instead of a sample.
IS_LONG = bool(os.environ.get("FLASHOPTIM_TEST_ALL"))
#: What the documentation says that our functions raise.
DOCUMENTED = (ValueError, TypeError, RuntimeError)

CODECS = {
    "default": {},
    "paper": {"state_codec": "paper"},
    "fp32": {"quantize": False},
    "32 bit": {"master_weight_bits": 32},
    "expanded": {"compress_state_dict": False},
}
SMALL_SHAPES = [(3, 40), (5,), (4, 2, 3, 3)]


class Tally:
    """How often an attack was tried, how it ended, and what it found."""

    def __init__(self):
        self.counts = collections.Counter()
        self.findings = []

    def count(self, outcome):
        self.counts["tried"] += 1
        self.counts[outcome] += 1

    def find(self, what):
        """The attack went through: a fault."""
        self.count("failed")
        self.findings.append(what)

    def summary(self):
        return ", ".join(f"{count} {name}" for name, count in {**self.counts, "failed": len(self.findings)}.items())

    def report(self, most=40):
        kinds = collections.Counter(str(what)[:150] for what in self.findings)
        lines = [f"{count} x {what}" for what, count in kinds.most_common(most)]
        return "\n".join([self.summary(), *lines])


def small(kind="adamw", steps=2, dtype=torch.bfloat16, shapes=SMALL_SHAPES, seed=0, **options):
    """Parameters and an optimizer of a few hundred bytes, some steps on their way; the same at every call."""
    params = make_params(dtype, shapes, seed)
    optimizer = CLASSES[kind](params, **{"min_quantized_numel": 0, **HYPERS[kind], **options})
    run(optimizer, params, 0, steps)
    return params, optimizer


def plain(value):
    """A value as plain data that compares by its bytes: tensors too, NaNs equal to themselves."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.device.type == "meta":
            return (str(value.layout), str(value.device), value.dtype, tuple(value.shape))
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return (value.dtype, tuple(value.shape), value.stride(), data.numpy().tobytes())
    if isinstance(value, dict):
        return [(plain(key), plain(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [plain(item) for item in value])
    if isinstance(value, float):
        return ("float", value.hex())
    return (type(value).__name__, value)


def everything(optimizer):
    """All that an optimizer is: parameters, states, groups, and the objects that hold them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        (id(group), [(key, plain(value)) for key, value in group.items() if key != "params"])
        for group in optimizer.param_groups
    ]
    states = [
        (id(key) if isinstance(key, torch.Tensor) else key, id(held), _held(held))
        for key, held in optimizer.state.items()
    ]
    return [(id(p), plain(p)) for p in params], groups, states, id(optimizer.state), optimizer._stepper.clip


def _held(held):
    if not isinstance(held, dict):
        return plain(held)
    return [(key, id(value) if isinstance(value, torch.Tensor) else None, plain(value)) for key, value in held.items()]


def contents(optimizer):
    """The same without the objects' identities: what two equal optimizers have in common."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        [(key, plain(value)) for key, value in sorted(group.items()) if key != "params"]
        for group in optimizer.param_groups
    ]
    return [plain(p) for p in params], groups, [plain(dict(optimizer.state.get(p, {}))) for p in params]


def is_finite(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return all(bool(p.isfinite().all()) for p in params)


__all__ = [
    "CODECS",
    "DOCUMENTED",
    "IS_LONG",
    "Tally",
    "contents",
    "everything",
    "flashoptim_native",
    "is_finite",
    "plain",
    "small",
]
