"""What a plan is made for: a Hugging Face configuration, a file of weights, or a function that makes a module."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class PlanError(ValueError):
    """What a user can mend: a model that cannot be read or run, an option that does not fit it."""


class Weights(NamedTuple):
    """Tensors of a file: names, shapes and dtypes alone. Nothing is known of a step."""

    name: str
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]


class Model(NamedTuple):
    """A module that can be made on any device, with batches and a loss."""

    name: str
    #: Makes the module on the current device, in the current default dtype.
    make: Callable[[], nn.Module]
    #: Of the module, the batch and the length (tokens of a sequence, or the side of a picture; None: its own): what
    #: forward() is called with, on the current device: a dict, or a tuple.
    batch_of: Callable[[nn.Module, int, int | None], Any]
    #: Makes the module recompute its blocks in the backward pass.
    checkpoint: Callable[[nn.Module], None]
    #: Holds while a step of tensors without memory runs.
    while_traced: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load(model: str) -> Model | Weights:
    """What ``plan`` is given: a path, or ``module:function``.

    Raises:
        PlanError: there is no such thing, or something that it needs is not installed.
    """
    path = Path(model)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _hugging_face(path)
        files = sorted(path.glob("*.safetensors"))
        if files:
            return Weights(path.name, {name: one for file in files for name, one in _safetensors(file).items()})
        raise PlanError(f"the folder {model!r} holds neither config.json nor *.safetensors")
    if path.is_file():
        if path.suffix == ".json":
            return _hugging_face(path)
        if path.suffix == ".safetensors":
            return Weights(path.name, _safetensors(path))
        if path.suffix in (".pt", ".pth", ".bin"):
            return Weights(path.name, _torch_file(path))
        raise PlanError(f"{model!r} is a {path.suffix or 'file without suffix'}; allowed: .json, .safetensors, .pt")
    module, colon, function = model.rpartition(":")
    if colon and module and function.isidentifier() and os.sep not in function:
        return _function(module, function)
    raise PlanError(
        f"there is no file or folder {model!r}; allowed are a Hugging Face config.json or its folder, a .safetensors "
        "or .pt file, and module:function (a Python function that makes a torch module)"
    )


# Files of weights


def _safetensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise PlanError("reading .safetensors needs the package safetensors: pip install safetensors") from error
    try:
        with torch.device("meta"), safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return {name: (tuple(one.get_shape()), _SAFETENSORS[one.get_dtype()]) for name, one in slices.items()}
    except (SafetensorError, OSError, KeyError) as error:
        raise PlanError(f"{str(path)!r} cannot be read as safetensors: {error}") from error


_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _torch_file(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    try:
        held = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"{str(path)!r} cannot be read by torch.load(weights_only=True): {reason}") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(held, dict) and isinstance(held.get(key), dict):
            held = held[key]
    tensors = (
        {str(key): value for key, value in held.items() if isinstance(value, Tensor)} if hasattr(held, "items") else {}
    )
    if not tensors:
        raise PlanError(f"{str(path)!r} holds no tensors by name; allowed is a model's state_dict()")
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


# Hugging Face


def _hugging_face(path: Path) -> Model:
    if importlib.util.find_spec("transformers") is None:
        raise PlanError(
            f"{str(path)!r} is a Hugging Face configuration, which needs transformers: pip install transformers. "
            "(Its weights alone can be counted: give the .safetensors files)"
        )
    import transformers

    file = path / "config.json" if path.is_dir() else path
    try:
        written = json.loads(file.read_text())
        config = transformers.AutoConfig.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise PlanError(f"{str(file)!r} is no configuration that transformers reads: {_first_line(error)}") from error
    names = list(written.get("architectures") or [])
    if not names:
        raise PlanError(f'{str(file)!r} names no architecture; add "architectures": ["LlamaForCausalLM"] or the like')
    architecture = getattr(transformers, names[0], None)
    if architecture is None:
        raise PlanError(f"transformers {transformers.__version__} has no {names[0]}, which {str(file)!r} names")
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a training step keeps no cache

    def make() -> nn.Module:
        module: nn.Module = architecture._from_config(config, dtype=torch.get_default_dtype())
        return module.train()

    return Model(names[0], make, _hugging_face_batch, _checkpoint_hugging_face, _one_sequence_a_row)


@contextlib.contextmanager
def _one_sequence_a_row() -> Iterator[None]:
    """transformers looks at values for sequences that share a row, and makes a mask where it cannot: there are none."""
    masks: Any = importlib.import_module("transformers.masking_utils")
    found = getattr(masks, "find_packed_sequence_indices", None)
    if found is None:  # versions that do not look
        yield
        return
    masks.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masks.find_packed_sequence_indices = found


def _hugging_face_batch(model: nn.Module, batch: int, length: int | None) -> dict[str, Tensor]:
    config: Any = model.config
    name, text = type(model).__name__, getattr(config, "get_text_config", lambda: config)()
    if model.main_input_name == "input_ids":
        longest = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048
        if length is not None and length > longest:
            raise PlanError(f"--sequence {length} is not allowed; the model's positions end at {longest}")
        count = length or min(2048, longest)
        ids = torch.randint(0, text.vocab_size, (batch, count))
        if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")):
            return {"input_ids": ids, "labels": ids}
        if name.endswith("ForTokenClassification"):
            return {"input_ids": ids, "labels": torch.zeros_like(ids)}
        if name.endswith("ForSequenceClassification"):
            return {"input_ids": ids, "labels": torch.zeros(batch, dtype=torch.int64)}
        return {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        size = length or getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        made = {"pixel_values": torch.randn(batch, getattr(config, "num_channels", 3), height, width)}
        if name.endswith("ForImageClassification"):
            made["labels"] = torch.zeros(batch, dtype=torch.int64)
        return made
    raise PlanError(
        f"{name} takes {model.main_input_name!r}, of which plan knows no batch; write a function that makes the module "
        "and a batch, and give it as module:function"
    )


def _checkpoint_hugging_face(model: Any) -> None:
    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise PlanError(f"--checkpoint: {_first_line(error)}") from error


# Functions


def _function(module_name: str, function_name: str) -> Model:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PlanError(f"{module_name!r} cannot be imported: {_first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise PlanError(f"{module_name!r} has no function {function_name!r}")
    required = [
        one.name
        for one in inspect.signature(function).parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if required:
        raise PlanError(f"{module_name}:{function_name} needs {', '.join(required)}; allowed is one without arguments")

    def made() -> tuple[nn.Module, Any]:
        result = function()
        parts = result if isinstance(result, tuple) else (result, None)
        if len(parts) != 2 or not isinstance(parts[0], nn.Module) or not (parts[1] is None or callable(parts[1])):
            raise PlanError(
                f"{module_name}:{function_name} returned {type(result).__name__}; allowed are a torch module, and a "
                "pair of a module and a function of batch and length that makes what forward() takes"
            )
        return parts

    def batch_of(model: nn.Module, batch: int, length: int | None) -> Any:
        batch_function = getattr(model, "_flashoptim_batch_function", None)
        if batch_function is None:
            return _guessed_batch(model, batch, length)
        return batch_function(batch, length)

    def make() -> nn.Module:
        module, batch_function = made()
        module._flashoptim_batch_function = batch_function
        return module.train()

    return Model(f"{module_name}:{function_name}", make, batch_of, _checkpoint_blocks)


def _guessed_batch(model: nn.Module, batch: int, length: int | None) -> tuple[Tensor, ...]:
    """A batch for the first layer of a module that came without one."""
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            return (torch.randint(0, layer.num_embeddings, (batch, length or 512)),)
        if isinstance(layer, nn.Conv2d):
            return (torch.randn(batch, layer.in_channels, length or 224, length or 224),)
        if isinstance(layer, nn.Conv1d):
            return (torch.randn(batch, layer.in_channels, length or 512),)
        if isinstance(layer, nn.Linear):
            return (torch.randn(batch, layer.in_features),)
    raise PlanError(
        f"{type(model).__name__} has no layer whose inputs can be guessed; return (module, batch), where batch(size, "
        "length) makes what forward() takes"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model repeats: children of its outermost lists of two or more modules of one class."""
    found: list[nn.Module] = []
    simple = (nn.Linear, nn.Conv2d, nn.ModuleList, nn.Sequential)

    def look(module: nn.Module) -> None:
        children = list(module.children())
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
        is_equal = is_list and len({type(child) for child in children}) == 1
        if is_equal and any(children[0].parameters()) and not isinstance(children[0], simple):
            found.extend(children)
            return
        for child in children:
            look(child)

    look(model)
    return found


def _checkpoint_blocks(model: Any) -> None:
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
        return
    blocks = blocks_of(model)
    if not blocks:
        raise PlanError(f"--checkpoint: {type(model).__name__} has no list of equal blocks to checkpoint")
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# Loss


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a batch: the output's own, or one that is usual for its shape.

    Cross entropy for [batch, classes] and for tokens' [batch, length, vocabulary], the mean square for all else.
    """
    output = model(**batch) if isinstance(batch, dict) else model(*batch) if isinstance(batch, tuple) else model(batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    values = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
    del output
    if values is None:
        raise PlanError(f"{type(model).__name__} gave no tensor that a loss could be made of")
    if values.dim() == 0:
        return values
    tokens = next(iter(_tensors(batch)), None)
    if values.dim() == 2:
        return F.cross_entropy(values, torch.zeros(values.shape[0], dtype=torch.int64, device=values.device))
    if tokens is not None and not tokens.is_floating_point() and values.shape[:-1] == tokens.shape:
        return F.cross_entropy(values.flatten(0, -2), tokens.flatten())
    return F.mse_loss(values, torch.zeros_like(values))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


__all__ = ["Model", "PlanError", "Weights", "blocks_of", "default_dtype", "load", "loss_of"]
