"""CUDA graphs that a step was captured in: what must hold before, and what a replay writes to afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._preparation import State
from ._store import Controls


class GraphCapture:
    """What captured CUDA graphs write to at every replay, beside parameters and gradients, which are the caller's.

    A graph outlives the states that load_state_dict() replaces.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []

    @staticmethod
    def check(groups: Sequence[dict[str, Any]]) -> None:
        """Raises RuntimeError where a step cannot be captured."""
        if not all(group["capturable"] for group in groups):
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph with capturable=False, because the host counts steps and "
                "reads lr: make the optimizer with capturable=True, and call step() once before the capture"
            )

    def keep_step(self, state: State, controls: list[Controls], lrs: Sequence[Tensor | None]) -> None:
        """A replay of the step being captured writes to these: they must not be freed before the optimizer is."""
        tensors = [value for held in state.values() for value in held.values() if isinstance(value, Tensor)]
        self._kept.append((tensors, controls, list(lrs)))

    def keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)


__all__ = ["GraphCapture"]
