"""FlashOptimizer: what the optimizers share. The arithmetic is C++; this is the torch.optim.Optimizer around it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import _checksums, _load_checks, _model_loads, _parameters, _state_dict, _states, _validate
from ._groups import FORMAT_OPTIONS, ParamGroup
from ._inspection import Inspection
from ._offload import DEFAULT_BUFFER, OffloadOptions, check_group
from ._policy import Policy
from ._profiling import profile_hook_step
from ._scaling import takes_scale
from ._stepper import Stepper
from ._tracing import outside_compile
from .arguments import MoreArguments, check_torch_arguments, python_value


class FlashOptimizer(Inspection):
    """Base of FlashAdamW and the other optimizers.

    Args:
        params: parameters, named parameters or parameter groups, as any PyTorch optimizer takes them. bfloat16, float16
            and float32 tensors may be mixed. Every option below except ``compress_state_dict``, ``check_numerics`` and
            ``fused`` may differ from group to group.
        defaults: hyperparameters of groups that do not say otherwise.
        compress_state_dict: ``state_dict()`` holds states as they are stored (the default, and what makes a resumed run
            equal an uninterrupted one bit for bit); False: as fp32, which plain PyTorch optimizers can load.
        check_numerics: raise :class:`NumericsError` where the learning rate is too small for weights that are rounded
            to nearest, and count lost updates (docs/python_api.md, "Numerics"). With the default codec's corrections
            and with ``stochastic_rounding`` nothing is lost on average, and nothing is raised.
        fused: None, True or False, as torch.optim has it: there is one implementation, and it is fused.
        capturable: step() can be captured in a CUDA graph and replayed: steps are counted on the device, and ``lr`` may
            be a float32 tensor there, which a replay reads anew. Call step() once before the capture.
        more: ``policy={pattern: options}``, options of a group for the parameters whose full names match a pattern
            (``fnmatch``); of several that match, the later one decides. Parameters must have names, as
            ``model.named_parameters()`` gives them. A pattern that matches nothing is warned of. And ``amsgrad``,
            ``foreach``, ``differentiable`` and ``decoupled_weight_decay`` of torch.optim, at the values that ask
            nothing; here and in groups.

    Raises:
        TypeError, ValueError: an argument or a parameter is of a wrong type, or has a value that is not allowed.
            Arguments are checked before ``params`` is looked at.
    """

    #: Name of the update rule, as the operators know it.
    kind: str
    _policy: Policy | None = None
    _offload: OffloadOptions = OffloadOptions()
    # True: torch.amp.GradScaler leaves gradients as they are and hands over grad_scale and found_inf.
    _step_supports_amp_scaling = property(takes_scale)

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        quantize: bool = True,
        compress_state_dict: bool = True,
        master_weight_bits: int | None = 24,
        check_numerics: bool = False,
        fused: bool | None = True,
        state_codec: str = "default",
        min_quantized_numel: int = 4096,
        seed: int = 0,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        capturable: bool = False,
        **more: Unpack[MoreArguments],
    ) -> None:
        policy = more.pop("policy", None)
        offload = python_value(more.pop("offload", None))
        self._offload = OffloadOptions.checked(
            python_value(more.pop("offload_pin", True)), python_value(more.pop("offload_buffer", DEFAULT_BUFFER))
        )
        check_torch_arguments(type(self).__name__, self.kind, {"fused": fused, **more})
        self._compress_state_dict = _validate.check_bool("compress_state_dict", python_value(compress_state_dict))
        self._check_numerics = _validate.check_bool("check_numerics", python_value(check_numerics))
        options = {
            "maximize": maximize,
            "seed": seed,
            "quantize": quantize,
            "state_codec": state_codec,
            "master_weight_bits": master_weight_bits,
            "min_quantized_numel": min_quantized_numel,
            "stochastic_rounding": stochastic_rounding,
            "capturable": _validate.check_bool("capturable", python_value(capturable)),
            "offload": offload,
        }
        defaults = {name: python_value(value) for name, value in {**defaults, **options}.items()}
        # Before the parameters, of which a generator can be taken once, and whether or not a group says otherwise.
        _validate.check_hyperparameters(self.kind, defaults)
        _validate.check_format(defaults)
        check_group(defaults, self._check_numerics)
        self._policy = None if policy is None else Policy(policy, self.kind, defaults)
        self._reset()
        super().__init__(params, defaults)
        for pattern in () if self._policy is None else self._policy.patterns.keys() - self._policy.matched:
            warnings.warn(f"policy: {pattern!r} matches no parameter", stacklevel=3)
        if any(_states.loses_small_updates(group) for group in self.param_groups):
            warnings.warn(
                "master_weight_bits=None with 16-bit parameters keeps no bits below the parameters' own, and rounds to "
                "nearest: small updates are lost. Use master_weight_bits=24, or stochastic_rounding=True",
                stacklevel=3,
            )

    def _reset(self) -> None:
        # Captured CUDA graphs go on writing to what they were captured with.
        self._stepper = self._new_stepper()
        self._store = self._stepper.store
        _model_loads.watch(self)

    def _new_stepper(self) -> Stepper:
        return Stepper(self.kind, self._check_numerics, vars(self).get("_stepper"), self._offload)

    profile_hook_step = staticmethod(profile_hook_step)  # torch.optim.Optimizer wraps step() in it

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim.Optimizer does, or with a policy one for each set of options that it makes.

        Raises:
            TypeError, ValueError: something in it is not allowed; nothing has been added then.
        """
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"param_group lacks 'params'; it holds {', '.join(map(repr, param_group)) or 'nothing'}")
        count = len(self.param_groups)
        try:
            for part in [param_group] if self._policy is None else self._policy.split(param_group):
                self._add_one_group(part)
        except BaseException:
            del self.param_groups[count:]
            raise

    def _add_one_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self.param_groups[-1] = group = ParamGroup.of(self.kind, self.param_groups[-1])
        if group.get("decouple_lr"):
            group.setdefault("decay_lr", _validate.real_number("lr", group["lr"]))
        _validate.check_hyperparameters(self.kind, group)
        _validate.check_format(group)
        check_group(group, self._check_numerics)
        for position, param in enumerate(group["params"]):
            name = _parameters.name_of(self.param_groups, len(self.param_groups) - 1, position)
            _parameters.check_parameter(param, name)

    # Steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step over all parameters that have a gradient.

        Args:
            closure: evaluates the model and returns the loss, which step() returns.

        Raises:
            RuntimeError, TypeError, ValueError: something is not supported; nothing has changed then.
            NumericsError: ``check_numerics=True`` and the learning rate is too small; nothing has changed then.
        """
        loss = None
        if closure is not None and not callable(closure):
            raise TypeError(f"closure = {closure!r} is a {type(closure).__name__}; allowed are None and a function")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @outside_compile
    def _step(self) -> None:
        with self._store.lock:
            self._stepper.step(self.param_groups, self.state, *self._left_by_scaler())

    @torch.no_grad()
    @outside_compile
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """A step of one parameter alone, if it has a gradient (``group`` is not needed).

        Its cost does not depend on the number of the optimizer's parameters.

        Raises:
            TypeError: ``p`` is no tensor.
            ValueError: ``p`` is in no group of this optimizer.
            RuntimeError, TypeError, NumericsError: as step(); nothing has changed then.
        """
        if not isinstance(p, Tensor):
            raise TypeError(f"p is a {type(p).__name__}; allowed is a parameter of this optimizer")
        with self._store.lock:
            self._stepper.step_param(p, self.param_groups, self.state, *self._left_by_scaler())

    def _left_by_scaler(self) -> tuple[Tensor | float | None, Tensor | None]:
        """grad_scale and found_inf, which GradScaler sets for the time of a step."""
        attributes = vars(self)
        return attributes.get("grad_scale"), attributes.get("found_inf")

    @torch.no_grad()
    @outside_compile
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the next step to gradients of a total norm of at most ``max_norm``; returns the norm of what there is.

        On one CUDA device the norm is one pass over all gradients, in an order that does not depend on the device, and
        the next step() multiplies by ``min(1, max_norm / (norm + 1e-6))`` as it reads them: nothing is written, and the
        host does not wait. zero_grad() forgets it. Elsewhere (gradients on the CPU or on several devices, or SGD's
        groups with and without momentum together) this is torch.nn.utils.clip_grad_norm_, which scales the gradients.
        Of DTensors it is the norm of the whole gradients, replicas counted once, as a plain tensor: all processes call.

        Raises:
            TypeError: ``max_norm`` is no number.
            ValueError: ``max_norm`` is not a finite number > 0.
            RuntimeError: as step(); nothing has changed then.
        """
        with self._store.lock:
            return self._stepper.clip_grad_norm(max_norm, self.param_groups, self.state)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self._stepper.clip = None
        super().zero_grad(set_to_none)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch.optim.Optimizer gives it; with ``compress_state_dict=False`` its states are fp32.

        Arrays are the optimizer's own, not copies, so what is kept over a step is to be copied (copy.deepcopy()).

        Raises:
            ValueError: ``optimizer.state`` holds what is no parameter's of a group, or a state in no known format.
            RuntimeError: FullyShardedDataParallel (FSDP1) asks for it.
        """
        _parameters.check_not_flattened(self.param_groups, sys._getframe(1).f_globals.get("__name__", ""))
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        with self._store.lock:
            self._store.synchronize()
            _state_dict.check_owned(self.param_groups, self.state)
            result = _state_dict.shown(
                self.kind, self.param_groups, self.state, self._store.records.dtype_of, self._compress_state_dict
            )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, result)
            if replaced is not None:
                result = replaced
        if self._optimizer_state_dict_post_hooks:
            _checksums.renew(result)
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], verify: bool = True) -> None:
        """Loads what state_dict() gave: this optimizer's, its plain PyTorch counterpart's, or one with other formats.

        Hyperparameters come from ``state_dict``; how weights and states are stored is this optimizer's own choice, and
        states are converted to it. No value is cast to the parameter's dtype. Nothing changes if something does not
        fit, and nothing of ``state_dict`` is shared.

        Args:
            verify: compare states and groups with the checksums that state_dict() gave, where there are any. False
                takes a dict that was edited, as long as it holds what an optimizer can write.

        Raises:
            TypeError: ``state_dict`` or something in it is of another type than state_dict() gives; nothing has
                changed then.
            ValueError: something does not fit, is not what was saved, or is what no optimizer writes (NaN, infinite or
                negative scales and variances, step counts from 2^53 on); nothing has changed then.
            RuntimeError: a DTensor has another number of local pieces than one; nothing has changed then.
        """
        _validate.check_bool("verify", verify)
        numbers = _load_checks.structure(state_dict)
        vouched = _checksums.verify(state_dict, numbers) if verify else frozenset()
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
            _load_checks.structure(state_dict)
            vouched = frozenset()
        groups: list[Any] = _state_dict.merged_groups(self.kind, self.param_groups, state_dict["param_groups"])
        stepper = self._new_stepper()
        stepper.records.follow(groups)
        placed = stepper.records.placed
        loaded = _state_dict.converted_states(self.kind, groups, state_dict, vouched, placed)
        self._take(loaded, groups, stepper)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @torch.no_grad()
    def _take(self, loaded: _state_dict.Loaded, groups: list[ParamGroup], stepper: Stepper) -> None:
        """Makes what was loaded the optimizer's: all of it or, where an interrupt comes between, nothing."""
        stepper.remember(groups, loaded.state)
        stepper.loads.expect(loaded.origins)
        new = {"state": loaded.state, "param_groups": groups, "_stepper": stepper, "_store": stepper.store}
        params = [(_parameters.plain(param), values) for param, values in loaded.params]
        before = [(local, local.clone()) for local, _ in params]
        try:
            with self._store.lock:
                for local, values in params:
                    local.copy_(values)
                vars(self).update(new)  # one call: no interrupt comes into it
        except BaseException:
            if self.state is not loaded.state:
                for local, values in before:
                    local.copy_(values)
            raise

    def __getstate__(self) -> dict[str, Any]:
        self._store.synchronize()
        state = super().__getstate__()
        state["_compress_state_dict"] = self._compress_state_dict
        state["_check_numerics"] = self._check_numerics
        state["_policy"] = self._policy
        state["_offload"] = self._offload
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()
        self._stepper.remember(self.param_groups, self.state)


__all__ = ["FORMAT_OPTIONS", "FlashOptimizer"]
