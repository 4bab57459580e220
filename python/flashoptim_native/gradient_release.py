"""Gradient release: every parameter is stepped as soon as its gradient is complete, and the gradient is freed at once.

Hooks of the parameters do it, during backward(); the step is ``optimizer.step_param``, so every bit is as without.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._parameters import name_of
from ._store import Store
from .optimizer import FlashOptimizer

PreStep = Callable[[Tensor, dict[str, Any]], Any]

# The optimizer keeps its _Release under this name. Copies and pickles of it have none.
_ATTRIBUTE = "_gradient_release"


class _Watched(NamedTuple):
    """A parameter of the optimizer, and its hook; None: it is not released, but left to optimizer.step()."""

    param: Tensor
    hook: RemovableHandle | None


class _Pending(NamedTuple):
    """A release that is under way: where an interrupt comes into it, what is left to do can be told."""

    param: Tensor
    grad: Tensor
    store: Store
    steps: int  # of the store, before it


class _ReleaseHook:
    """What a parameter calls once its gradient is complete. It does not keep the optimizer alive."""

    def __init__(self, release: _Release) -> None:
        self._release = weakref.ref(release)

    def owner(self) -> _Release | None:
        release = self._release()
        return release if release is not None and release.active else None

    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.release(param)


class _Release:
    """Gradient release of one optimizer, which holds it; it does not hold the optimizer, so that both die at once."""

    def __init__(self, optimizer: FlashOptimizer, left_to_step: Iterable[Tensor], pre_step: PreStep | None) -> None:
        self._optimizer_ref = weakref.ref(optimizer)
        self._pre_step = pre_step
        self._watched = {id(param): _Watched(param, None) for param in left_to_step}
        self._accumulating = 0
        self._released: set[int] = set()  # since the last optimizer.step() or zero_grad()
        self._pending: _Pending | None = None
        self._active = True
        self._lock = threading.RLock()  # backward() has a thread for every device
        try:
            self._watch_parameters()
        except BaseException:
            self._unwatch_all()
            raise
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        # Not kept here as well: methods of self in self would be a cycle.
        vars(optimizer).update(
            {"add_param_group": self._add_param_group, "zero_grad": self._zero_grad, _ATTRIBUTE: self}
        )

    @property
    def active(self) -> bool:
        return self._active

    @property
    def _optimizer(self) -> FlashOptimizer:
        optimizer = self._optimizer_ref()
        if optimizer is None:
            raise RuntimeError("gradient release goes on without its optimizer; please report this")
        return optimizer

    def remove(self) -> None:
        if not self._active:
            return
        self._active = False
        self._unwatch_all()
        self._step_hook.remove()
        attributes = vars(self._optimizer)
        for name in ("add_param_group", "zero_grad", _ATTRIBUTE):
            value = attributes.get(name)
            if value is self or getattr(value, "__self__", None) is self:  # nobody has put another in its place
                del attributes[name]

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def release(self, param: Tensor) -> None:
        """Steps a parameter whose gradient is complete, and frees the gradient."""
        if not self._active or self._accumulating or param.grad is None:
            return
        with self._lock:
            self._settle()
            if id(param) in self._released:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} is complete a second time since "
                    "optimizer.step() or zero_grad() was called, and the first one has been applied already. Gradient "
                    "release allows one backward() a step: run all but the last inside `with handle.accumulate():`, "
                    "call optimizer.step() after each, and checkpoint blocks that share parameters with "
                    "use_reentrant=False"
                )
            if self._pre_step is None or self._wants_step(self._pre_step, param):
                store = self._optimizer._store
                self._pending = _Pending(param, param.grad, store, store.steps())
                self._optimizer.step_param(param)
            param.grad = None
            self._released.add(id(param))
            self._pending = None

    def _settle(self) -> None:
        """Ends a release that an interrupt has left between the step and the end of its gradient."""
        pending = self._pending
        if pending is not None and pending.store is self._optimizer._store and pending.store.steps() != pending.steps:
            if pending.param.grad is pending.grad:
                pending.param.grad = None
            self._released.add(id(pending.param))
        self._pending = None

    def _wants_step(self, pre_step: PreStep, param: Tensor) -> bool:
        answer = pre_step(param, self._group_of(param))
        if answer is None or isinstance(answer, bool):
            return answer is not False
        if isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.numel() == 1:
            return bool(answer.item())
        what = f"a tensor of dtype {answer.dtype}" if isinstance(answer, Tensor) else repr(answer)
        raise TypeError(f"pre_step returned {what}; allowed are None and True (step) and False (do not)")

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self._optimizer.param_groups:
            if any(param is other for other in group["params"]):
                return group
        raise ValueError(f"a parameter of shape {tuple(param.shape)} is in no group of this optimizer")

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if getattr(optimizer, "found_inf", None) is not None:
            # GradScaler.step() has set them, and will not come to removing them.
            for name in ("found_inf", "grad_scale"):
                if name in vars(optimizer):
                    delattr(optimizer, name)
            raise RuntimeError(
                "GradScaler.step() was called while gradient release is enabled: the gradients were applied during "
                "backward(), without division by the scale. Train in bfloat16 without a GradScaler, or without "
                "gradient release (handle.remove())"
            )
        _check_not_distributed()
        self._settle()
        self._watch_parameters()
        self._released.clear()

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self._settle()
        type(self._optimizer).zero_grad(self._optimizer, set_to_none)
        self._released.clear()

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        optimizer = self._optimizer
        type(optimizer).add_param_group(optimizer, param_group)
        try:
            self._watch_parameters()
        except BaseException:
            optimizer.param_groups.pop()
            raise

    def _watch_parameters(self) -> None:
        """Gives a hook to parameters that are new in the groups, and takes it from those that have left them."""
        groups = self._optimizer.param_groups
        current = {id(param): param for group in groups for param in group["params"]}
        for key in [key for key, watched in self._watched.items() if current.get(key) is not watched.param]:
            hook = self._watched.pop(key).hook
            if hook is not None:
                hook.remove()
        if len(self._watched) == len(current):
            return
        new = [(index, i, p) for index, g in enumerate(groups) for i, p in enumerate(g["params"])]
        new = [(index, i, p) for index, i, p in new if id(p) not in self._watched]
        for index, position, param in new:
            _check_parameter(param, name_of(groups, index, position))
        for _, _, param in new:
            self._watched[id(param)] = _Watched(param, _register_hook(param, _ReleaseHook(self)))

    def _unwatch_all(self) -> None:
        for watched in self._watched.values():
            if watched.hook is not None:
                watched.hook.remove()
        self._watched.clear()


class GradientReleaseHandle:
    """What enable_gradient_release() returns: ends gradient release by remove(), or as a context manager.

    It need not be kept; where it is, it keeps the optimizer.
    """

    def __init__(self, optimizer: FlashOptimizer, release: _Release) -> None:
        self._optimizer = optimizer
        self._release = release

    @property
    def active(self) -> bool:
        """Whether gradients are released: True until remove()."""
        return self._release.active

    def remove(self) -> None:
        """Ends gradient release: gradients are kept, and optimizer.step() steps. Calling it again does nothing."""
        self._release.remove()

    def __enter__(self) -> GradientReleaseHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """A context in which backward() keeps gradients and adds to them: for every micro-batch but the last.

        The last one, outside, steps each parameter by the sum. Parameters that it does not reach keep theirs for
        optimizer.step().
        """
        return self._release.accumulate()


def enable_gradient_release(
    model_or_params: nn.Module | Tensor | Iterable[Any],
    optimizer: FlashOptimizer,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    pre_step: PreStep | None = None,
) -> GradientReleaseHandle:
    """Steps every parameter during backward(), as soon as its gradient is complete, and frees the gradient at once.

    So one ``p.grad`` is alive at a time, where there would be one for every parameter. ``optimizer.step()`` and
    ``zero_grad()`` stay in the training loop: they find nothing to do, and step() returns its closure's loss. For one
    process; see docs/python_api.md, "Gradient release".

    Args:
        model_or_params: a module, a parameter, or parameters (as tensors or pairs of name and tensor). All trainable
            ones must be the optimizer's. Other parameters of the optimizer are left to ``optimizer.step()``, except
            those of groups added later, which are released too.
        optimizer: a Flash optimizer.
        grad_scaler: None, or one that is disabled: loss scaling does not go with gradient release.
        pre_step: called as ``pre_step(param, group)`` before each step; it may change ``param.grad``, for instance clip
            it by the parameter's own norm. Where it returns False, the gradient is freed without a step.

    Raises:
        TypeError: an argument is of a wrong type, the model is wrapped in DistributedDataParallel or
            FullyShardedDataParallel, or a parameter is a DTensor.
        ValueError: a trainable parameter is in no group of the optimizer, or there is none at all.
        NotImplementedError: ``grad_scaler`` is enabled.
        RuntimeError: gradient release is enabled already, for this optimizer or for one of the parameters by another;
            or torch.distributed runs more than one process.
    """
    if not isinstance(optimizer, FlashOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")
    if pre_step is not None and not callable(pre_step):
        raise TypeError(
            f"pre_step = {pre_step!r} is not callable; allowed are None and a function of a parameter and its group"
        )
    _check_grad_scaler(grad_scaler)
    named = _named_parameters(model_or_params)
    _check_not_distributed()
    if getattr(optimizer, _ATTRIBUTE, None) is not None:
        raise RuntimeError("gradient release is enabled for this optimizer already; end it first: handle.remove()")
    owned = {id(param): param for group in optimizer.param_groups for param in group["params"]}
    chosen = set()
    for name, param in named:
        if id(param) in owned:
            chosen.add(id(param))
        elif param.requires_grad:
            raise ValueError(
                f"{name} of shape {tuple(param.shape)} is in no group of the optimizer; allowed are the optimizer's "
                "own parameters and frozen ones. Where several optimizers share a model, hand each its own parameters"
            )
    if not chosen:
        raise ValueError("model_or_params holds no parameter of the optimizer: there is nothing to release")
    left_to_step = [param for key, param in owned.items() if key not in chosen]
    return GradientReleaseHandle(optimizer, _Release(optimizer, left_to_step, pre_step))


def _named_parameters(model_or_params: Any) -> list[tuple[str, Tensor]]:
    """The parameters with names for messages."""
    if isinstance(model_or_params, nn.Module):
        wrapper = _distributed_wrapper(model_or_params)
        if wrapper is not None:
            raise TypeError(
                f"the model is wrapped in {wrapper}, which reduces gradients after backward() has released them; "
                "allowed is a model in one process, or training without gradient release"
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


def _check_grad_scaler(grad_scaler: Any) -> None:
    if grad_scaler is None:
        return
    if not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler is a {type(grad_scaler).__name__}; allowed are None and a torch.amp.GradScaler")
    if grad_scaler.is_enabled():
        raise NotImplementedError(
            "grad_scaler is enabled: whether to skip a step is known when all gradients are, and then they have been "
            "released. Allowed are None and a disabled GradScaler; train in bfloat16, which needs no loss scaling"
        )


def _check_not_distributed() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            f"torch.distributed runs {distributed.get_world_size()} processes, and each would step by its own "
            "gradients before they are reduced; gradient release is allowed in one process. Train without it "
            "(handle.remove())"
        )


def _check_parameter(param: Tensor, name: str) -> None:
    if hasattr(param, "device_mesh"):
        raise TypeError(f"{name} is a DTensor; gradient release is allowed with plain tensors, in one process")
    for hook in (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values():
        if isinstance(hook, _ReleaseHook) and hook.owner() is not None:
            raise RuntimeError(
                f"gradient release of {name} is enabled already by another optimizer; end it first (handle.remove())"
            )


def _register_hook(param: Tensor, hook: _ReleaseHook) -> RemovableHandle:
    """Registers the hook, on a frozen parameter too: it waits there until the parameter is trained."""
    is_frozen = not param.requires_grad
    if is_frozen:
        param.requires_grad_(True)
    try:
        removable: RemovableHandle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return removable
    finally:
        if is_frozen:
            param.requires_grad_(False)


__all__ = ["GradientReleaseHandle", "enable_gradient_release"]
