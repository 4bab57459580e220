"""What step() knows about its parameters from one step to the next, and the gathering of one operator call.

A plan holds what does not change: which parameters are stored how, sorted into buckets that are alike. It holds no state
tensor, so replacing, moving or deleting entries of ``optimizer.state`` is seen at once; parameter lists and options are
compared at every step. Parameters that need anything else than handing over (no state yet, gradients in another storage
order, a storage order of their own) take the slower path, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain, compress, repeat
from operator import is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from . import _ops, _states, _validate
from ._ops import CORRECTION_DTYPES, StateCodec
from ._states import CORRECTION, SCALE, STEP, Format, ordered

State = Mapping[Tensor, dict[str, Any]]


class Entry:
    """One parameter of a plan."""

    __slots__ = ("dtype", "form", "group", "name", "param", "slots")

    def __init__(self, param: Tensor, name: str, group: int, slots: tuple[str, ...], form: Format) -> None:
        self.param = param
        self.dtype = param.dtype
        self.name = name
        self.group = group
        self.slots = slots
        self.form = form


class Call:
    """One operator call in the making: the lists, and what becomes of them once it has succeeded."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.params: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.corrections: list[Tensor] = []
        self.states: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.master_weights: list[int] = []
        self.codecs: list[int] = []
        self.rows: list[int] = []
        self.hyper_index: list[int] = []
        self.hypers: list[float] = []
        self.hyper_sets: dict[tuple[int, int], int] = {}
        self.entries: list[Entry] = []
        self.stepped: list[tuple[list[dict[str, Any]], int]] = []
        self.new_states: list[tuple[Tensor, dict[str, Any]]] = []
        self.copies: list[tuple[Tensor, Tensor]] = []

    def hyper_set(self, group: int, step: int, values: list[float]) -> int:
        """Index of the hyperparameters of one group at one step; ``values`` lack the step."""
        index = self.hyper_sets.get((group, step))
        if index is None:
            index = self.hyper_sets[(group, step)] = len(self.hyper_sets)
            self.hypers += values
            self.hypers[_ops.STEP_PLACE - len(values)] = float(step)
        return index

    def run(self, kind: str, grad_scale: float, found_inf: Tensor | None, nonfinite: Tensor | None) -> None:
        count = len(self.params)
        _ops.step_(
            kind,
            self.params,
            self.grads,
            self.corrections,
            self.states,
            self.scales,
            self.master_weights,
            self.codecs,
            self.rows,
            [0] * count,
            self.hyper_index,
            self.hypers,
            grad_scale,
            found_inf,
            nonfinite,
        )
        if found_inf is None:
            # The operators write behind autograd's back: a graph that saved a parameter must be told that it changed.
            torch.autograd.graph.increment_version(self.params)

    def commit(self, state: dict[Tensor, dict[str, Any]]) -> None:
        for view, stepped in self.copies:
            view.copy_(stepped)
        for param, param_state in self.new_states:
            state[param] = param_state
        for dicts, step in self.stepped:
            for param_state in dicts:
                param_state[STEP] = step


class Bucket:
    """Contiguous parameters of one group, device, dtype and format."""

    def __init__(self, entries: list[Entry], empty: Tensor) -> None:
        first = entries[0]
        self.entries = entries
        self.params = [entry.param for entry in entries]
        self.dtype = first.dtype
        self.group = first.group
        self.empty = empty
        self.slots = len(first.slots)
        self.has_correction = first.form.master_weights in CORRECTION_DTYPES
        self.is_quantized = first.form.codec != StateCodec.FLOAT32
        self.is_irregular = False  # once the operator has refused the quick path
        self.get_states = _getter(first.slots)
        self.get_scales = _getter([slot + SCALE for slot in first.slots])
        self.master_weights = int(first.form.master_weights)
        self.codec = int(first.form.codec)
        self.rows = [_states.rows_of(entry.param.shape, None)[0] for entry in entries]

    def gather(self, call: Call, state: State, hypers: list[list[float]]) -> bool:
        """Adds all parameters with a gradient to a call; False, with nothing added, where one needs the slower path.

        Shapes, strides, devices and dtypes are left to the operator, which refuses the call where they do not fit.
        """
        dtype, entries, params, rows = self.dtype, self.entries, self.params, self.rows
        grads: list[Any] = [param.grad for param in params]
        if not all(map(is_not, grads, repeat(None))):
            present = [grad is not None for grad in grads]
            entries, params = list(compress(entries, present)), list(compress(params, present))
            rows, grads = list(compress(rows, present)), list(compress(grads, present))
            if not params:
                return True
        for param in params:
            if param.dtype is not dtype:
                return False
        dicts: list[Any] = list(map(state.get, params))
        count = len(params)
        try:
            steps = list(map(_get_step, dicts))
            corrections = list(map(_get_correction, dicts)) if self.has_correction else [self.empty] * count
            states = list(chain.from_iterable(map(self.get_states, dicts)))
            scales = (
                list(chain.from_iterable(map(self.get_scales, dicts)))
                if self.is_quantized
                else [self.empty] * (count * self.slots)
            )
        except (KeyError, TypeError):  # no state yet, or an incomplete one
            return False
        if not all(type(step) is int for step in set(steps)):
            return False
        call.params += params
        call.grads += grads
        call.corrections += corrections
        call.states += states
        call.scales += scales
        call.master_weights += [self.master_weights] * count
        call.codecs += [self.codec] * count
        call.rows += rows
        call.entries += entries
        values = hypers[self.group]
        if steps.count(steps[0]) == count:
            call.hyper_index += [call.hyper_set(self.group, steps[0] + 1, values)] * count
            call.stepped.append((dicts, steps[0] + 1))
        else:
            call.hyper_index += [call.hyper_set(self.group, step + 1, values) for step in steps]
            call.stepped += [([one], step + 1) for one, step in zip(dicts, steps)]
        return True


_get_step = itemgetter(STEP)
_get_correction = itemgetter(CORRECTION)


def _getter(names: Iterable[str]) -> Any:
    """A function from a dict to the tuple of its values under ``names``."""
    names = tuple(names)
    if len(names) > 1:
        return itemgetter(*names)
    return lambda values: [values[name] for name in names]


class PlanIsStale(Exception):
    """A parameter is no longer what the plan was made for: make a new one."""


class Plan:
    """All parameters of an optimizer, in buckets."""

    def __init__(self, kind: str, groups: list[dict[str, Any]], state: State) -> None:
        self.kind = kind
        self.group_lists = [list(group["params"]) for group in groups]
        self.entries: dict[int, Entry] = {}
        self.empties: dict[torch.device, Tensor] = {}
        alike: dict[Any, list[Entry]] = {}
        for index, group in enumerate(groups):
            slots = slots_of(kind, group)
            for position, param in enumerate(group["params"]):
                name = parameter_name(groups, index, position)
                _validate.check_parameter(param, name)
                entry = Entry(param, name, index, slots, _states.format_of(param, group))
                self.entries[id(param)] = entry
                is_regular = param.is_contiguous() and self._has_regular_state(entry, state)
                alike.setdefault((param.device, len(slots), index, param.dtype, entry.form, is_regular), []).append(
                    entry
                )
        self.calls: dict[tuple[torch.device, int], tuple[list[Bucket], list[Entry]]] = {}
        for (device, count, _, _, _, is_regular), entries in alike.items():
            buckets, others = self.calls.setdefault((device, count), ([], []))
            if is_regular:
                buckets.append(Bucket(entries, self._empty(device)))
            else:
                others += entries

    @staticmethod
    def _has_regular_state(entry: Entry, state: State) -> bool:
        param_state = state.get(entry.param)
        if not param_state:
            return True
        return (
            _states.conforms(param_state, entry.param, entry.slots, entry.form)
            and _states.state_order(param_state, entry.slots, entry.param) is None
        )

    def is_current(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the parameter lists are still the ones the plan was made for."""
        if len(groups) != len(self.group_lists):
            return False
        return all(_ops.same_objects(group["params"], params) for group, params in zip(groups, self.group_lists))

    def gather(self, state: State, hypers: list[list[float]], careful: bool = False) -> list[Call]:
        """Everything one step needs; changes nothing. ``careful``: every parameter takes the slower path."""
        calls = []
        made = self._new_states(state)
        for (device, _), (buckets, others) in self.calls.items():
            call = Call(device)
            for bucket in buckets:
                if careful or bucket.is_irregular or not bucket.gather(call, state, hypers):
                    bucket.is_irregular |= careful
                    for entry in bucket.entries:
                        self.gather_entry(entry, call, state, hypers, made)
            for entry in others:
                self.gather_entry(entry, call, state, hypers, made)
            if call.params:
                calls.append(call)
        return calls

    def _new_states(self, state: State) -> dict[int, dict[str, Any]]:
        """New states of all parameters that this step needs one for, by id, made together."""
        if len(state) >= len(self.entries):
            return {}
        missing = [e for e in self.entries.values() if e.param.grad is not None and not state.get(e.param)]
        made = _states.new_states([(e.param, e.slots, e.form) for e in missing])
        return dict(zip((id(e.param) for e in missing), made))

    def gather_entry(
        self,
        entry: Entry,
        call: Call,
        state: State,
        hypers: list[list[float]],
        made: Mapping[int, dict[str, Any]] | None = None,
    ) -> None:
        """Adds one parameter to a call, whatever it needs first. ``made``: new states, by id of the parameter."""
        param, grad = entry.param, entry.param.grad
        if grad is None:
            return
        if param.dtype is not entry.dtype:
            raise PlanIsStale
        _validate.check_gradient(param, grad, entry.name)
        param_state = state.get(param)
        if not param_state or not _states.conforms(param_state, param, entry.slots, entry.form):
            new = None if param_state or made is None else made.get(id(param))
            param_state = self.prepare_state(entry, param_state) if new is None else new
            call.new_states.append((param, param_state))
        order = _states.state_order(param_state, entry.slots, param)
        weights = ordered(param.detach(), order)
        if not weights.is_contiguous():
            view, weights = weights, weights.contiguous()
            call.copies.append((view, weights))
        empty = self._empty(call.device)
        step = int(param_state[STEP]) + 1
        call.params.append(weights)
        call.grads.append(ordered(grad.detach(), order).contiguous())
        call.corrections.append(ordered(param_state[CORRECTION], order) if CORRECTION in param_state else empty)
        call.states += [ordered(param_state[slot], order) for slot in entry.slots]
        call.scales += [param_state.get(slot + SCALE, empty) for slot in entry.slots]
        call.master_weights.append(int(entry.form.master_weights))
        call.codecs.append(int(entry.form.codec))
        call.rows.append(_states.rows_of(param.shape, order)[0])
        call.hyper_index.append(call.hyper_set(entry.group, step, hypers[entry.group]))
        call.entries.append(entry)
        call.stepped.append(([param_state], step))

    def prepare_state(self, entry: Entry, old: Mapping[str, Any] | None) -> dict[str, Any]:
        """A state that a step can run on: a new one, or what there is in the format that the options ask for now."""
        if not old:
            return _states.new_state(entry.param, entry.slots, entry.form)
        if CORRECTION in old and entry.form.master_weights not in CORRECTION_DTYPES:
            raise RuntimeError(
                f"{entry.name} is {entry.param.dtype} and its group has no use for a correction, but its state holds one "
                f"({old[CORRECTION].dtype}), without which its weights lose precision: change dtypes and master_weight_bits "
                "before the first step, or through get_fp32_model_state_dict() and a new optimizer"
            )
        return _states.converted_state(self.kind, old, entry.param, entry.slots, entry.form, entry.name)

    def _empty(self, device: torch.device) -> Tensor:
        if device not in self.empties:
            self.empties[device] = torch.empty(0, device=device)
        return self.empties[device]


def slots_of(kind: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """State slots of a group's parameters."""
    return _ops.state_names(kind, "momentum" not in group or group["momentum"] != 0)


def parameter_name(groups: list[dict[str, Any]], group: int, position: int) -> str:
    """How messages call a parameter."""
    names = groups[group].get("param_names")
    if names is not None and position < len(names):
        return f"parameter {names[position]!r}"
    return f"parameter {position} of group {group}"
