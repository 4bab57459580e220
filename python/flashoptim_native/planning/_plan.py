"""A memory plan: weights, gradients, states, activations and temporaries of a training step, without running one."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from . import _models, _shards, _trace
from ._choices import Choice
from ._cuda_rules import Device
from ._models import Model, PlanError, Weights
from ._replay import Peak, peak_of
from ._trace import Trace, rounded

GIB = 2**30
#: What a process holds on a card besides torch's tensors: the context, and the kernels of CUDA's libraries. The most of
#: 21 runs on an H200 (CUDA 13.0, driver 580), 767 to 783 MiB: "outside" in benchmarks/results/plan_h200.json.
CONTEXT_BYTES = 783 * 2**20
#: torch's allocator cannot hand out all that it holds: pieces between allocations stay free.
FRAGMENTATION = 0.03


class Setting(NamedTuple):
    """How the model is trained, whatever the optimizer."""

    batch: int = 1
    #: Tokens of a sequence or the side of a picture; None: the model's own.
    length: int | None = None
    #: Blocks are recomputed in the backward pass.
    checkpoint: bool = False
    #: fp32 models compute in bf16, by torch.autocast.
    autocast: bool = True
    ranks: int = 1
    #: "fsdp2" or "ddp", with more than one rank.
    layout: str = "fsdp2"
    device: Device = Device()


class Shape(NamedTuple):
    """A tensor of the model, without memory."""

    name: str
    tensor: Tensor
    trained: bool


class Traced(NamedTuple):
    """A model, in one dtype, and a step of it."""

    params: list[Shape]
    buffers: int
    #: None where only weights are known.
    trace: Trace | None
    #: Names of parameters by repeated block; the rest is in none.
    blocks: list[list[str]]


def _room(card: int) -> float:
    """Bytes of tensors that a card of ``card`` bytes takes."""
    return (card - CONTEXT_BYTES) / (1 + FRAGMENTATION)


class Row(NamedTuple):
    """What one choice takes. Bytes, on one card."""

    choice: Choice
    peak: Peak
    #: Parameters of the model, and those that are trained.
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        return self.peak.total

    def fits(self, card: int) -> bool:
        """Whether a card of ``card`` bytes takes it, its context and the allocator's gaps."""
        return self.total <= _room(card)


class Planner:
    """Plans for one model. Steps are traced once for each dtype and setting."""

    def __init__(self, model: Model | Weights) -> None:
        self.model = model
        self._traced: dict[Any, Traced] = {}

    @property
    def has_step(self) -> bool:
        """Whether activations and temporaries are known, or weights alone."""
        return isinstance(self.model, Model)

    def row(self, choice: Choice, setting: Setting) -> Row:
        """What a choice takes.

        Raises:
            PlanError: the model cannot be traced in this setting.
        """
        traced = self.traced(choice.dtype, setting)
        fixed = {"weights": 0, "buffers": traced.buffers, "corrections": 0, "states": 0, "scales": 0}
        gradients = 0
        for _, tensor, is_trained in traced.params:
            shard = _shards.shard_of(tensor, setting.ranks, setting.layout)
            fixed["weights"] += rounded(shard.nbytes)
            if is_trained:
                gradients += rounded(shard.nbytes)
                for array in [] if choice.offloads else choice.arrays(shard):
                    fixed[array.part] += rounded(array.bytes)
        trained = sum(tensor.numel() for _, tensor, is_trained in traced.params if is_trained)
        count = sum(tensor.numel() for _, tensor, _ in traced.params)
        if traced.trace is None:
            fixed["gradients"] = 0 if choice.releases else gradients
            return Row(choice, Peak(fixed, "optimizer step", []), count, trained)
        fixed |= {"inputs": traced.trace.inputs, "libraries": traced.trace.kept}
        if setting.ranks > 1:
            fixed["communication"] = _shards.communication(
                {name: tensor for name, tensor, _ in traced.params}, traced.blocks, gradients, setting.layout
            )
        peak = peak_of(traced.trace, fixed, choice.releases)
        if setting.ranks > 1 and setting.layout == "fsdp2" and not choice.releases:
            peak = peak._replace(parts={**peak.parts, "gradients": gradients})
        return Row(choice, peak, count, trained)

    def shapes(self, dtype: torch.dtype) -> list[Shape]:
        """The model's parameters, in the dtype that a model made in ``dtype`` gives them."""
        if isinstance(self.model, Weights):
            return _of_weights(self.model, dtype).params
        return _shapes_of(self._made(dtype))

    def traced(self, dtype: torch.dtype, setting: Setting) -> Traced:
        autocast = setting.autocast and dtype == torch.float32
        key = (dtype, setting.batch, setting.length, setting.checkpoint, autocast, setting.device)
        if key not in self._traced:
            self._traced[key] = self._trace(dtype, setting, autocast)
        return self._traced[key]

    def _made(self, dtype: torch.dtype) -> nn.Module:
        assert isinstance(self.model, Model)
        try:
            with torch.device("meta"), _models.default_dtype(dtype):
                return self.model.make()
        except (RuntimeError, NotImplementedError) as error:
            raise PlanError(f"{self.model.name} cannot be made on the meta device: {_said(error)}") from error

    def _trace(self, dtype: torch.dtype, setting: Setting, autocast: bool) -> Traced:
        if isinstance(self.model, Weights):
            return _of_weights(self.model, dtype)
        module = self._made(dtype)
        if setting.checkpoint:
            self.model.checkpoint(module)
        blocks = [
            [name for name, param in module.named_parameters() if any(param is one for one in block.parameters())]
            for block in (_models.blocks_of(module) if setting.ranks > 1 else [])
        ]
        with FakeTensorMode(allow_non_fake_inputs=True):
            _trace.fake_copy(module)
            with _models.default_dtype(dtype):
                batch = self.model.batch_of(module, setting.batch, setting.length)
            with self.model.while_traced():
                trace = _run(module, batch, dtype, autocast, setting)
        shapes = _shapes_of(module)
        buffers = {id(one): rounded(one.nbytes) for one in module.buffers()}
        del module, batch
        gc.collect()
        return Traced(shapes, sum(buffers.values()), trace, blocks)


def _shapes_of(module: nn.Module) -> list[Shape]:
    return [
        Shape(name, torch.empty(param.shape, dtype=param.dtype, device="meta"), param.requires_grad)
        for name, param in module.named_parameters()
    ]


def _run(module: nn.Module, batch: Any, dtype: torch.dtype, autocast: bool, setting: Setting) -> Trace:
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    def step(model: nn.Module, inputs: Any) -> Tensor:
        with context:
            return _models.loss_of(model, inputs)

    try:
        return _trace.trace_step(module, batch, step, setting.device)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PlanError(
            f"the step of {type(module).__name__} asks for values ({_said(error)}), which tensors without memory do "
            "not have: sizes that depend on data cannot be planned. Make the choice by shape, or count weights alone "
            "(give the .safetensors or .pt file)"
        ) from error
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise PlanError(
            f"a step of {type(module).__name__} with batch {setting.batch} and length {setting.length or 'default'} "
            f"failed: {type(error).__name__}: {_said(error)}"
        ) from error


def _of_weights(model: Weights, dtype: torch.dtype) -> Traced:
    shapes, buffers = [], 0
    for name, (sizes, kept) in model.tensors.items():
        if kept.is_floating_point:
            shapes.append(Shape(name, torch.empty(sizes, dtype=dtype, device="meta"), True))
        else:
            buffers += rounded(torch.empty(sizes, dtype=kept, device="meta").nbytes)
    return Traced(shapes, buffers, None, [])


def largest_batch(planner: Planner, choice: Choice, setting: Setting, card: int, most: int = 1 << 16) -> int:
    """The largest batch whose step a card of ``card`` bytes takes; 0: none.

    Steps are traced at batches that a straight line through the last two points to, then by halves, until one fits and
    one that is 1 or 2 % larger does not.
    """
    sizes: dict[int, int] = {}

    def total(batch: int) -> int:
        if batch not in sizes:
            sizes[batch] = planner.row(choice, setting._replace(batch=batch)).total
        return sizes[batch]

    def fits(batch: int) -> bool:
        return total(batch) <= _room(card)

    low, high = 0, most + 1  # fits, does not
    guess = setting.batch
    for turn in range(40):
        if high - low <= max(1, low // 50):
            break
        guess = min(max(guess, low + 1), high - 1)
        if fits(guess):
            low = guess
        else:
            high = guess
        if turn == 0:
            guess = 2 * guess if low else guess // 2
        elif turn < 4:  # a straight line through the two last points
            a, b = list(sizes)[-2:]
            slope = max(1.0, (sizes[b] - sizes[a]) / (b - a))
            guess = b + int((_room(card) - sizes[b]) // slope)
        else:
            guess = (low + high) // 2
    return low


def plan(model: Model | Weights, choices: Sequence[Choice], setting: Setting) -> list[Row]:
    """One row for each choice, in their order."""
    planner = Planner(model)
    return [planner.row(choice, setting) for choice in choices]


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


__all__ = ["CONTEXT_BYTES", "FRAGMENTATION", "GIB", "Planner", "Row", "Setting", "Traced", "largest_batch", "plan"]
