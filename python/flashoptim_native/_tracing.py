"""What may be following a step beside Python: torch.compile, which traces it, and a CUDA graph, which records it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback


def outside_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile from tracing into a function, which works on real tensors' addresses.

    torch.compiler.disable does that; it takes seconds to import, so only where something is being compiled.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


__all__ = ["is_capturing", "outside_compile"]
