"""What gradient release is given: a module or parameters, with names for messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")


def named_parameters(model_or_params: Any) -> list[tuple[str, Tensor]]:
    """The parameters with names for messages."""
    if isinstance(model_or_params, nn.Module):
        wrapper = _distributed_wrapper(model_or_params)
        if wrapper is not None:
            raise TypeError(
                f"the model is wrapped in {wrapper}, which keeps all gradients in buffers of its own and reduces them "
                "after backward() has released them; allowed are a model in one process and FSDP2 "
                "(torch.distributed.fsdp.fully_shard)"
            )
        return [(f"parameter {name!r}", param) for name, param in model_or_params.named_parameters()]
    if isinstance(model_or_params, Tensor):
        model_or_params = [model_or_params]
    if not isinstance(model_or_params, Iterable) or isinstance(model_or_params, (str, bytes, dict)):
        raise TypeError(
            f"model_or_params is a {type(model_or_params).__name__}; allowed are a torch.nn.Module, a parameter and an "
            "iterable of parameters"
        )
    named = []
    for index, item in enumerate(model_or_params):
        name, param = f"model_or_params[{index}]", item
        if isinstance(item, tuple) and len(item) == 2:
            name, param = f"parameter {item[0]!r}", item[1]
        if not isinstance(param, Tensor):
            raise TypeError(f"model_or_params[{index}] is a {type(param).__name__}; allowed are parameters")
        named.append((name, param))
    return named


def _distributed_wrapper(model: nn.Module) -> str | None:
    # By name: importing torch.distributed.fsdp takes seconds.
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel")
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in wrappers and cls.__module__.startswith("torch."):
                return cls.__name__
    return None


__all__ = ["check_model", "named_parameters"]
