"""Gradients that wait on the host for the norm of all, while they are released (``clip="exact"``)."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from . import _ops, _parameters
from ._release_clipping import Factor

#: Bytes of gradients that may be on their way back to the device before the step of the first of them is over.
_BYTES_AHEAD = 512 << 20


class Staging:
    """The gradients of one optimizer's released parameters, in host memory that is pinned once for all of them.

    Args:
        optimizer: whose parameters are released; held weakly. Its ``offload_pin`` says whether the memory is pinned.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = weakref.ref(optimizer)
        #: By id of a parameter: the parameter and its place on the host.
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        #: Those whose place holds a gradient, in the order in which they came.
        self._held: dict[int, Tensor] = {}
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}

    def add(self, param: Tensor) -> None:
        """Adds what the host holds of a parameter to its gradient, as backward() would."""
        if id(param) in self._held:
            grad = _parameters.plain(_grad_of(param))
            grad.add_(self._fetched(param, grad.device))

    def send(self, param: Tensor) -> None:
        """Copies a gradient to the host; it may be freed at once."""
        grad = _parameters.plain(_grad_of(param))
        place = self._place(param, grad)
        if grad.device.type == "cuda":
            down = self._streams_of(grad.device)[0]
            down.wait_stream(torch.cuda.current_stream(grad.device))
            with torch.cuda.stream(down):
                place.copy_(grad, non_blocking=True)
            grad.record_stream(down)
        else:
            place.copy_(grad)
        self._held[id(param)] = param

    @torch.no_grad()
    def step(self, optimizer: Any, factor: Factor) -> None:
        """Steps every parameter whose gradient is here. One that fails, and those behind it, stay for the next call."""
        ahead: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
        behind: deque[tuple[int, torch.cuda.Event]] = deque()  # bytes of steps, and their ends
        waiting = deque(reversed(self._held.values()))  # as forward() goes
        bytes_ahead = bytes_behind = 0
        while waiting or ahead:
            while waiting and (not ahead or bytes_ahead + waiting[0].nbytes <= _BYTES_AHEAD):
                param = waiting.popleft()
                # What is ahead of the device must not pile up in its memory.
                while bytes_behind > _BYTES_AHEAD:
                    size, end = behind.popleft()
                    end.synchronize()
                    bytes_behind -= size
                grad, there = self._bring(param)
                ahead.append((param, grad, there))
                bytes_ahead += grad.nbytes
            param, grad, there = ahead.popleft()
            bytes_ahead -= grad.nbytes
            if there is not None:
                torch.cuda.current_stream(grad.device).wait_event(there)
                grad.record_stream(torch.cuda.current_stream(grad.device))
            self._step_one(optimizer, param, grad, factor)
            if there is not None:
                end = torch.cuda.Event()  # type: ignore[no-untyped-call]
                end.record(torch.cuda.current_stream(grad.device))
                behind.append((grad.nbytes, end))
                bytes_behind += grad.nbytes

    def _step_one(self, optimizer: Any, param: Tensor, grad: Tensor, factor: Factor) -> None:
        _set_grad(param, grad)
        stepper = optimizer._stepper
        coefficient = factor.coefficient
        steps = stepper.store.steps()
        try:
            stepper.clip = None if coefficient is None else coefficient.to(grad.device).reshape(())
            stepper.step_param(param, optimizer.param_groups, optimizer.state, None, None)
        finally:
            param.grad = None
            if stepper.store.steps() != steps:
                del self._held[id(param)]

    def _bring(self, param: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A gradient on its way to the device, and the event of its arrival."""
        device = _parameters.plain(param).device
        place = self._places[id(param)][1]
        if device.type != "cuda":
            return place.clone(), None
        down, up = self._streams_of(device)
        up.wait_stream(down)
        with torch.cuda.stream(up):
            grad = torch.empty_strided(place.shape, place.stride(), dtype=place.dtype, device=device)
            grad.copy_(place, non_blocking=True)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record(up)
        return grad, there

    def _fetched(self, param: Tensor, device: torch.device) -> Tensor:
        grad, there = self._bring(param)
        if there is not None:
            torch.cuda.current_stream(device).wait_event(there)
            grad.record_stream(torch.cuda.current_stream(device))
        return grad

    def clear(self) -> None:
        """Forgets gradients that have not been stepped."""
        self._held.clear()

    def give_back(self) -> None:
        """Makes gradients that wait ``p.grad`` again, as accumulation leaves them."""
        for param in self._held.values():
            _set_grad(param, self._fetched(param, _parameters.plain(param).device))
        self._held.clear()

    def _streams_of(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if device not in self._streams:
            down = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            up = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device] = (down, up)
        return self._streams[device]

    def _place(self, param: Tensor, grad: Tensor) -> Tensor:
        known = self._places.get(id(param))
        if known is None or known[1].dtype != grad.dtype or known[1].shape != grad.shape:
            self._reserve(param, grad)
        return self._places[id(param)][1]

    def _reserve(self, param: Tensor, grad: Tensor) -> None:
        """Memory for this gradient and, of the first, for those of all parameters on its device."""
        optimizer = self._optimizer()
        params = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
        others = [p for p in params if p is not param and p.requires_grad and id(p) not in self._places]
        likes, owners = [_dense_like(grad)], [param]
        for other in others:
            local = _parameters.plain(other).detach()
            if local.device == grad.device:
                likes.append(_dense_like(local))
                owners.append(other)
        pin = grad.device.type == "cuda" and (optimizer is None or optimizer._offload.pin)
        for owner, place in zip(owners, _ops.host_buffers(likes, pin)):
            self._places[id(owner)] = (owner, place)


def _dense_like(tensor: Tensor) -> Tensor:
    """A tensor whose sizes, strides and dtype a dense copy has."""
    dense = torch.ops.aten.is_non_overlapping_and_dense(tensor)
    return tensor.detach() if dense else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _set_grad(param: Tensor, grad: Tensor) -> None:
    """Makes a local tensor the gradient of a parameter, which may be spread over processes."""
    local = _parameters.local(param)
    param.grad = grad if local.spec is None else _parameters.wrap(local, grad, tuple(param.shape), "the gradient")


def _grad_of(param: Tensor) -> Tensor:
    if param.grad is None:
        raise RuntimeError("a gradient is staged that is not there; please report this")
    return param.grad


__all__ = ["Staging"]
