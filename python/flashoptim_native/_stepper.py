"""A step: from parameter groups, gradients and what GradScaler left to one call of the store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _collectives, _parameters, _states, _validate
from ._graph_capture import GraphCapture
from ._hyperparameters import Hyperparameters
from ._model_loads import WeightLoads
from ._offload import OffloadOptions
from ._preparation import State
from ._scaling import Scaling
from ._store import Controls, Store
from ._tracing import is_capturing
from .numerics import NumericsMonitor

_BESIDE = OffloadOptions()


class Stepper:
    """The steps of one optimizer. It holds neither the optimizer nor its groups and states, which every call brings.

    Args:
        kind: name of the update rule, as the operators know it.
        check_numerics: raise where updates would be lost, and count those that are.
        graphs: what graphs captured so far write to; None: there are none.
        offload: how offloaded states are kept.
    """

    def __init__(
        self, kind: str, check_numerics: bool, before: Stepper | None = None, offload: OffloadOptions = _BESIDE
    ) -> None:
        """``before``: the optimizer's stepper so far, which others may be waiting for or have captured in a graph."""
        self.kind = kind
        self.store: Store = Store(kind, None if before is None else before.store.lock, offload)
        self.records = self.store.records
        self.hyperparameters = Hyperparameters(kind, self.records, check_numerics)
        self.monitor = NumericsMonitor()
        self.graphs: GraphCapture = GraphCapture() if before is None else before.graphs
        self.loads = WeightLoads()
        #: The coefficient of clip_grad_norm_() that waits for the next step, on its device.
        self.clip: Tensor | None = None
        self._check_numerics = check_numerics
        self._no_controls: tuple[int, list[Controls]] = (-1, [])
        self._known_stride = (-1, 0)

    def remember(self, groups: list[Any], state: State) -> None:
        """Corrections in ``state`` belong to the parameters of ``groups`` as they are."""
        self.records.follow(groups)
        for param, held in state.items():
            if isinstance(param, Tensor) and isinstance(held, dict) and _states.CORRECTION in held:
                self.records.remember_dtype(param)

    def step(
        self,
        groups: list[dict[str, Any]],
        state: State,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step of every parameter with a gradient.

        Args:
            grad_scale: what gradients were multiplied with; None: nothing.
            found_inf: other than 0 where gradients overflowed: nothing changes then.
        """
        hypers = self.hyperparameters.read(groups)
        if self._only_makes_states(groups, state):
            return
        if all(param.grad is None for group in groups for param in group["params"]):
            self.clip = None  # gradient release has stepped, or there was nothing to step
            self.store.flush()
            return
        records = self.records
        records.follow(groups)
        found_inf = _found_anywhere(records.params, found_inf)
        scaling = Scaling.of(grad_scale, found_inf, self.clip, records.is_on_cuda())
        if scaling is None:  # the gradients overflowed: nothing changes
            self.clip = None
            return
        capturing = is_capturing()
        if capturing:
            self.graphs.check(groups)
            if records.is_offloading():
                raise RuntimeError(
                    "step() of offloaded states cannot be captured in a CUDA graph: their copies go by streams of "
                    "their own. Allowed are groups without offload, or optimizer.to(states='device') before the capture"
                )
        if self._check_numerics:
            self._check_learning_rates(dict(enumerate(hypers)), range(len(records.params)))
        lrs = self.hyperparameters.lrs_on_device()
        # Where the host cannot know how many steps were taken, or a graph replays them, the device counts.
        counts_on_device = scaling.found_inf is not None or lrs is not None
        self.store.step(
            state,
            hypers,
            lrs,
            lambda: self._controls(scaling),
            scaling.grad_scale,
            self._telemetry_stride(),
            counts_on_device or any(group["capturable"] for group in groups),
        )
        self.loads.forget(param for param in records.params if param.grad is not None)
        if capturing:
            self.graphs.keep_step(state, self._controls(scaling), self.hyperparameters.lrs)
        self.clip = None

    def step_param(
        self,
        param: Tensor,
        groups: list[dict[str, Any]],
        state: State,
        grad_scale: Tensor | float | None,
        found_inf: Tensor | None,
    ) -> None:
        """One step of one parameter, if it has a gradient."""
        records = self.records
        record = records.index(param, groups)
        index = records.group_of(record)
        hypers = self.hyperparameters.read_group(groups, index)
        if param.grad is None:
            return
        scaling = Scaling.of(grad_scale, _found_anywhere([param], found_inf), self.clip, records.is_on_cuda())
        if scaling is None:
            return
        if self._check_numerics:
            self._check_learning_rates({index: hypers}, [record])
        lr = self.hyperparameters.lrs[index]
        self.store.step_one(
            record,
            state,
            hypers,
            lr,
            lambda one: self._controls_of_one(one, scaling),
            scaling.grad_scale,
            self._telemetry_stride(),
            scaling.found_inf is not None or lr is not None or groups[index]["capturable"],
        )
        self.loads.forget([param])
        self.clip = None

    def move_states(self, groups: list[dict[str, Any]], state: State, offload: str | None) -> None:
        """Gives every group this ``offload``, and moves the states that there are."""
        records = self.records
        records.follow(groups)
        self.store.synchronize()
        before = [group.get("offload") for group in groups]
        try:
            for group in groups:
                group["offload"] = offload
            for record, param in enumerate(records.params):
                if isinstance(state.get(param), dict) and state[param]:
                    self.store.conforming_state(record, state)
        except BaseException:
            for group, option in zip(groups, before):
                group["offload"] = option
            raise
        for index in range(len(groups)):
            records.forget_group(index)
        records.host.clear()
        records.plan()

    def clip_grad_norm(self, max_norm: float, groups: list[dict[str, Any]], state: State) -> Tensor:
        """The norm of all gradients; the next step multiplies them so that theirs is at most ``max_norm``.

        Raises:
            ValueError: ``max_norm`` is not a finite number > 0.
        """
        max_norm = _validate.check_range("max_norm", max_norm, 0.0)
        if max_norm == 0.0:
            raise ValueError("max_norm = 0.0 is not allowed; allowed is a finite number > 0")
        self.hyperparameters.read(groups)
        self.records.follow(groups)
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        kinds = {
            (p.device, _parameters.has_momentum(group))
            for group in groups
            for p in group["params"]
            if p.grad is not None
        }
        is_fused = len(kinds) == 1 and next(iter(kinds))[0].type == "cuda"
        if any(map(_parameters.is_sharded, params)):
            return self._clip_sharded(max_norm, params, state, is_fused)
        if not is_fused:
            return torch.nn.utils.clip_grad_norm_(params, max_norm)
        result = self._norm_of_plan(max_norm, params, state)
        self.clip = result[3]
        return result[2]

    def _norm_of_plan(self, max_norm: float, params: Sequence[Tensor], state: State) -> Tensor:
        """The sum of squares (as a double) of what this process holds of gradients, their norm and its coefficient."""
        result = torch.zeros(4, device=params[0].device)
        self.store.gradient_norm(state, 1.0, max_norm, result)
        if is_capturing():
            self.graphs.keep(result)
        return result

    def _clip_sharded(self, max_norm: float, params: Sequence[Tensor], state: State, is_fused: bool) -> Tensor:
        """The same for parameters that are spread over processes, which all call this."""
        cuts = list(dict.fromkeys(map(_collectives.parts_of, params)))
        if is_fused and len(cuts) == 1:
            sums = {cuts[0]: self._norm_of_plan(max_norm, params, state)[:2].view(torch.float64)[0]}
        else:
            sums = _collectives.sums_of_squares(params)
        norm = _collectives.total_norm(sums)
        coefficient = _collectives.clip_coefficient(norm, max_norm)
        if {p.device for p in params} == {norm.device} and norm.device.type == "cuda":
            if is_capturing():
                self.graphs.keep(coefficient)
            self.clip = coefficient
        else:
            _collectives.scale_gradients(params, coefficient)
        return norm

    def _only_makes_states(self, groups: list[dict[str, Any]], state: State) -> bool:
        """Whether this step is torch's way of making states: the first, at lr 0, of gradients that are all zero.

        torch.distributed.checkpoint (and whoever does as it does) steps a fresh optimizer so to have a state dict to
        load into. It changes no weight and no state; counted as a step it would spoil the bias correction of the first
        real one. So states are made, and nothing is counted. All processes of a mesh answer alike.
        """
        if state or any(not _is_zero(group["lr"]) for group in groups):
            return False
        params = [p for group in groups for p in group["params"] if p.grad is not None]
        if not params or not _collectives.are_zero(params):
            return False
        self.records.follow(groups)
        self.store.make_states(state, params)
        self.clip = None
        return True

    # What a step reads and counts on the device

    def _controls(self, scaling: Scaling) -> list[Controls]:
        """One entry a plan."""
        records = self.records
        if scaling.has_no_tensors() and not self._check_numerics:
            generation, known = self._no_controls
            if generation != records.generation:
                counters = [self.monitor.counter(records.device(plan)) for plan in range(len(records.plans))]
                known = [(counter, None, None, None, None) for counter in counters]
                self._no_controls = (records.generation, known)
            return known
        result: list[Controls] = []
        for plan, members in enumerate(records.plans):
            device = records.device(plan)
            telemetry = None
            if self._check_numerics:
                telemetry = self.monitor.table((records.generation, plan), records.names(members), device)
            result.append((self.monitor.counter(device), *scaling.on(device), telemetry))
        return result

    def _controls_of_one(self, record: int, scaling: Scaling) -> Controls:
        records = self.records
        device = _parameters.plain(records.params[record]).device
        telemetry = None
        if self._check_numerics:
            plan = records.plan_of(record)
            key = (records.generation, -1 - record) if plan is None else (records.generation, plan)
            members = [record] if plan is None else records.plans[plan]
            telemetry = self.monitor.table(key, records.names(members), device)
        return (self.monitor.counter(device), *scaling.on(device), telemetry)

    def _telemetry_stride(self) -> int:
        if not self._check_numerics:
            return 0
        generation, stride = self._known_stride
        if generation != self.records.generation:
            stride = self.monitor.stride(self.records.params)
            self._known_stride = (self.records.generation, stride)
        return stride

    def _check_learning_rates(self, hypers: Mapping[int, list[float]], chosen: Iterable[int]) -> None:
        records = self.records
        for record in chosen:
            group, param = records.group_of(record), records.params[record]
            if param.grad is None:
                continue
            lr = self.hyperparameters.lrs[group]
            value = hypers[group][0] if lr is None else float(lr)
            self.monitor.check_learning_rate(self.kind, param, records.name(record), records.form(record), value)


def _found_anywhere(params: Sequence[Tensor], found_inf: Tensor | None) -> Tensor | None:
    """What GradScaler found, in any of the processes that parameters are spread over: they step together or not."""
    if found_inf is None:
        return None
    return _collectives.largest_over(_collectives.meshes_of(params), found_inf)


def _is_zero(lr: Any) -> bool:
    """Whether a learning rate is known to be 0; one on the device is not looked at."""
    return float(lr) == 0.0 if not isinstance(lr, Tensor) or lr.device.type == "cpu" else False


__all__ = ["Stepper"]
