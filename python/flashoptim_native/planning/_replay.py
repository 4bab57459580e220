"""From a step's trace to its peak, for each way to keep weights, gradients and states."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from ._trace import Event, Trace


class Holding(NamedTuple):
    """Allocations of one size that one operator made."""

    bytes: int
    times: int
    operator: str


class Peak(NamedTuple):
    """The most that is allocated at once during a step, by what it is for. Bytes."""

    #: "weights", "buffers", "inputs", "gradients", "states", "corrections", "scales", "activations", "temporaries",
    #: "libraries" (cuBLAS's workspaces), "communication".
    parts: dict[str, int]
    #: "forward", "backward" or "optimizer step".
    phase: str
    #: The largest of what the step itself has allocated then.
    largest: list[Holding]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class _Live:
    """What is allocated while a trace is walked through."""

    def __init__(self, releases: bool) -> None:
        self.releases = releases
        self.sizes: dict[int, int] = {}
        self.operators: dict[int, str] = {}
        self.gradients: set[int] = set()
        self.total = 0
        self.phase = "forward"

    def take(self, event: Event) -> int:
        """Applies an event; returns the bytes that are allocated, at the most, while it happens."""
        if event.kind == "allocate":
            self.sizes[event.storage] = event.size
            self.operators[event.storage] = event.operator
            self.total += event.size
        elif event.kind == "free" or (event.kind == "gradient" and self.releases):
            self.total -= self.sizes.pop(event.storage, 0)
        elif event.kind == "gradient":
            self.gradients.add(event.storage)
        elif event.kind == "workspace":
            return self.total + event.size
        elif event.kind == "backward":
            self.phase = "backward"
        return self.total


def kept_activations(trace: Trace) -> set[int]:
    """Storages of the forward pass that are alive when the backward pass begins."""
    alive: set[int] = set()
    for event in trace.events:
        if event.kind == "allocate":
            alive.add(event.storage)
        elif event.kind == "free":
            alive.discard(event.storage)
        elif event.kind == "backward":
            break
    return alive


def peak_of(trace: Trace, fixed: dict[str, int], releases: bool = False) -> Peak:
    """The peak of a step in which ``fixed`` is allocated all the time.

    Args:
        releases: gradients are freed as soon as they are complete (gradient release).
    """
    live = _Live(releases)
    best, at = -1, -1
    for index, event in enumerate(trace.events):
        total = live.take(event)
        if total > best:
            best, at = total, index
    live = _Live(releases)
    for event in trace.events[: at + 1]:
        live.take(event)
    kept = kept_activations(trace)
    parts = {"gradients": 0, "activations": 0, "temporaries": max(0, best - live.total)}
    for storage, size in live.sizes.items():
        part = "gradients" if storage in live.gradients else "activations" if storage in kept else "temporaries"
        parts[part] += size
    counts = Counter((size, live.operators[storage]) for storage, size in live.sizes.items())
    largest = [Holding(size, count, operator) for (size, operator), count in counts.items()]
    if best > live.total:
        largest.append(Holding(best - live.total, 1, f"{trace.events[at].operator}, workspace"))
    largest.sort(key=lambda one: -one.bytes * one.times)
    return Peak({**fixed, **parts}, live.phase, largest[:12])


__all__ = ["Holding", "Peak", "kept_activations", "peak_of"]
