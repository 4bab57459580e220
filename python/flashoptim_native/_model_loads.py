"""Weights that are loaded into a model in training, and what becomes of the corrections of the weights before.

A correction belongs to certain weights. Weights that are edited from outside keep it, because a swap in and out must
come back to the same bits, and nobody can tell an edit that lasts from one that does not. ``load_state_dict()`` of a
module can be told. torch has no hook for the loads of all modules, and one in modules that ``cast_model`` has seen
would miss those cast by ``.to(torch.bfloat16)``; so the method itself is wrapped, once, when the first optimizer is
made. Around a load, every correction of the module's parameters is compared with the weights that it belongs to:

- the same weights as before, or those of the checkpoint that the correction came from: it stays;
- others: it is set to zero, and kept on the host until the parameter's next step, for the case that the weights it
  belongs to are loaded again (weights swapped in and out by load_state_dict).

A resume is exact in either order: a state dict of the optimizer says which weights its corrections belong to.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checksums, _corrections, _living, _parameters

#: Of ``state_dict()``: int64, for each parameter a checksum of the weights that its correction belongs to; 0: none.
KEY = "flashoptim_native.weights"
_here = threading.local()


class _Parked(NamedTuple):
    """A correction whose weights have been loaded over."""

    weights: int  # checksum of those that it belongs to
    correction: Tensor  # on the host


class WeightLoads:
    """Which weights the corrections of one optimizer belong to, from a load to the parameter's next step."""

    def __init__(self) -> None:
        # By parameter whose correction came from a checkpoint; None: of weights that the checkpoint does not name.
        self._origins: dict[Tensor, int | None] = {}
        self._parked: dict[Tensor, _Parked] = {}

    def expect(self, origins: Mapping[Tensor, int | None]) -> None:
        """Corrections were loaded, which belong to weights of these checksums, be they in the model already or not."""
        self._origins = dict(origins)
        self._parked = {}

    def forget(self, params: Iterable[Tensor]) -> None:
        """Corrections of ``params`` belong to the weights as they are now."""
        if self._origins or self._parked:
            for param in params:
                self._origins.pop(param, None)
                self._parked.pop(param, None)

    def settle(self, param: Tensor, correction: Tensor, before: int, now: int) -> bool:
        """Sees to the correction of a parameter that had weights of one checksum and has been loaded with another's.

        Returns whether the correction belongs to the weights of now.
        """
        belongs_to = self._origins.pop(param, before)
        if belongs_to in (None, now):
            return True
        local = _parameters.plain(correction)
        parked = self._parked.get(param)
        if parked is None:
            self._parked[param] = _Parked(belongs_to, local.to("cpu", copy=True))
        elif (
            parked.weights == now and parked.correction.shape == local.shape and parked.correction.dtype == local.dtype
        ):
            local.copy_(parked.correction)
            del self._parked[param]
            return True
        local.zero_()
        return False


def checksums(params: Sequence[Tensor]) -> list[int]:
    """Of every parameter's own bytes: of a sharded one, of this process's part."""
    plain = {number: {"weight": _parameters.plain(param).detach()} for number, param in enumerate(params)}
    return [int(value) for value in _checksums.of_states(plain, len(params)).tolist()]


def weights_of(params: Sequence[Tensor], state: Mapping[Any, Any]) -> Tensor:
    """What ``state_dict()`` holds under ``KEY``. Sharded parameters have no checksum: their shards may be others."""
    held = {
        number: {"weight": param.detach()}
        for number, param in enumerate(params)
        if _corrections.of(state, param) is not None
    }
    return _checksums.of_states(held, len(params))


def origins_of(saved: Any, params: Sequence[Tensor], state: Mapping[Any, Any]) -> dict[Tensor, int | None]:
    """Which weights the corrections of a loaded state dict belong to. ``saved``: what it holds under ``KEY``.

    Raises:
        ValueError: ``saved`` is not what ``state_dict()`` gives.
    """
    if saved is None:
        sums = [0] * len(params)
    elif isinstance(saved, Tensor) and saved.dtype == torch.int64 and saved.shape == (len(params),):
        sums = saved.tolist()
    else:
        raise ValueError(
            f"{KEY} of the state dict is {saved!r}; allowed is a 1-D int64 tensor of {len(params)} elements, one a "
            "parameter"
        )
    return {p: total or None for p, total in zip(params, sums) if _corrections.of(state, p) is not None}


def watch(optimizer: Any) -> None:
    """Has loads of any module see to this optimizer's corrections. It is held weakly.

    Threads that make their first optimizers at once may wrap the method twice; the inner wrapper then does nothing.
    """
    _living.add(optimizer)
    if not hasattr(nn.Module.load_state_dict, "_flashoptim_original"):
        nn.Module.load_state_dict = _watched(nn.Module.load_state_dict)  # type: ignore[method-assign]


def owners(module: nn.Module) -> list[tuple[Any, Tensor]]:
    """Every optimizer that is alive and holds parameters of a module, with each of them."""
    params = {id(param) for param in module.parameters()}
    return [
        (optimizer, param)
        for optimizer in _living.optimizers()
        for group in optimizer.param_groups
        for param in group["params"]
        if id(param) in params
    ]


def _watched(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _living.optimizers() or getattr(_here, "is_inside", False):
            return original(self, *args, **kwargs)
        owned = _owned(self)
        before = checksums([param for _, param, _ in owned])
        try:
            _here.is_inside = True
            return original(self, *args, **kwargs)
        finally:  # where it raises, it may have loaded some
            _here.is_inside = False
            _settle(owned, before)

    load_state_dict._flashoptim_original = original  # type: ignore[attr-defined]
    return load_state_dict


def _owned(module: nn.Module) -> list[tuple[Any, Tensor, Tensor]]:
    """Parameters of a module that have a correction, with the optimizers that keep it."""
    found = []
    for optimizer, param in owners(module):
        correction = _corrections.of(optimizer.state, param)
        if correction is not None:
            optimizer._store.synchronize()
            found.append((optimizer, param, correction))
    return found


@torch.no_grad()
def _settle(owned: Sequence[tuple[Any, Tensor, Tensor]], before: Sequence[int]) -> None:
    now = checksums([param for _, param, _ in owned])
    changed = {}
    for (optimizer, param, correction), old, new in zip(owned, before, now):
        if old != new:
            changed[id(optimizer)] = optimizer
            if not optimizer._stepper.loads.settle(param, correction, old, new):
                optimizer._store.records.remember_dtype(param)
    for optimizer in changed.values():
        optimizer.recompute_param_stats()


__all__ = ["KEY", "WeightLoads", "checksums", "origins_of", "owners", "watch", "weights_of"]
