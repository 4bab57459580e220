"""Clipping while gradients are released: each goes as it comes, and the norm of all is known when all have gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from . import _collectives, _validate

#: What ``clip=`` may be.
WAYS = ("exact", "two_pass", "previous", "parameter")


class Factor(NamedTuple):
    """What one gradient is multiplied with as it is read; ``found_inf``: other than 0 where no step is taken."""

    coefficient: Tensor | None = None
    found_inf: Tensor | None = None


class GradientClip:
    """Clips released gradients to a norm of ``max_norm``.

    exact: the norm of all; gradients wait until it is known.
    two_pass: the norm of all, measured by a backward() before the one that steps. Exact.
    previous: the norm of all, of steps before: ``decay`` times what it was plus ``1 - decay`` times the last one.
    parameter: each by its own norm.
    """

    def __init__(self, way: str, max_norm: float, decay: float, scaler: torch.amp.GradScaler | None) -> None:
        self.way = way
        self.max_norm = max_norm
        #: The norm of all gradients of the last step, unscaled; float32.
        self.norm: Tensor | None = None
        self.is_measuring = False
        self._decay = decay
        self.scaler = scaler
        self._squares: dict[int, tuple[Tensor, Tensor]] = {}  # by id: parameters, and the sum over what is here of each
        self._average: Tensor | None = None
        self._measured: Factor | None = None

    # One gradient

    def measure(self, param: Tensor) -> None:
        """Adds a gradient to the norm."""
        if id(param) in self._squares:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(param.shape)} is complete a second time inside "
                "measure_norm(), which takes one backward(). Checkpoint blocks that share parameters with "
                "use_reentrant=False"
            )
        self._squares[id(param)] = (param, next(iter(_collectives.sums_of_squares([param]).values())))

    def measure_again(self, param: Tensor) -> None:
        """A gradient in the norm, in the place of what was there of the same parameter."""
        self._squares.pop(id(param), None)
        self.measure(param)

    def factor_of_all(self, params: Iterable[Tensor]) -> Factor:
        """What every gradient of a step is multiplied with, once all have been measured."""
        return Factor(_collectives.clip_coefficient(self._total(params), self.max_norm)) if self._squares else Factor()

    def forget(self) -> None:
        """What has been measured is not stepped."""
        self._squares = {}

    def factor(self, param: Tensor) -> Factor:
        """What the step of a parameter multiplies its gradient with.

        Raises:
            RuntimeError: ``clip="two_pass"``, and no norm was measured.
        """
        if self.way == "two_pass":
            if self._measured is None:
                raise RuntimeError(
                    'gradient release with clip="two_pass" steps by the norm of all gradients, which was not measured: '
                    "call `with handle.measure_norm(): loss.backward(retain_graph=True)` before each loss.backward()"
                )
            return self._on(param, self._measured)
        self.measure(param)
        norm = self._average
        if self.way == "parameter" or norm is None:
            square = self._squares[id(param)][1]
            norm = _collectives.total_norm({_collectives.parts_of(param): square})
        return self._on(param, Factor(_collectives.clip_coefficient(norm, self.max_norm)))

    def factor_of_step(self) -> Factor:
        """The same for what is left to optimizer.step()."""
        if self.way == "two_pass" and self._measured is not None:
            return self._measured
        return Factor()

    @staticmethod
    def _on(param: Tensor, factor: Factor) -> Factor:
        """Tensors of one element where the parameter's memory is."""
        device = param.device
        return Factor(*(one if one is None else one.to(device).reshape(()) for one in factor))

    # All of them

    def begin_measuring(self) -> None:
        self._squares = {}
        self._measured = None
        self.is_measuring = True

    def end_measuring(self, optimizer: Any, params: Iterable[Tensor]) -> None:
        """The norm of what was measured, and what the next backward() multiplies gradients with.

        Raises:
            RuntimeError: nothing was measured.
        """
        self.is_measuring = False
        if not self._squares:
            raise RuntimeError(
                "no gradient was complete inside measure_norm(); allowed is one loss.backward(retain_graph=True)"
            )
        norm = self._total(params)
        if self.scaler is None:
            self._measured = Factor(_collectives.clip_coefficient(norm, self.max_norm))
        else:
            scale = self.scaler.get_scale()
            norm = norm / scale
            found_inf = norm.isfinite().logical_not().to(torch.float32)
            self._tell_scaler(self.scaler, optimizer, found_inf)
            self._measured = Factor(_collectives.clip_coefficient(norm, self.max_norm) / scale, found_inf)
        self.norm = norm
        self._squares = {}

    @staticmethod
    def _tell_scaler(scaler: torch.amp.GradScaler, optimizer: Any, found_inf: Tensor) -> None:
        # Its step() and update() look at gradients, which have gone; what they would have found is put where they
        # would have put it.
        state = scaler._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = {found_inf.device: found_inf.reshape(1)}
        state["stage"] = OptState.UNSCALED

    def finish(self, params: Iterable[Tensor]) -> None:
        """A step is over: all its gradients have been applied."""
        self._measured = None
        if self._squares:
            self.norm = self._total(params)
            if self.way == "previous":
                old = self._average
                self._average = self.norm if old is None else self._decay * old + (1.0 - self._decay) * self.norm
            self._squares = {}

    def norm_now(self, params: Iterable[Tensor]) -> Tensor:
        """The norm of the step under way, or of the last one; 0: there was none."""
        if self._squares and not self.is_measuring:
            return self._total(params)
        return torch.zeros(()) if self.norm is None else self.norm

    def _total(self, params: Iterable[Tensor]) -> Tensor:
        """In the order of groups, which backward() does not decide, and which all processes share."""
        sums: dict[Any, list[Tensor]] = {}
        for param in params:
            if id(param) in self._squares:
                sums.setdefault(_collectives.parts_of(param), []).append(self._squares[id(param)][1])
        totals = {}
        for parts, squares in sums.items():
            totals[parts] = torch.stack([square.to(squares[0].device) for square in squares]).sum()
        return _collectives.total_norm(totals)


def gradient_clip(way: Any, max_norm: Any, decay: Any, scaler: torch.amp.GradScaler | None) -> GradientClip | None:
    """What arguments ask for; None: no clipping.

    Raises:
        ValueError: an argument is not allowed, or one goes without the other.
        NotImplementedError: ``scaler`` is enabled, and the way is not "two_pass".
    """
    if way is not None:
        _validate.check_choice("clip", way, (None, *WAYS))
    if scaler is not None and not scaler.is_enabled():
        scaler = None
    if scaler is not None and way != "two_pass":
        raise NotImplementedError(
            f"grad_scaler is enabled, with clip = {way!r}: whether to skip a step is known when all gradients are, and "
            'then they have been released. Allowed are None, a disabled GradScaler, and clip="two_pass", which sees '
            "them first; bfloat16 needs no loss scaling"
        )
    if (way is None) != (max_norm is None):
        raise ValueError(f"clip = {way!r} with max_norm = {max_norm!r} is not allowed; allowed are both or neither")
    decay = _validate.check_range("norm_decay", decay, 0.0, 1.0)
    if decay != 0.0 and way != "previous":
        raise ValueError(f'norm_decay = {decay} with clip = {way!r} is not allowed; allowed with clip="previous"')
    if way is None:
        return None
    limit = _validate.check_range("max_norm", max_norm, 0.0)
    if limit == 0.0:
        raise ValueError("max_norm = 0.0 is not allowed; allowed is a finite number > 0")
    return GradientClip(way, limit, decay, scaler)


__all__ = ["WAYS", "Factor", "GradientClip", "gradient_clip"]
