"""What an optimizer tells of itself beside torch.optim's methods: states, weights in fp32, bytes, counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _corrections, _parameters, _states, _validate, weights
from ._offload import STATES, check_group
from ._stepper import Stepper
from ._store import Store
from .description import OptimizerDescription, describe
from .numerics import NumericsReport, reduced


class Inspection(torch.optim.Optimizer):
    """The part of FlashOptimizer that looks at states, and at weights through corrections."""

    kind: str
    _store: Store
    _stepper: Stepper
    _check_numerics: bool

    @torch.no_grad()
    def decoded_state(self, p: Tensor) -> dict[str, Tensor]:
        """The states of a parameter as fp32 tensors of its shape: exp_avg, exp_avg_sq, momentum_buffer.

        They are copies in every format: a later step does not change them, nor do changes of theirs change the state.

        Raises:
            TypeError: ``p`` is no tensor.
            ValueError: it is in no group of this optimizer, or its state is in no known format.
        """
        if not isinstance(p, Tensor):
            raise TypeError(f"p is a {type(p).__name__}; allowed is a parameter of this optimizer")
        self._store.records.index(p, self.param_groups)
        self._store.synchronize()
        state = self.state.get(p, {})
        slots = _states.slots_in(self.kind, state)
        local = _parameters.local(p)
        values = _states.decode(self.kind, state, slots, local)
        values = [value.clone() if slot in state else value for slot, value in zip(slots, values)]  # kept as fp32
        return {slot: _parameters.wrap(local, value, local.whole, slot) for slot, value in zip(slots, values)}

    @torch.no_grad()
    def to(self, *, states: str) -> None:
        """Moves the states of every group, and keeps them there from now on; what they took where they were is free.

        The bits are the same wherever states are, so this can be done between any two steps.

        Args:
            states: "host": as ``offload="states"``; "device": beside the parameters.

        Raises:
            ValueError: ``states`` is neither; or "host" with ``check_numerics=True``; nothing has changed then.
            RuntimeError: a parameter is not on a CUDA device, or memory runs out: groups keep their option, and the
                states that have not been moved are where they were.
        """
        _validate.check_choice("states", states, ("host", "device"))
        offload = STATES if states == "host" else None
        check_group({"offload": offload}, self._check_numerics)
        with self._store.lock:
            self._stepper.move_states(self.param_groups, self.state, offload)

    def synchronize(self) -> None:
        """Waits for copies of offloaded states that are under way.

        State tensors in ``optimizer.state`` then hold what the last step left, and the next step reads what is written
        to them. state_dict(), load_state_dict() and everything else here do so by themselves.
        """
        self._store.synchronize()

    @torch.no_grad()
    def reset_corrections(self, params: Iterable[Tensor] | None = None) -> None:
        """Sets corrections to zero: the weights are then the 16-bit parameters, exactly, as they are now.

        A correction is what a weight has beyond its 16-bit parameter. It stays when the parameter is changed from
        outside, so that a swap of weights in and out (averages, SAM) comes back to the same bits. Where the change is
        meant to last (a layer initialized anew, weights copied in), call this after it. ``load_state_dict()`` of the
        model, or of a module in it, does so by itself, for parameters that get other values.

        Args:
            params: the parameters whose corrections are meant; None: all.

        Raises:
            TypeError: ``params`` is no iterable of tensors.
            ValueError: one is in no group of this optimizer; nothing has changed then.
        """
        if params is not None and (isinstance(params, Tensor) or not isinstance(params, Iterable)):
            raise TypeError(f"params is a {type(params).__name__}; allowed are None and an iterable of parameters")
        chosen = [p for group in self.param_groups for p in group["params"]] if params is None else list(params)
        for index, param in enumerate(chosen):
            if not isinstance(param, Tensor):
                raise TypeError(f"params[{index}] is a {type(param).__name__}; allowed are parameters")
        _corrections.reset(self._store, self.param_groups, self.state, chosen)
        self._stepper.loads.forget(chosen)

    def get_fp32_model_state_dict(self, model: nn.Module, full_state_dict: bool = False) -> dict[str, Tensor]:
        """``model.state_dict()`` in fp32, with the corrections that this optimizer keeps."""
        return weights.get_fp32_model_state_dict(model, self, full_state_dict=full_state_dict)

    def set_fp32_model_state_dict(
        self,
        model: nn.Module,
        fp32_state_dict: Mapping[str, Tensor],
        strict: bool = False,
        broadcast_from_rank0: bool = False,
    ) -> weights.IncompatibleKeys:
        """Loads fp32 weights into the model and into this optimizer's corrections; returns the keys that did not fit.

        flashoptim_native.set_fp32_model_state_dict() for one optimizer.
        """
        return weights.set_fp32_model_state_dict(
            model, fp32_state_dict, self, strict=strict, broadcast_from_rank0=broadcast_from_rank0
        )

    def _dtypes_of_corrections(self) -> dict[int, torch.dtype]:
        """By id of a parameter, the dtype that it had when its correction was made, where that is known."""
        return _corrections.dtypes(self._store, self.param_groups)

    def describe(self) -> OptimizerDescription:
        """How parameters and their states are stored, and what they take: ``print(optimizer.describe())`` is a table.

        Rows are groups and formats, with bytes of parameters, corrections and states after a step, without gradients.
        """
        return describe(self.kind, self.param_groups)

    def numerics_report(self, *, reduce: bool = False) -> NumericsReport:
        """Counts of non-finite gradients and, with ``check_numerics=True``, of lost updates in a sample.

        Args:
            reduce: sum up over the processes that hold shards, replicas once; all of them call this, and have the
                same report. False: this process's shards, which ``is_local`` of the report says. Parameters that are
                plain tensors are whole in every process: nothing is summed up for them. Where parameters of different
                placements are in one optimizer, ``nonfinite_gradients`` of the report, which is counted by process,
                counts replicas of some of them each; those of ``parameters`` do not.

        Raises:
            TypeError: ``reduce`` is no bool.
            RuntimeError: ``reduce=True``, and a parameter is a slice of a flat buffer (``describe_shard``), which names
                no processes.
        """
        _validate.check_bool("reduce", reduce)
        named = [
            (_parameters.name_of(self.param_groups, g, i), param)
            for g, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        ]
        slices = [name for name, param in named if _parameters.is_described(param)]
        if reduce and slices:
            raise RuntimeError(
                f"reduce = True is not allowed: {slices[0]} is a slice of a flat buffer, and which processes hold the "
                "others is not known; allowed are DTensors and whole tensors. Sum up the reports of the processes"
            )
        is_local = bool(slices) or any(_parameters.is_sharded(param) for _, param in named)
        report = self._stepper.monitor.report(is_local)
        return reduced(report, named) if reduce else report

    def reset_numerics(self) -> None:
        """Starts the counts of numerics_report() anew, those of captured CUDA graphs, too."""
        self._stepper.monitor.reset()

    def recompute_param_stats(self) -> None:
        """Makes ``check_numerics=True`` measure the weights again at the next step."""
        self._stepper.monitor.largest.clear()

    def _state_with_correction(self, param: Tensor) -> dict[str, Any] | None:
        """The state of a parameter that gets new weights, made if there is none; None where they have no correction."""
        self._stepper.loads.forget([param])
        return _corrections.state_for_new_weights(self._store, self.param_groups, self.state, param)


__all__ = ["Inspection"]
