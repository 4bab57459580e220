"""States on the host: which groups keep them there, and the memory that they are in (docs/offload.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _states, _validate
from ._parameters import Local, plain
from ._states import Format

#: What a group's ``offload`` may be.
STATES = "states"
CHOICES = (None, STATES)
#: Bytes of a slot at most, and slots of a ring at least.
_SLOT_BYTES = 64 << 20
_FEWEST_SLOTS = 4
_SMALLEST_BUFFER = 16 << 10
DEFAULT_BUFFER = 1 << 30

_simulated = False


def simulate(on: bool) -> None:
    """For tests: parameters on the CPU are stepped in a ring, too, with copies that come as late as they may."""
    global _simulated
    _simulated = on


class OffloadOptions(NamedTuple):
    """What an optimizer says of offloaded states.

    Args:
        pin: whether their memory is pinned. Pageable memory is copied at a fraction of the speed, and the host waits.
        buffer: bytes of device memory that they stream through.
    """

    pin: bool = True
    buffer: int = DEFAULT_BUFFER

    @classmethod
    def checked(cls, pin: Any, buffer: Any) -> OffloadOptions:
        """Raises TypeError or ValueError where an option is not allowed."""
        return cls(
            _validate.check_bool("offload_pin", pin),
            _validate.check_integer("offload_buffer", buffer, _SMALLEST_BUFFER),
        )

    def ring(self) -> tuple[int, int]:
        """Bytes of a slot, and slots."""
        slot = min(_SLOT_BYTES, self.buffer // _FEWEST_SLOTS)
        return slot, self.buffer // slot


def check_group(group: Mapping[str, Any], check_numerics: bool) -> None:
    """Raises ValueError where a group's ``offload`` is not allowed."""
    offload = _validate.check_choice("offload", group.get("offload"), CHOICES)
    if offload is not None and check_numerics:
        raise ValueError(
            f"offload = {offload!r} with check_numerics = True is not allowed: what a step does is looked at in states "
            "on the device. Allowed is either of them"
        )


class HostStates:
    """Memory for the states of one optimizer's offloaded parameters: one stretch for all that come to need it at once.

    Args:
        kind: name of the update rule, as the operators know it.
    """

    def __init__(self, kind: str, options: OffloadOptions) -> None:
        self._kind = kind
        self._options = options
        #: By id of a parameter: the parameter, the format and the arrays that wait for it.
        self._waiting: dict[int, tuple[Tensor, Format, dict[str, Any]]] = {}
        self._placed: set[int] = set()

    def clear(self) -> None:
        """Forgets what nobody has come for, and who has."""
        self._waiting.clear()
        self._placed.clear()

    def new_state(
        self, param: Tensor, local: Local, form: Format, name: str,
        others: Callable[[], Iterable[tuple[Tensor, Local, Format, str]]],
    ) -> dict[str, Any]:  # fmt: skip
        """A state of zeros on the host. ``others``: the parameters that need one, or will.

        Raises:
            RuntimeError: the parameter is not on a CUDA device, or the host does not give or pin the memory.
        """
        device = local.tensor.device
        if device.type != "cuda" and not _simulated:
            raise RuntimeError(
                f"{name} is on {device}, with offload = {STATES!r}: states are offloaded from CUDA devices to the "
                "host. Move the model to a CUDA device before the first step, or leave offload out"
            )
        waiting = self._waiting.pop(id(param), None)
        if waiting is None or waiting[1] != form:
            self._reserve(param, local, form, name, others)
            waiting = self._waiting.pop(id(param))
        self._placed.add(id(param))
        return waiting[2]

    def _reserve(
        self, param: Tensor, local: Local, form: Format, name: str,
        others: Callable[[], Iterable[tuple[Tensor, Local, Format, str]]],
    ) -> None:  # fmt: skip
        items = []
        for one in others():
            is_new = id(one[0]) not in self._placed and id(one[0]) not in self._waiting
            if one[0] is param:
                items.append((param, local, form, name))
            elif is_new and one[1].tensor.device == local.tensor.device:
                items.append(one)
        if all(one[0] is not param for one in items):
            items.insert(0, (param, local, form, name))
        pin = self._options.pin and local.tensor.device.type == "cuda"
        try:
            made = _states.host_states(self._kind, [one[1:] for one in items], pin)
        except RuntimeError as error:
            raise RuntimeError(f"{error}. {_ADVICE}") from error
        for (owner, _, kept, _), state in zip(items, made):
            self._waiting[id(owner)] = (owner, kept, state)

    def place(self, state: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
        """``state`` with its arrays in the memory of ``made``, a state of the same format."""
        result = dict(state)
        for key, array in made.items():
            if isinstance(array, Tensor) and key in state and key not in (_states.STEP, _states.STORAGE_ORDER):
                plain(array).copy_(plain(state[key]))
                result[key] = array
        return result


_ADVICE = (
    "Allowed are more of either (ulimit -l unlimited; in a container, --ulimit memlock=-1 and a larger memory limit), "
    "fewer groups with offload, or offload_pin=False, which copies at a fraction of the speed"
)


def is_simulated() -> bool:
    return _simulated


def host_memory() -> int:
    """Bytes of host memory for offloaded states that this process has at the moment."""
    return int(torch.ops.flashoptim.host_memory())


__all__ = ["CHOICES", "DEFAULT_BUFFER", "STATES", "HostStates", "OffloadOptions", "check_group", "host_memory"]
