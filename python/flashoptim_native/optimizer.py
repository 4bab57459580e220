"""FlashOptimizer: what the optimizers share. The arithmetic is C++; this is the torch.optim.Optimizer around it."""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler
from torch.optim import optimizer as torch_optimizer

from . import _checksums, _ops, _packing, _parameters, _state_dict, _states, _validate, weights
from ._groups import FORMAT_OPTIONS, ParamGroup
from ._store import Controls, Store, is_capturing, outside_compile
from .numerics import NumericsMonitor, NumericsReport


class FlashOptimizer(torch.optim.Optimizer):
    """Base of FlashAdamW and the other optimizers.

    Args:
        params: parameters, named parameters or parameter groups, as any PyTorch optimizer takes them. bfloat16, float16
            and float32 tensors may be mixed. Every option below except ``compress_state_dict``, ``check_numerics`` and
            ``fused`` may differ from group to group.
        defaults: hyperparameters of groups that do not say otherwise.
        compress_state_dict: ``state_dict()`` holds states as they are stored (the default, and what makes a resumed run
            equal an uninterrupted one bit for bit); False: as fp32, which plain PyTorch optimizers can load.
        check_numerics: raise :class:`NumericsError` where the learning rate is too small for weights that are rounded
            to nearest, and count lost updates (docs/python_api.md, "Numerics").
        fused: accepted for compatibility; there is one implementation, and it is fused.
        capturable: step() can be captured in a CUDA graph and replayed: steps are counted on the device, and ``lr`` may
            be a float32 tensor there, which a replay reads anew. Call step() once before the capture.
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
        self._store = Store(self.kind)
        # Of every group: options as they were read (None: read them again), the operators' numbers, the formats.
        self._group_cache: list[tuple[Any, list[float], Any]] = []
        self._lrs: list[Tensor | None] = []
        self._monitor = NumericsMonitor()
        self._clip: Tensor | None = None
        self._no_controls: tuple[int, list[Controls]] = (-1, [])
        self._known_stride = (-1, 0)
        # What captured CUDA graphs write to at every replay, beside parameters and gradients, which are the caller's. A
        # graph outlives the states that load_state_dict() replaces.
        self._captured: list[Any] = vars(self).get("_captured", [])

    def _warn_of_lost_precision(self) -> None:
        for group in self.param_groups:
            is_narrow = any(p.dtype != torch.float32 for p in group["params"])
            if is_narrow and group["master_weight_bits"] is None and not group["stochastic_rounding"]:
                warnings.warn(
                    "master_weight_bits=None with 16-bit parameters keeps no bits below the parameters' own, and "
                    "rounds to nearest: small updates are lost. Use master_weight_bits=24, or stochastic_rounding=True",
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
        self.param_groups[-1] = group = ParamGroup.of(self.kind, self.param_groups[-1])
        try:
            if group.get("decouple_lr"):
                group.setdefault("decay_lr", _validate.real_number("lr", group["lr"]))
            _validate.check_hyperparameters(self.kind, group)
            _validate.check_format(group)
            for position, param in enumerate(group["params"]):
                name = _parameters.name_of(self.param_groups, len(self.param_groups) - 1, position)
                _parameters.check_parameter(param, name)
        except Exception:
            self.param_groups.pop()
            raise

    def _read_groups(self) -> list[list[float]]:
        """The operators' numbers of every group (step still open), checked."""
        cache = self._group_cache
        if len(cache) != len(self.param_groups):
            self._group_cache = cache = [(None, [], None)] * len(self.param_groups)
            self._lrs = [None] * len(self.param_groups)
        for index in range(len(self.param_groups)):
            self._read_group(index)
        return [values for _, values, _ in cache]

    def _read_group(self, index: int) -> list[float]:
        group = self.param_groups[index]
        if type(group) is not ParamGroup:  # somebody has put a group of their own there
            self.param_groups[index] = group = ParamGroup.of(self.kind, group)
        options = [group.get(name) for name in _options_of(self.kind)]
        known, values, form = self._group_cache[index]
        if known is None or known != options:
            _validate.check_hyperparameters(self.kind, group)
            _validate.check_format(group)
            values = _hyper_values(self.kind, group)
            now = _format_of_options(self.kind, options)
            if form is not None and form != now:
                self._store.forget_group(index)
            self._group_cache[index] = (None if any(map(_is_mutable, options)) else options, values, now)
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.is_cuda and group["capturable"]:
            self._lrs[index] = _validate.check_lr_tensor(lr)
            values[0] = 0.0
        else:
            self._lrs[index] = None
            values[0] = lr if type(lr) is float and 0.0 <= lr < math.inf else _validate.check_range("lr", lr, 0.0)
        return values

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
        self._step()
        return loss

    @outside_compile
    def _step(self) -> None:
        hypers = self._read_groups()
        if self._only_makes_states():
            return
        if all(param.grad is None for group in self.param_groups for param in group["params"]):
            self._clip = None  # gradient release has stepped, or there was nothing to step
            return
        store = self._store
        store.follow(self.param_groups)
        scaling = self._scaling()
        if scaling is None:  # the gradients overflowed: nothing changes
            self._clip = None
            return
        capturing = is_capturing()
        if capturing:
            self._check_can_be_captured()
        if self._check_numerics:
            self._check_learning_rates(hypers, range(len(store.params)))
        lrs = self._lrs if any(lr is not None for lr in self._lrs) else None
        store.step(
            self.state,
            hypers,
            lrs,
            lambda: self._controls(scaling),
            scaling.grad_scale,
            self._telemetry_stride(),
            self._counts_on_device(scaling, lrs),
        )
        if capturing:
            self._keep_for_graph(scaling)
        self._clip = None

    def _only_makes_states(self) -> bool:
        """Whether this step is torch's way of making states: the first, at lr 0, of gradients that are all zero.

        torch.distributed.checkpoint (and whoever does as it does) steps a fresh optimizer so to have a state dict to
        load
        into. It changes no weight and no state; counted as a step it would spoil the bias correction of the first real
        one.
        So states are made, and nothing is counted. All processes of a mesh answer alike.
        """
        if self.state or any(not _is_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not params or not _parameters.are_zero([p.grad for p in params if p.grad is not None]):
            return False
        self._store.follow(self.param_groups)
        self._store.make_states(self.state, params)
        self._clip = None
        return True

    @torch.no_grad()
    def step_param(self, p: Tensor, group: dict[str, Any] | None = None) -> None:
        """A step of one parameter alone, if it has a gradient (``group`` is not needed).

        Its cost does not depend on the number of the optimizer's parameters.

        Raises:
            ValueError: ``p`` is in no group of this optimizer.
            RuntimeError, TypeError, NumericsError: as step(); nothing has changed then.
        """
        store = self._store
        record = store.index(p, self.param_groups)
        if len(self._group_cache) != len(self.param_groups):
            self._read_groups()
        index = store.group_of(record)
        hypers = self._read_group(index)
        if p.grad is None:
            return
        scaling = self._scaling()
        if scaling is None:
            return
        if self._check_numerics:
            self._check_learning_rates({index: hypers}, [record])
        lr = self._lrs[index]
        store.step_one(
            record,
            self.state,
            hypers,
            lr,
            lambda one: self._controls_of_one(one, scaling),
            scaling.grad_scale,
            self._telemetry_stride(),
            scaling.found_inf is not None or lr is not None or self.param_groups[index]["capturable"],
        )
        self._clip = None

    def _scaling(self) -> _Scaling | None:
        """What GradScaler and clip_grad_norm_() left for this step; None: skip it, as far as the host knows."""
        attributes = vars(self)  # where GradScaler sets them
        found_inf: Tensor | None = attributes.get("found_inf")
        scale: Tensor | float | None = attributes.get("grad_scale")
        if found_inf is None and scale is None:
            return _Scaling(clip=self._clip)
        if self._store.is_on_cuda():
            divisor = scale if isinstance(scale, Tensor) else None
            grad_scale = 1.0 if scale is None or isinstance(scale, Tensor) else 1.0 / scale
            return _Scaling(grad_scale, divisor, self._clip, found_inf)
        if found_inf is not None and float(found_inf) != 0.0:
            return None
        return _Scaling(1.0 if scale is None else 1.0 / float(scale), clip=self._clip)

    def _counts_on_device(self, scaling: _Scaling, lrs: Sequence[Tensor | None] | None) -> bool:
        """Whether the host cannot know how many steps were taken, or a graph replays them."""
        if scaling.found_inf is not None or (lrs is not None and any(lr is not None for lr in lrs)):
            return True
        return any(group["capturable"] for group in self.param_groups)

    def _controls(self, scaling: _Scaling) -> list[Controls]:
        """One entry a plan."""
        store = self._store
        if scaling.has_no_tensors() and not self._check_numerics:
            generation, known = self._no_controls
            if generation != store.generation:
                counters = [self._monitor.counter(store.device(plan)) for plan in range(len(store.plans))]
                known = [(counter, None, None, None, None) for counter in counters]
                self._no_controls = (store.generation, known)
            return known
        result: list[Controls] = []
        for plan, records in enumerate(store.plans):
            device = store.device(plan)
            telemetry = None
            if self._check_numerics:
                telemetry = self._monitor.table((store.generation, plan), store.names(records), device)
            result.append((self._monitor.counter(device), *scaling.on(device), telemetry))
        return result

    def _controls_of_one(self, record: int, scaling: _Scaling) -> Controls:
        store = self._store
        device = _parameters.plain(store.params[record]).device
        telemetry = None
        if self._check_numerics:
            plan = store.plan_of(record)
            key = (store.generation, -1 - record) if plan is None else (store.generation, plan)
            records = [record] if plan is None else store.plans[plan]
            telemetry = self._monitor.table(key, store.names(records), device)
        return (self._monitor.counter(device), *scaling.on(device), telemetry)

    def _telemetry_stride(self) -> int:
        if not self._check_numerics:
            return 0
        generation, stride = self._known_stride
        if generation != self._store.generation:
            stride = self._monitor.stride(self._store.params)
            self._known_stride = (self._store.generation, stride)
        return stride

    def _check_learning_rates(self, hypers: Any, records: Iterable[int]) -> None:
        store = self._store
        for record in records:
            group, param = store.group_of(record), store.params[record]
            if param.grad is None:
                continue
            lr = self._lrs[group]
            value = hypers[group][0] if lr is None else float(lr)
            self._monitor.check_learning_rate(self.kind, param, store.name(record), store.form(record), value)

    def _check_can_be_captured(self) -> None:
        if not all(group["capturable"] for group in self.param_groups):
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph with capturable=False, because the host counts steps and "
                "reads lr: make the optimizer with capturable=True, and call step() once before the capture"
            )

    def _keep_for_graph(self, scaling: _Scaling) -> None:
        """A replay of the graph being captured writes to these: they must not be freed before this optimizer is."""
        tensors = [value for held in self.state.values() for value in held.values() if isinstance(value, Tensor)]
        self._captured.append((tensors, self._controls(scaling), list(self._lrs)))

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clips the next step to gradients of a total norm of at most ``max_norm``; returns the norm of what there is.

        On one CUDA device the norm is one pass over all gradients, in an order that does not depend on the device, and
        the next step() multiplies by ``min(1, max_norm / (norm + 1e-6))`` as it reads them: nothing is written, and the
        host does not wait. zero_grad() forgets it. Elsewhere (gradients on the CPU or on several devices, or SGD's
        groups with and without momentum together) this is torch.nn.utils.clip_grad_norm_, which scales the gradients.

        Raises:
            ValueError: ``max_norm`` is not a finite number > 0.
        """
        max_norm = _validate.check_range("max_norm", max_norm, 0.0)
        if max_norm == 0.0:
            raise ValueError("max_norm = 0.0 is not allowed; allowed is a finite number > 0")
        self._read_groups()
        store = self._store
        store.follow(self.param_groups)
        params = [p for group in self.param_groups for p in group["params"]]
        kinds = {
            (p.device, _parameters.has_momentum(group))
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        }
        if len(kinds) != 1 or next(iter(kinds))[0].type != "cuda":
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        result = torch.zeros(4, device=next(iter(kinds))[0])
        store.gradient_norm(self.state, 1.0, max_norm, result)
        if is_capturing():
            self._captured.append(result)
        self._clip = result[3]
        return result[2]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim.Optimizer.zero_grad."""
        self._clip = None
        super().zero_grad(set_to_none)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The state, as torch.optim.Optimizer gives it; with ``compress_state_dict=False`` its states are fp32."""
        _parameters.check_not_flattened(self.param_groups, sys._getframe(1).f_globals.get("__name__", ""))
        result = super().state_dict()
        params = [param for group in self.param_groups for param in group["params"]]
        number_of = dict(enumerate(params))
        if self._compress_state_dict:
            state = {key: _packing.packed(held) for key, held in result["state"].items()}
        else:
            state = {
                key: _packing.expanded(self.kind, held, number_of[key]) if key in number_of else held
                for key, held in result["state"].items()
            }
        groups = _state_dict.described_groups(
            self.kind, self.param_groups, result["param_groups"], self.state, self._store.dtype_of
        )
        result = {**result, "state": state, "param_groups": groups}
        if self._compress_state_dict:
            result[_checksums.KEY] = _checksums.of_states(state, len(params))
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any], verify: bool = True) -> None:
        """Loads what state_dict() of this optimizer, of its plain PyTorch counterpart, or of one with other formats
        gave.

        Hyperparameters come from ``state_dict``; how weights and states are stored is this optimizer's own choice, and
        states are converted to it. No value is cast to the parameter's dtype. Nothing changes if something does not
        fit,
        and nothing of ``state_dict`` is shared.

        Args:
            verify: compare states with the checksums that state_dict() gave, where there are any. False takes states
            that
                were edited.

        Raises:
            ValueError: something does not fit, or is not what was saved.
        """
        _validate.check_bool("verify", verify)
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups = _state_dict.merged_groups(self.kind, self.param_groups, state_dict["param_groups"])
        loaded = _state_dict.converted_states(self.kind, groups, state_dict, verify)
        self.__setstate__({"state": loaded.state, "param_groups": groups})
        with torch.no_grad():
            for param, values in loaded.params:
                _parameters.plain(param).copy_(values)
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
        self._store.follow(self.param_groups)
        for param, held in self.state.items():
            if isinstance(param, Tensor) and isinstance(held, dict) and _states.CORRECTION in held:
                self._store.remember_dtype(param)

    # Inspection

    @torch.no_grad()
    def decoded_state(self, p: Tensor) -> dict[str, Tensor]:
        """The states of a parameter as fp32 tensors of its shape: exp_avg, exp_avg_sq, momentum_buffer."""
        state = self.state.get(p, {})
        slots = _states.slots_in(self.kind, state)
        local = _parameters.local(p)
        values = _states.decode(self.kind, state, slots, local)
        return {slot: _parameters.wrap(local, value, local.whole, slot) for slot, value in zip(slots, values)}

    @torch.no_grad()
    def reset_corrections(self, params: Iterable[Tensor] | None = None) -> None:
        """Sets corrections to zero: the weights are then the 16-bit parameters, exactly, as they are now.

        A correction is what a weight has beyond its 16-bit parameter. It stays when the parameter is changed from
        outside, so that a swap of weights in and out (averages, SAM) comes back to the same bits. Where the change is
        meant to last (a checkpoint loaded into the model, a re-initialized layer), call this after it.

        Args:
            params: the parameters whose corrections are meant; None: all.

        Raises:
            ValueError: one is in no group of this optimizer; nothing has changed then.
        """
        self._store.follow(self.param_groups)
        chosen = self._store.params if params is None else list(params)
        for param in chosen:
            self._store.index(param, self.param_groups)
        for param in chosen:
            correction = self.state.get(param, {}).get(_states.CORRECTION)
            if correction is not None:
                _parameters.plain(correction).zero_()
                self._store.remember_dtype(param)

    def get_fp32_model_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` in fp32, with the corrections that this optimizer keeps."""
        return weights.get_fp32_model_state_dict(model, self)

    def set_fp32_model_state_dict(
        self, model: nn.Module, fp32_state_dict: Mapping[str, Tensor], strict: bool = False
    ) -> None:
        """Loads fp32 weights into the model and into this optimizer's corrections."""
        weights.set_fp32_model_state_dict(model, fp32_state_dict, self, strict=strict)

    def _dtypes_of_corrections(self) -> dict[int, torch.dtype]:
        """By id of a parameter, the dtype that it had when its correction was made, where that is known."""
        self._store.follow(self.param_groups)
        return {id(p): dtype for p, dtype in zip(self._store.params, self._store.dtypes) if dtype is not None}

    def numerics_report(self) -> NumericsReport:
        """Counts of non-finite gradients and, with ``check_numerics=True``, of lost updates in a sample."""
        return self._monitor.report()

    def reset_numerics(self) -> None:
        """Starts the counts of numerics_report() anew, those of captured CUDA graphs, too."""
        self._monitor.reset()

    def recompute_param_stats(self) -> None:
        """Makes ``check_numerics=True`` measure the weights again at the next step."""
        self._monitor.largest.clear()

    def _state_with_correction(self, param: Tensor) -> dict[str, Any] | None:
        """The state of a parameter that gets new weights, made if there is none; None where they have no correction."""
        record = self._store.index(param, self.param_groups)
        self._store.remember_dtype(param)
        if self._store.form(record).master_weights not in _ops.CORRECTION_DTYPES:
            self.state.get(param, {}).pop(_states.CORRECTION, None)
            return None
        return self._store.conforming_state(record, self.state)


class _Scaling(NamedTuple):
    """What a step's gradients are multiplied with, and whether it is skipped; tensors are read on the device."""

    grad_scale: float = 1.0
    divisor: Tensor | None = None
    clip: Tensor | None = None
    found_inf: Tensor | None = None

    def has_no_tensors(self) -> bool:
        return self.divisor is None and self.clip is None and self.found_inf is None

    def on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """divisor, clip and found_inf on ``device``, as float32 of one element."""
        moved = []
        for tensor in (self.divisor, self.clip, self.found_inf):
            if tensor is not None and (tensor.device != device or tensor.dtype != torch.float32):
                # To the host it must have arrived before the step reads it.
                tensor = tensor.to(device, torch.float32, non_blocking=device.type == "cuda")
            moved.append(tensor)
        return moved[0], moved[1], moved[2]


def _is_zero(lr: Any) -> bool:
    """Whether a learning rate is known to be 0; one on the device is not looked at."""
    return float(lr) == 0.0 if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


_seen_by_wrapper = (
    (profiler, "_is_profiler_enabled"),
    (torch_optimizer, "_global_optimizer_pre_hooks"),
    (torch_optimizer, "_global_optimizer_post_hooks"),
)


@functools.cache
def _options_of(kind: str) -> tuple[str, ...]:
    """What of a group decides the operators' numbers and formats, its learning rate apart."""
    names = dict.fromkeys((*FORMAT_OPTIONS, "decouple_lr"))
    for name in _ops.hyperparameter_names(kind):
        if name not in ("lr", "step"):
            names["betas" if name.removeprefix("beta").isdigit() else name] = None
    return tuple(names)


def _format_of_options(kind: str, options: list[Any]) -> list[Any]:
    """What of a group's options decides how its parameters are stored."""
    by_name = dict(zip(_options_of(kind), options))
    return [by_name[name] for name in FORMAT_OPTIONS] + [bool(by_name.get("momentum"))]


def _is_mutable(option: Any) -> bool:
    """Whether an option can change without becoming another object."""
    if isinstance(option, tuple):
        return any(map(_is_mutable, option))
    return isinstance(option, (Tensor, list))


def _hyper_values(kind: str, group: Mapping[str, Any]) -> list[float]:
    """A set of the operators' hypers, in their order (include/flashoptim/optimizer_info.h), the step still open."""
    fields = dict(group, step=0.0, decay_lr=group["decay_lr"] if group.get("decouple_lr") else 0.0)
    for number, beta in enumerate(group.get("betas", ()), 1):
        fields[f"beta{number}"] = beta
    return [float(fields[name] or 0.0) for name in _ops.hyperparameter_names(kind)]


__all__ = ["FORMAT_OPTIONS", "FlashOptimizer"]
