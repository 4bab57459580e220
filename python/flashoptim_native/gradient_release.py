"""Gradient release: every parameter is stepped as soon as its gradient is complete, and the gradient is freed at once.

Hooks of the parameters do it, during backward(); the step is ``optimizer.step_param``, so every bit is as without.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._parameters import is_sharded, name_of, plain
from ._release_arguments import check_model, named_parameters
from ._release_clipping import GradientClip, gradient_clip
from ._release_staging import Staging
from ._store import Store
from ._validate import check_bool
from .optimizer import FlashOptimizer

PreStep = Callable[[Tensor, dict[str, Any]], Any]
ClipName = Literal["exact", "two_pass", "previous", "parameter"]

# The optimizer keeps its _Release under this name. Copies and pickles of it have none.
_ATTRIBUTE = "_gradient_release"
#: Methods of an optimizer that release takes the place of.
_REPLACED = ("add_param_group", "zero_grad", "clip_grad_norm_")


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

    def __init__(
        self,
        optimizer: FlashOptimizer,
        left_to_step: Iterable[Tensor],
        pre_step: PreStep | None,
        clip: GradientClip | None,
    ) -> None:
        self._optimizer_ref = weakref.ref(optimizer)
        self._pre_step = pre_step
        self.clip = clip
        self._staging = Staging(optimizer) if clip is not None and clip.way == "exact" else None
        self._watched = {id(param): _Watched(param, None) for param in left_to_step}
        self._accumulating = 0
        self._released: set[int] = set()  # since the last optimizer.step() or zero_grad()
        self._pending: _Pending | None = None
        self._loop_calls = False  # whether the loop calls either of them
        self._steps_by_backward = 0  # steps that only the next backward() has told the end of
        self._active = True
        self._lock = threading.RLock()  # backward() has a thread for every device
        try:
            self._watch_parameters()
        except BaseException:
            self._unwatch_all()
            raise
        self._step_hook = optimizer.register_step_pre_hook(self._before_step)
        # Not kept here as well: methods of self in self would be a cycle.
        places = (self._add_param_group, self._zero_grad, self._clip_grad_norm)
        vars(optimizer).update({**dict(zip(_REPLACED, places)), _ATTRIBUTE: self})

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
        if self._staging is not None:
            self._staging.give_back()
        self._active = False
        self._unwatch_all()
        self._step_hook.remove()
        attributes = vars(self._optimizer)
        for name in (*_REPLACED, _ATTRIBUTE):
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
        if not self._active or param.grad is None or (self._accumulating and self._staging is None):
            return
        with self._lock:
            self._settle()
            _wait_for_offloaded(param)
            if self._staging is not None and self.clip is not None:
                self._stage(self._staging, self.clip, param)
                return
            if self.clip is not None and self.clip.is_measuring:
                self.clip.measure(param)
                param.grad = None
                return
            if id(param) in self._released:
                self._begin_next_step(param)
            if self._pre_step is None or self._wants_step(self._pre_step, param):
                store = self._optimizer._store
                self._pending = _Pending(param, param.grad, store, store.steps())
                self._step(param)
            param.grad = None
            self._released.add(id(param))
            self._pending = None

    def _stage(self, staging: Staging, clip: GradientClip, param: Tensor) -> None:
        """Sends a gradient to the host, added to what is there of backward() passes before."""
        if self._pre_step is None or self._wants_step(self._pre_step, param):
            with torch.no_grad():
                staging.add(param)
                clip.measure_again(param)
                staging.send(param)
        param.grad = None

    def _settle(self) -> None:
        """Ends a release that an interrupt has left between the step and the end of its gradient."""
        pending = self._pending
        if pending is not None and pending.store is self._optimizer._store and pending.store.steps() != pending.steps:
            if pending.param.grad is pending.grad:
                pending.param.grad = None
            self._released.add(id(pending.param))
        self._pending = None

    def _step(self, param: Tensor) -> None:
        optimizer = self._optimizer
        if self.clip is None:
            optimizer.step_param(param)
            return
        coefficient, found_inf = self.clip.factor(param)
        optimizer._stepper.clip = coefficient
        optimizer._stepper.step_param(param, optimizer.param_groups, optimizer.state, None, found_inf)

    def _begin_next_step(self, param: Tensor) -> None:
        """A gradient is complete again: the next step of a loop that calls neither step() nor zero_grad(), or an error.

        It is that where the loop has called neither so far, and every gradient of the step before has come: in a
        backward() that reaches a parameter twice, or adds to gradients, some of them are yet to come.
        """
        trained = {key for key, one in self._watched.items() if one.hook is not None and one.param.requires_grad}
        if self._loop_calls or not trained <= self._released or _is_checkpoint_running():
            raise RuntimeError(
                "gradient release allows one backward() a step. Call optimizer.step() after each; run all but the last "
                "of those whose gradients are to be added inside `with handle.accumulate():`; and checkpoint blocks "
                f"that share parameters with use_reentrant=False. The gradient of a parameter of shape "
                f"{tuple(param.shape)} is complete a second time since optimizer.step() or zero_grad() was called, and "
                "the first one has been applied already"
            )
        self._steps_by_backward += 1
        self._finish()

    def _finish(self) -> None:
        """All gradients of a step have been applied."""
        if self.clip is not None and self._released:
            self.clip.finish(self.params())
        self._released.clear()

    def params(self) -> list[Tensor]:
        """The optimizer's parameters, in the order of its groups."""
        return [param for group in self._optimizer.param_groups for param in group["params"]]

    @contextlib.contextmanager
    def measure_norm(self) -> Iterator[None]:
        clip = self.clip
        if clip is None or clip.way != "two_pass":
            way = None if clip is None else clip.way
            raise RuntimeError(f'measure_norm() with clip = {way!r}; allowed with clip="two_pass"')
        if not self._active or self._accumulating or clip.is_measuring:
            raise RuntimeError(
                "measure_norm() inside accumulate() or itself, or after remove(); allowed is one at a time, while "
                "gradients are released"
            )
        if any(param.grad is not None for param in self.params()):
            raise RuntimeError(
                "measure_norm() while there are gradients, to which backward() would add twice (those of accumulate() "
                'have no place beside clip="two_pass"); call optimizer.zero_grad() first'
            )
        self._finish()
        clip.begin_measuring()
        try:
            yield
            with torch.no_grad():
                for param in self.params():
                    if param.grad is not None:  # left to optimizer.step()
                        clip.measure(param)
                        param.grad = None
                clip.end_measuring(self._optimizer, self.params())
        finally:
            clip.is_measuring = False

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

    @torch.no_grad()
    def _clip_grad_norm(self, max_norm: float) -> Tensor:
        """In the place of the optimizer's."""
        if self.clip is None:
            raise RuntimeError(
                f"clip_grad_norm_({max_norm}) while gradients are released would clip nothing: their norm is known "
                'when all have been applied. Allowed is enable_gradient_release(..., clip="exact" (gradients wait on '
                f'the host), "two_pass" (by two backward passes), "previous" or "parameter", max_norm={max_norm})'
            )
        if max_norm != self.clip.max_norm:
            raise ValueError(
                f"max_norm = {max_norm} is not allowed while gradients are released; allowed is what "
                f"enable_gradient_release() was given, {self.clip.max_norm}, by which they have been clipped already"
            )
        return self.clip.norm_now(self.params())

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        is_scaled = self.clip is not None and self.clip.scaler is not None
        if getattr(optimizer, "found_inf", None) is not None and not is_scaled:
            # GradScaler.step() has set them, and will not come to removing them.
            for name in ("found_inf", "grad_scale"):
                if name in vars(optimizer):
                    delattr(optimizer, name)
            raise RuntimeError(
                "GradScaler.step() was called while gradient release is enabled: the gradients were applied during "
                "backward(), without division by the scale. Train in bfloat16 without a GradScaler, or give it to "
                'enable_gradient_release(grad_scaler=, clip="two_pass"), or end gradient release (handle.remove())'
            )
        for watched in self._watched.values() if _processes() > 1 else ():
            if watched.hook is not None:
                _check_reduced(watched.param, "a released parameter")
        if self._steps_by_backward and not self._loop_calls:
            self._loop_calls = True
            raise RuntimeError(
                f"{self._steps_by_backward + 1} backward() passes came before the first optimizer.step(), and each has "
                "been a step of its own already. To add their gradients, run all but the last inside `with "
                "handle.accumulate():`. From here on one backward() a step is allowed"
            )
        self._loop_calls = True
        self._settle()
        self._watch_parameters()
        if self.clip is not None:
            if self._staging is not None:
                self._staging.step(optimizer, self.clip.factor_of_all(self.params()))
                self.clip.finish(self.params())
            else:
                vars(optimizer)["_stepper"].clip = self.clip.factor_of_step().coefficient
        self._finish()

    def _zero_grad(self, set_to_none: bool = True) -> None:
        self._settle()
        if self._staging is not None and self.clip is not None:
            self._staging.clear()
            self.clip.forget()
        type(self._optimizer).zero_grad(self._optimizer, set_to_none)
        self._loop_calls = True
        self._finish()

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        optimizer = self._optimizer
        count = len(optimizer.param_groups)
        type(optimizer).add_param_group(optimizer, param_group)
        try:
            self._watch_parameters()
        except BaseException:
            del optimizer.param_groups[count:]
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

    @property
    def grad_norm(self) -> Tensor | None:
        """With ``clip=``, the norm of all gradients of the last step, before clipping and unscaled; None: no step yet.

        A float32 tensor of no dimensions. With "two_pass" it is there once measure_norm() ends, otherwise once the step
        does.
        """
        clip = self._release.clip
        return None if clip is None else clip.norm

    def measure_norm(self) -> contextlib.AbstractContextManager[None]:
        """A context, for ``clip="two_pass"``, in which backward() frees gradients after adding them to the norm.

            with handle.measure_norm():
                loss.backward(retain_graph=True)
            loss.backward()  # steps, by gradients that are clipped

        Raises:
            RuntimeError: ``clip`` is another, there are gradients already, or no gradient came.
        """
        return self._release.measure_norm()

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
    clip: ClipName | None = None,
    max_norm: float | None = None,
    norm_decay: float = 0.0,
) -> GradientReleaseHandle:
    """Steps every parameter during backward(), as soon as its gradient is complete, and frees the gradient at once.

    So one ``p.grad`` is alive at a time, where there would be one for every parameter. ``optimizer.step()`` and
    ``zero_grad()`` stay in the training loop: they find nothing to do, and step() returns its closure's loss. For one
    process, or for parameters that fully_shard (FSDP2) or tensor parallelism spreads over several, whose gradients are
    reduced when they are complete; see docs/python_api.md, "Gradient release".

    Args:
        model_or_params: a module, a parameter, or parameters (as tensors or pairs of name and tensor). All trainable
            ones must be the optimizer's. Other parameters of the optimizer are left to ``optimizer.step()``, except
            those of groups added later, which are released too.
        optimizer: a Flash optimizer.
        grad_scaler: None, or one that is disabled; with ``clip="two_pass"`` the GradScaler of the loop.
        pre_step: called as ``pre_step(param, group)`` before each step; it may change ``param.grad``, for instance clip
            it by value. Where it returns False, the gradient is freed without a step.
        clip: None, or how gradients are clipped to a norm of ``max_norm``, by ``min(1, max_norm / (norm + 1e-6))``:
            "exact": by the norm of all, exactly: gradients wait on the host, 2 bytes a parameter in pinned memory,
            until optimizer.step(), which steps all of them; those of several backward() passes are added up there.
            "two_pass": by the norm of all, exactly: see GradientReleaseHandle.measure_norm().
            "previous": by the norm of all in the steps before this one; in the first, each by its own norm.
            "parameter": each by its own norm.
        max_norm: a finite number > 0.
        norm_decay: with ``clip="previous"``, how slowly its norm follows: 0 is the norm of the last step alone, 0.9
            means a tenth of the last one and nine tenths of what it was; 0 <= norm_decay < 1.

    Raises:
        TypeError: an argument is of a wrong type, or the model is wrapped in DistributedDataParallel or
            FullyShardedDataParallel.
        ValueError: a trainable parameter is in no group of the optimizer, or there is none at all; ``clip``,
            ``max_norm`` or ``norm_decay`` has a value that is not allowed, or goes without another.
        NotImplementedError: ``grad_scaler`` is enabled, and ``clip`` is not "two_pass".
        RuntimeError: gradient release is enabled already, for this optimizer or for one of the parameters by another;
            or torch.distributed runs more than one process, and a parameter is a plain tensor.
    """
    if not isinstance(optimizer, FlashOptimizer):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}; allowed are flashoptim's optimizers")
    if pre_step is not None and not callable(pre_step):
        raise TypeError(
            f"pre_step = {pre_step!r} is not callable; allowed are None and a function of a parameter and its group"
        )
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler is a {type(grad_scaler).__name__}; allowed are None and a torch.amp.GradScaler")
    clipping = gradient_clip(clip, max_norm, norm_decay, grad_scaler)
    named = named_parameters(model_or_params)
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
    return GradientReleaseHandle(optimizer, _Release(optimizer, left_to_step, pre_step, clipping))


def prepare_for_gradient_release(
    model: nn.Module, optimizer: FlashOptimizer, ignore_existing_hooks: bool = False
) -> None:
    """enable_gradient_release() under the name that other libraries have; remove_gradient_release() ends it.

    Args:
        ignore_existing_hooks: False: raise where a parameter has a post-accumulate-grad hook already.

    Raises:
        TypeError: ``model`` is no module, or ``ignore_existing_hooks`` no bool.
        ValueError: a parameter has such a hook.
        RuntimeError: as of enable_gradient_release(), whose other errors come out of here, too.
    """
    check_model(model)
    check_bool("ignore_existing_hooks", ignore_existing_hooks)
    if not ignore_existing_hooks:
        for name, param in model.named_parameters():
            if getattr(param, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"parameter {name!r} has a post-accumulate-grad hook already, which sees its gradient before it is "
                    "released; allowed are parameters without, or ignore_existing_hooks=True"
                )
    enable_gradient_release(model, optimizer)


def remove_gradient_release(model: nn.Module) -> None:
    """Ends gradient release of every optimizer that releases gradients of ``model``; does nothing where none does.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model)
    for param in model.parameters():
        for hook in list((getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()):
            release = hook.owner() if isinstance(hook, _ReleaseHook) else None
            if release is not None:
                release.remove()


def _is_checkpoint_running() -> bool:
    """Whether this is called from a backward() inside another one's, that of a re-entrant checkpoint."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("checkpoint.py") and frame.f_code.co_name == "backward":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _processes() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _check_reduced(param: Tensor, name: str) -> None:
    """Raises RuntimeError for a plain parameter of several processes, whose gradient nobody has reduced yet."""
    if not is_sharded(param) and _processes() > 1:
        raise RuntimeError(
            f"torch.distributed runs {_processes()} processes, and {name} of shape {tuple(param.shape)} is a plain "
            "tensor, which each would step by its own gradient before it is reduced; allowed are one process, and "
            "parameters that are spread over processes by FSDP2 (torch.distributed.fsdp.fully_shard) or tensor "
            "parallelism. Leave plain ones to optimizer.step(): enable_gradient_release(parameters, optimizer) takes a "
            "list"
        )


def _wait_for_offloaded(param: Tensor) -> None:
    """Waits for a gradient that FSDP2 copies to the host, which torch 2.11 does not before it calls hooks."""
    if not is_sharded(param) or plain(param).device.type != "cpu":
        return
    if param._spec.mesh.device_type == "cuda":  # type: ignore[attr-defined]
        torch.cuda.current_stream().synchronize()


def _check_parameter(param: Tensor, name: str) -> None:
    _check_reduced(param, name)
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


__all__ = [
    "GradientReleaseHandle",
    "enable_gradient_release",
    "prepare_for_gradient_release",
    "remove_gradient_release",
]
