"""FlashOptimizer: what the five optimizers share. The arithmetic is C++; this is the torch.optim.Optimizer around it."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import optimizer as torch_optimizer

from . import _checkpoint, _ops, _prepared, _states, _validate, weights
from ._ops import CORRECTION_DTYPES
from ._plan import Call, Entry, Plan, PlanIsStale, parameter_name
from ._prepared import Controls, Prepared
from .numerics import NumericsError, NumericsMonitor, NumericsReport

#: Options of a group that say how weights and states are stored; a checkpoint does not change them.
FORMAT_OPTIONS = ("quantize", "state_codec", "master_weight_bits", "min_quantized_numel", "stochastic_rounding")


class FlashOptimizer(torch.optim.Optimizer):
    """Base of FlashAdamW, FlashAdam, FlashSGD, FlashSGDW and FlashLion.

    Args:
        params: parameters, named parameters or parameter groups, as any PyTorch optimizer takes them. bfloat16, float16
            and float32 tensors may be mixed. Every option below except ``compress_state_dict``, ``check_numerics`` and
            ``fused`` may differ from group to group.
        defaults: hyperparameters of groups that do not say otherwise.
        compress_state_dict: ``state_dict()`` holds states as they are stored (the default, and what makes a resumed run
            equal an uninterrupted one bit for bit); False: as fp32, which plain PyTorch optimizers can load.
        check_numerics: raise :class:`NumericsError` where the learning rate is too small for weights that are rounded to
            nearest, and count lost updates (docs/python_api.md, "Numerics").
        fused: accepted for compatibility; there is one implementation, and it is fused.
        capturable: step() can be captured in a CUDA graph and replayed: steps are counted on the device, and ``lr`` may be a
            float32 tensor there, which a replay reads anew. Call step() once before the capture.
    """

    #: Name of the update rule, as the operators know it.
    kind: str
    # torch.amp.GradScaler then leaves gradients as they are and hands over grad_scale and found_inf.
    _step_supports_amp_scaling = True

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
    ) -> None:
        self._compress_state_dict = _validate.check_bool("compress_state_dict", compress_state_dict)
        self._check_numerics = _validate.check_bool("check_numerics", check_numerics)
        if fused is not None:
            _validate.check_bool("fused", fused)
        defaults = {
            **defaults,
            "maximize": maximize,
            "seed": seed,
            "quantize": quantize,
            "state_codec": state_codec,
            "master_weight_bits": master_weight_bits,
            "min_quantized_numel": min_quantized_numel,
            "stochastic_rounding": stochastic_rounding,
            "capturable": _validate.check_bool("capturable", capturable),
        }
        self._reset()
        super().__init__(params, defaults)
        self._warn_of_lost_precision()

    def _reset(self) -> None:
        self._plan: Plan | None = None
        self._group_cache: list[tuple[Any, list[float]]] = []
        self._lrs: list[Tensor | None] = []
        self._monitor = NumericsMonitor()
        self._prepared: list[Prepared] = []
        self._prepared_plan: Plan | None = None
        self._state_dicts: list[dict[str, Any]] = []
        self._prepare_after = 0
        self._waits = 1
        self._clip: Tensor | None = None

    def _warn_of_lost_precision(self) -> None:
        for group in self.param_groups:
            is_narrow = any(p.dtype != torch.float32 for p in group["params"])
            if is_narrow and group["master_weight_bits"] is None and not group["stochastic_rounding"]:
                warnings.warn(
                    "master_weight_bits=None with 16-bit parameters keeps no bits below the parameters' own, and rounds to "
                    "nearest: small updates are lost. Use master_weight_bits=24, or stochastic_rounding=True",
                    stacklevel=4,
                )
                return

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch.optim.Optimizer's wrapper of step(), left out where there is neither a profiler nor a hook to see it.

        It costs 5 us, on a slow host 50.
        """
        hooked: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(func)
        if any(not hasattr(place, name) for place, name in _seen_by_wrapper):
            return hooked  # a torch that keeps them elsewhere

        @functools.wraps(func)
        def step(*args: Any, **kwargs: Any) -> Any:
            self = args[0]
            if (
                profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or torch_optimizer._global_optimizer_pre_hooks
                or torch_optimizer._global_optimizer_post_hooks
            ):
                return hooked(*args, **kwargs)
            return func(*args, **kwargs)

        return step

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch.optim.Optimizer does; its options and parameters are checked first."""
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            if group.get("decouple_lr"):
                group.setdefault("decay_lr", _validate.real_number("lr", group["lr"]))
            _validate.check_hyperparameters(group)
            _validate.check_format(group)
            for position, param in enumerate(group["params"]):
                _validate.check_parameter(
                    param, parameter_name(self.param_groups, len(self.param_groups) - 1, position)
                )
        except Exception:
            self.param_groups.pop()
            raise
        self._plan = None

    def _read_groups(self) -> list[list[float]]:
        """The operators' numbers of every group (step still open), checked. Options that changed make a new plan."""
        cache = self._group_cache
        if len(cache) != len(self.param_groups):
            cache = self._group_cache = [(None, [])] * len(self.param_groups)
            self._lrs = [None] * len(self.param_groups)
            self._plan = None
        for index, group in enumerate(self.param_groups):
            get_options = _options_with_decay if "decay_lr" in group else _options
            options = [group.get(name) for name in get_options]
            known, values = cache[index]
            if known != options:
                _validate.check_hyperparameters(group)
                _validate.check_format(group)
                values = _hyper_values(self.kind, group)
                if self._plan is not None and self._plan_depends_on(known) != self._plan_depends_on(options):
                    self._plan = None
                cache[index] = (options, values)
            lr = group["lr"]
            if isinstance(lr, Tensor) and lr.is_cuda and group["capturable"]:
                self._lrs[index] = _validate.check_lr_tensor(lr)
                values[0] = 0.0
                continue
            self._lrs[index] = None
            values[0] = lr if type(lr) is float and 0.0 <= lr < math.inf else _validate.check_range("lr", lr, 0.0)
        return [values for _, values in cache]

    @staticmethod
    def _plan_depends_on(options: list[Any] | None) -> list[Any]:
        if options is None:
            return []
        by_name = dict(zip(_options, options))
        return [by_name[name] for name in FORMAT_OPTIONS] + [bool(by_name["momentum"])]

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
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hypers = self._read_groups()
        if all(param.grad is None for group in self.param_groups for param in group["params"]):
            self._clip = None  # gradient release has stepped, or there was nothing to step
            return loss
        if self._step_prepared(hypers):
            return loss
        self._check_not_capturing()
        self._fill_in_lrs(hypers)
        try:
            self._run(self._gather(hypers), hypers)
            return loss
        except NumericsError:
            raise
        except RuntimeError:
            pass
        # The operator refused what the quick path leaves to it, and nothing has changed: prepare each parameter by itself,
        # which copies what needs copying and names what cannot be stepped.
        self._run(self._gather(hypers, careful=True), hypers)
        return loss

    def _step_prepared(self, hypers: list[list[float]]) -> bool:
        """The quick way; False, with nothing changed, where the slower one must be gone."""
        if not self._make_prepared():
            return False
        monitor, controls = self._monitor, self._controls()
        if controls is None:  # the gradients overflowed: nothing changes
            return True
        stride = 0
        if self._check_numerics:
            lrs = [values[0] if lr is None else float(lr) for values, lr in zip(hypers, self._lrs)]
            for prepared in self._prepared:
                monitor.check_learning_rates(self.kind, prepared.entries, lrs)
            stride = monitor.stride(self._prepared)
        tried = []
        try:
            if len(self._prepared) > 1:  # a refusal of any must come before a change by one
                for prepared in self._prepared:
                    prepared.check()
            for prepared in self._prepared:
                on_device = controls.on(prepared.device)
                tried.append(prepared)
                prepared.step(hypers, self._lrs, on_device, monitor.counter(prepared.device), stride)
                prepared.commit(self.state)
        except RuntimeError:
            self._drop_prepared()
            if any(prepared.has_stepped for prepared in tried):  # the slower way would step the same parameters again
                raise
            self._wait_to_prepare()
            return False
        if len(self._state_dicts) != len(self.state):
            self._state_dicts = list(self.state.values())
        self._clip = None
        return True

    def _make_prepared(self) -> bool:
        """Whether there is a Prepared for every parameter that a step would take."""
        if self._plan is not None and self._plan is self._prepared_plan and self._plan.is_current(self.param_groups):
            if _ops.same_states(self.state, self._state_dicts) and all(map(Prepared.is_current, self._prepared)):
                return True
        self._drop_prepared()
        if self._prepare_after > 0:
            self._prepare_after -= 1
            return False
        plan = self._current_plan()
        try:
            prepared = _prepared.prepare(self.kind, plan, self.state)
        except (RuntimeError, ValueError, TypeError, PlanIsStale):
            prepared = None  # the slower way says what is wrong
        if prepared is None:
            self._wait_to_prepare()
            return False
        self._waits = 1
        self._prepared, self._prepared_plan = prepared, plan
        self._state_dicts = list(self.state.values())
        if any(group["capturable"] for group in self.param_groups):
            for one in prepared:
                one.count_on_device()
        return True

    def _drop_prepared(self) -> None:
        for prepared in self._prepared:
            self._monitor.keep(prepared)
        self._prepared = []
        self._prepared_plan = None
        self._state_dicts = []

    def _wait_to_prepare(self) -> None:
        """What failed now probably fails again: try less and less often."""
        self._prepare_after = self._waits
        self._waits = min(64, 2 * self._waits)

    def _controls(self) -> Controls | None:
        """What GradScaler and clip_grad_norm_() left for this step; None where it is skipped, as far as the host knows."""
        controls = Controls()
        controls.clip_coefficient = self._clip
        attributes = vars(self)  # where GradScaler sets them
        found_inf: Tensor | None = attributes.get("found_inf")
        scale: Tensor | float | None = attributes.get("grad_scale")
        if any(prepared.device.type == "cuda" for prepared in self._prepared):
            controls.found_inf = found_inf
            if isinstance(scale, Tensor):
                controls.grad_divisor = scale
            elif scale is not None:
                controls.grad_scale = 1.0 / scale
            return controls
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        if scale is not None:
            controls.grad_scale = 1.0 / float(scale)
        return controls

    def _check_not_capturing(self) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph as things are: make the optimizer with capturable=True, call step() "
                "once before the capture, and keep parameters and states where they are (dense parameters, and gradients in "
                "their storage order)"
            )

    def _fill_in_lrs(self, hypers: list[list[float]]) -> None:
        for values, lr in zip(hypers, self._lrs):
            if lr is not None:
                values[0] = _validate.check_range("lr", float(lr), 0.0)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the next step to gradients of a total norm of at most ``max_norm``; returns the norm of what there is.

        On one CUDA device the norm is one pass over all gradients, in an order that does not depend on the device, and the
        next step() multiplies by ``min(1, max_norm / (norm + 1e-6))`` as it reads them: nothing is written, and the host does
        not wait. zero_grad() forgets it. Elsewhere this is torch.nn.utils.clip_grad_norm_, which scales the gradients.

        Raises:
            ValueError: ``max_norm`` is not a finite number > 0.
        """
        max_norm = _validate.check_range("max_norm", max_norm, 0.0)
        if max_norm == 0.0:
            raise ValueError("max_norm = 0.0 is not allowed; allowed is a finite number > 0")
        self._read_groups()
        if self._make_prepared() and len(self._prepared) == 1 and self._prepared[0].device.type == "cuda":
            try:
                result = self._prepared[0].gradient_norm(max_norm)
            except RuntimeError:
                pass
            else:
                self._clip = result[3]
                return result[2].clone()
        params = [p for group in self.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(params, max_norm)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self._clip = None
        super().zero_grad(set_to_none)

    def _gather(self, hypers: list[list[float]], careful: bool = False) -> list[Call]:
        try:
            return self._current_plan().gather(self.state, hypers, careful)
        except PlanIsStale:
            self._plan = None
            return self._current_plan().gather(self.state, hypers, careful)

    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """A step of one parameter alone (``group`` is found where it is not given)."""
        hypers = self._read_groups()
        self._fill_in_lrs(hypers)
        entry = self._entry(p)
        call = Call(p.device)
        self._current_plan().gather_entry(entry, call, self.state, hypers)
        if call.params:
            self._run([call], hypers)

    def _run(self, calls: list[Call], hypers: list[list[float]]) -> None:
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scale: Tensor | float | None = getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0.0:
            return
        grad_scale = 1.0 if scale is None else 1.0 / float(scale)
        if self._clip is not None:
            grad_scale *= float(self._clip)
            self._clip = None
        sample = None
        if self._check_numerics:
            lrs = [values[0] for values in hypers]
            for call in calls:
                self._monitor.check_learning_rates(self.kind, call.entries, lrs)
            sample = self._monitor.sample_before(calls)
        if len(calls) > 1:
            # A refusal of any must come before a change by one: where found_inf is set, a call checks and does no more.
            for call in calls:
                call.run(self.kind, grad_scale, torch.ones(1, device=call.device), None)
        for call in calls:
            call.run(self.kind, grad_scale, None, self._monitor.counter(call.device))
        for call in calls:
            call.commit(self.state)
        self._monitor.sample_after(sample)

    def _current_plan(self) -> Plan:
        if self._plan is None or not self._plan.is_current(self.param_groups):
            self._plan = Plan(self.kind, self.param_groups, self.state)
        return self._plan

    def _entry(self, param: Tensor) -> Entry:
        entry = self._current_plan().entries.get(id(param))
        if entry is not None and entry.dtype is not param.dtype:
            self._plan = None
            entry = self._current_plan().entries.get(id(param))
        if entry is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} and dtype {param.dtype} is in no group of this optimizer"
            )
        return entry

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch.optim.Optimizer gives it; with ``compress_state_dict=False`` its states are fp32."""
        result = super().state_dict()
        if self._compress_state_dict:
            return result
        return {**result, "state": _checkpoint.expanded_states(self.kind, result["state"])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what state_dict() of this optimizer, of its plain PyTorch counterpart, or of one with other formats gave.

        Hyperparameters come from ``state_dict``; how weights and states are stored is this optimizer's own choice, and
        states are converted to it. No value is cast to the parameter's dtype. Nothing changes if something does not fit,
        and nothing of ``state_dict`` is shared.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups = _checkpoint.merged_groups(self.param_groups, state_dict["param_groups"], FORMAT_OPTIONS)
        state = _checkpoint.converted_states(self.kind, groups, state_dict)
        self.__setstate__({"state": state, "param_groups": groups})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_compress_state_dict"] = self._compress_state_dict
        state["_check_numerics"] = self._check_numerics
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._reset()

    # Inspection

    @torch.no_grad()
    def decoded_state(self, p: Tensor) -> dict[str, Tensor]:
        """The states of a parameter as fp32 tensors of its shape: exp_avg, exp_avg_sq, momentum_buffer."""
        state = self.state.get(p, {})
        slots = [slot for slot in _ops.state_names(self.kind, True) if slot in state]
        return dict(zip(slots, _states.decode(self.kind, state, slots)))

    def get_fp32_model_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` in fp32, with the corrections that this optimizer keeps."""
        return weights.get_fp32_model_state_dict(model, self)

    def set_fp32_model_state_dict(
        self, model: nn.Module, fp32_state_dict: Mapping[str, Tensor], strict: bool = False
    ) -> None:
        """Loads fp32 weights into the model and into this optimizer's corrections."""
        weights.set_fp32_model_state_dict(model, fp32_state_dict, self, strict=strict)

    def numerics_report(self) -> NumericsReport:
        """Counts of non-finite gradients and, with ``check_numerics=True``, of lost updates in a sample."""
        return self._monitor.report(self._prepared)

    def reset_numerics(self) -> None:
        """Starts the counts of numerics_report() anew."""
        self._drop_prepared()
        self._monitor = NumericsMonitor()

    def recompute_param_stats(self) -> None:
        """Makes ``check_numerics=True`` measure the weights again at the next step."""
        self._monitor.largest.clear()

    def _state_with_correction(self, param: Tensor) -> dict[str, Any] | None:
        """The parameter's state, made if there is none; None where its weights have no correction."""
        entry = self._entry(param)
        if entry.form.master_weights not in CORRECTION_DTYPES:
            return None
        state = self.state.get(param)
        if not state or not _states.conforms(state, param, entry.slots, entry.form):
            state = self.state[param] = self._current_plan().prepare_state(entry, state)
        return state


_seen_by_wrapper = (
    (profiler, "_is_profiler_enabled"),
    (torch_optimizer, "_global_optimizer_pre_hooks"),
    (torch_optimizer, "_global_optimizer_post_hooks"),
)
_options = (
    *FORMAT_OPTIONS,
    *("betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "maximize", "decouple_lr", "seed"),
)
_options_with_decay = (*_options, "decay_lr")


def _hyper_values(kind: str, group: Mapping[str, Any]) -> list[float]:
    """A set of the operators' hypers, in their order; the step's number is the caller's."""
    fields = dict(group, step=0.0, decay_lr=group["decay_lr"] if group.get("decouple_lr") else 0.0)
    for number, beta in enumerate(group.get("betas", ()), 1):
        fields[f"beta{number}"] = beta
    return [float(fields[name]) for name in _ops.hyperparameter_names(kind)]


__all__ = ["FORMAT_OPTIONS", "FlashOptimizer"]
