"""The store behind an optimizer: its parameters as records, and the one way through a step.

The store proper is C++ (libtorch/store). It looks at every tensor at every step, by address, shape, strides and dtype,
and names the records of which something is not as it was described; ``_preparation.py`` sees to each of them: a state
is made, converted or left as it is, a parameter or gradient that lies otherwise is copied, and the record is described
anew. Then the C++ store steps. It holds parameters, but nothing of their states: what is taken out of
``optimizer.state`` is free at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import _ops
from ._offload import OffloadOptions
from ._preparation import PLAN_FIRST, Preparation, State
from ._records import Records
from ._tracing import outside_compile

#: Tensors of one plan that a step reads or writes: nonfinite, grad_divisor, clip_coefficient, found_inf, telemetry.
Controls = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_BESIDE = OffloadOptions()
#: Looks after which a store that still is not content has a fault.
_MOST_LOOKS = 5


class Store:
    """An optimizer's records, and their steps. Threads take turns.

    Args:
        kind: name of the update rule, as the operators know it.
        lock: another store's, of the same optimizer; None: a new one.
        offload: how offloaded states are kept.
    """

    def __init__(self, kind: str, lock: Any = None, offload: OffloadOptions = _BESIDE) -> None:
        #: Whoever steps, loads or shows states holds it; one optimizer's stores have one.
        self.lock: Any = threading.RLock() if lock is None else lock
        self.records = Records(kind, self.lock, offload)

    @outside_compile
    def step(
        self,
        state: State,
        hypers: Sequence[list[float]],
        lrs: Sequence[Tensor | None] | None,
        controls: Callable[[], list[Controls]],
        grad_scale: float,
        telemetry_stride: int,
        counts_on_device: bool,
    ) -> int:
        """One step of every parameter with a gradient; their number. Nothing has changed where it raises."""
        return self._run(
            state,
            counts_on_device,
            lambda staged: _ops.store.step(
                self.records.handle,
                state,
                staged,
                counts_on_device,
                hypers,
                lrs,
                controls(),
                grad_scale,
                max(1, telemetry_stride),
            ),
        )

    @outside_compile
    def gradient_norm(self, state: State, grad_scale: float, max_norm: float, result: Tensor) -> int:
        """The norm of all gradients, of one device and number of slots, to ``result``: 4 float32."""
        return self._run(
            state,
            False,
            lambda staged: _ops.store.gradient_norm(
                self.records.handle, state, staged, grad_scale, None, max_norm, result
            ),
        )

    def _run(self, state: State, counts_on_device: bool, call: Callable[[Any], Any]) -> int:
        with self.lock, Preparation(self.records, state) as preparation:
            for _ in range(_MOST_LOOKS):
                done = call(preparation.staged or None)
                if type(done) is int:
                    break
                preparation.see_to(done, counts_on_device)
                self.records.plan()
            else:
                raise RuntimeError(f"the records {done} cannot be described; please report this")
        return done

    @outside_compile
    def step_one(
        self,
        record: int,
        state: State,
        hypers: list[float],
        lr: Tensor | None,
        controls: Callable[[int], Controls],
        grad_scale: float,
        telemetry_stride: int,
        counts_on_device: bool,
    ) -> None:
        """One step of one parameter, which has a gradient."""
        records = self.records
        param = records.params[record]
        with self.lock, Preparation(records, state) as preparation:
            for _ in range(_MOST_LOOKS):
                held = state.get(param)
                if counts_on_device:
                    preparation.count_on_device([record])
                done = _ops.store.step_one(
                    self.records.handle,
                    record,
                    held if isinstance(held, dict) and held else None,
                    preparation.staged.get(record),
                    hypers,
                    lr,
                    controls(record),
                    grad_scale,
                    max(1, telemetry_stride),
                )
                if done == 1:
                    break
                if done == PLAN_FIRST:
                    records.plan()
                else:
                    preparation.see_to([record], False)
            else:
                raise RuntimeError(f"{records.name(record)} cannot be described; please report this")

    def flush(self) -> None:
        """A pass over offloaded states is over: what it has stepped goes home."""
        if self.records.is_offloading():
            with self.lock:
                _ops.store.flush(self.records.handle)

    def synchronize(self) -> None:
        """Waits until state tensors hold what the last step left, and steps will read what is written to them now."""
        with self.lock:
            _ops.store.synchronize(self.records.handle)

    def steps(self) -> int:
        """How many calls have stepped."""
        taken: int = _ops.store.steps(self.records.handle)
        return taken

    def make_states(self, state: State, params: Sequence[Tensor]) -> None:
        """States of zeros for ``params``, which have none; none is made where one cannot be."""
        with Preparation(self.records, state) as preparation:
            preparation.make_missing([self.records.first_of(param) for param in params])

    def conforming_state(self, record: int, state: State) -> dict[str, Any]:
        """The state of a parameter in the format of now: as it is, converted, or new."""
        with Preparation(self.records, state) as preparation:
            return preparation.conforming_state(record)


__all__ = ["Controls", "Store"]
