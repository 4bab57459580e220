"""The quick way through a step: an operator plan made once, stepped with the gradients alone.

A Prepared holds every parameter of one device and number of state slots, whatever its dtype, format and group. It is good
as long as nothing that it was made from has changed, and looks each time: the parameters' addresses, the entries of
``optimizer.state`` and of each parameter's state. What it cannot take (a gradient in another storage order, a parameter
that is not dense, states that must be converted) is left to the plan's slower path, which then runs alone.

Steps are counted in ``state[p]["step"]``, an int. Where a step may be skipped without the host's knowledge (a GradScaler's
found_inf) or is replayed by a CUDA graph (``capturable=True``), it is an int64 tensor on the device instead, one for all
parameters that step together.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping, Sequence
from itertools import chain, repeat
from operator import is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import profiler

from . import _ops, _states
from ._ops import CORRECTION_DTYPES
from ._plan import Entry, Plan
from ._states import CORRECTION, SCALE, STEP, ordered

_get_step = itemgetter(STEP)
_data_ptr = Tensor.data_ptr

#: int64 numbers of one tensor's telemetry: StepTelemetry of include/flashoptim/telemetry.h.
TELEMETRY_NUMBERS = 6


class Controls:
    """What a step takes beside hyperparameters; tensors on the parameters' device, or None."""

    __slots__ = ("clip_coefficient", "found_inf", "grad_divisor", "grad_scale")

    def __init__(self) -> None:
        self.grad_scale = 1.0
        self.grad_divisor: Tensor | None = None
        self.clip_coefficient: Tensor | None = None
        self.found_inf: Tensor | None = None

    def has_tensors(self) -> bool:
        return self.grad_divisor is not None or self.clip_coefficient is not None or self.found_inf is not None

    def on(self, device: torch.device) -> Controls:
        """The same with every tensor on ``device``, as float32 of one element."""
        if not self.has_tensors():
            return self
        moved = Controls()
        moved.grad_scale = self.grad_scale
        for name in ("clip_coefficient", "found_inf", "grad_divisor"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.device != device or tensor.dtype != torch.float32):
                # To the host it must have arrived before the operator reads it.
                tensor = tensor.to(device, torch.float32, non_blocking=device.type == "cuda")
            setattr(moved, name, tensor)
        return moved


class Prepared:
    """All parameters of a plan on one device with one number of slots that have a state or, now, a gradient."""

    def __init__(
        self,
        kind: str,
        device: torch.device,
        entries: Sequence[Entry],
        others: Sequence[Entry],
        dicts: list[dict[str, Any]],
        new: list[tuple[Tensor, dict[str, Any]]],
    ) -> None:
        self.device = device
        self.entries = entries
        self.params = [entry.param for entry in entries]
        self.others = [entry.param for entry in others]
        self.dicts = dicts
        self.new_states = new  # becomes part of optimizer.state once a step has succeeded
        self.groups = [entry.group for entry in entries]
        self.group_list = sorted(set(self.groups))
        self.group_places = [self.group_list.index(group) for group in self.groups]
        self.counts_on_device = False
        self.has_stepped = False  # by the last step()
        self.common_count: Any = None  # what every step count is, if they are one number
        self.empty = torch.empty(0, device=device)
        self.known: list[Any] = []
        self.strict: list[int] = []
        self.step_places: list[int] = []
        self.hyper_index: list[int] | None = None  # as last sent to the operators
        self.telemetry: Tensor | None = None
        self.norm: Tensor | None = None
        self.addresses: list[int] = []
        self.plan = self._new_plan(kind)
        self._remember()

    def _new_plan(self, kind: str) -> int:
        self.addresses = list(map(_data_ptr, self.params))
        corrections, states, scales, rows = [], [], [], []
        for entry, held in zip(self.entries, self.dicts):
            corrections.append(held[CORRECTION] if entry.form.master_weights in CORRECTION_DTYPES else self.empty)
            states += [held[slot] for slot in entry.slots]
            scales += [held.get(slot + SCALE, self.empty) for slot in entry.slots]
            rows.append(_states.rows_of(entry.param.shape, _states.storage_order(entry.param))[0])
        grads = [param.detach() if param.grad is None else param.grad for param in self.params]
        number: int = _ops.plan_new(
            kind,
            self.params,
            grads,
            corrections,
            states,
            scales,
            [int(entry.form.master_weights) for entry in self.entries],
            [int(entry.form.codec) for entry in self.entries],
            rows,
            [0] * len(self.params),
        )
        weakref.finalize(self, _ops.plan_free, number)
        return number

    def _remember(self) -> None:
        """Everything the states hold, to compare with at the next step."""
        self.counts_on_device = any(type(held[STEP]) is not int for held in self.dicts)
        self._find_common_count()
        self.known = list(chain.from_iterable(map(dict.values, self.dicts)))
        self.strict = [i for i, value in enumerate(self.known) if isinstance(value, Tensor) and value.numel() < 2]
        self.step_places = []
        place = 0
        for held in self.dicts:
            self.step_places.append(place + list(held).index(STEP))
            place += len(held)
        self._remember_in_c()

    def _remember_in_c(self) -> None:
        if _ops.python_functions:
            _ops.python_functions["remember"](self.plan, self.dicts, self.known, self.step_places)

    def _find_common_count(self) -> None:
        counts = set() if self.counts_on_device else set(map(_get_step, self.dicts))
        self.common_count = counts.pop() if len(counts) == 1 else None

    def is_current(self) -> bool:
        """Whether parameters and states are where they were."""
        in_c = _ops.python_functions.get("is_current")
        # 300 tensors: 18 us in C, 38 in Python, to which an equal value that is another object (a step count) is left.
        if not (in_c is not None and in_c(self.plan, self.params, self.dicts)):
            if not self._is_current():
                return False
            self._remember_in_c()
        return all(p.grad is None for p in self.others)

    def _is_current(self) -> bool:
        now = list(chain.from_iterable(map(dict.values, self.dicts)))
        known = self.known
        if self.common_count is not None:
            for place in self.step_places:
                known[place] = self.common_count
        try:
            # Identity first, which is all that a comparison of equal lists looks at; where it fails, tensors are compared
            # by value, and that raises or gives False for all but those of one element.
            if now != known or not all(now[i] is known[i] for i in self.strict):
                return False
        except RuntimeError:
            return False
        return list(map(_data_ptr, self.params)) == self.addresses

    def step(
        self,
        hypers: list[list[float]],
        lrs: Sequence[Tensor | None],
        controls: Controls,
        counter: Tensor,
        telemetry_stride: int,
    ) -> bool:
        """One step; False, with nothing changed, where no parameter has a gradient. Sets has_stepped, whatever follows."""
        self.has_stepped = False
        # Until the step is done, `held` keeps the gradients whose addresses the plan has.
        grads, absent, held = self._gradients()
        if len(absent) == len(self.params):
            return False
        on_device = self.counts_on_device or controls.found_inf is not None or any(lr is not None for lr in lrs)
        common = self.common_count
        if common is not None and not absent and not on_device:
            counts: list[Any] = []
            keys, index = [(group, common) for group in self.group_list], self.group_places
        else:
            counts = self._device_counters(absent) if on_device else list(map(_get_step, self.dicts))
            keys, index = self._sets(counts, absent, on_device)
        values: list[float] = []
        for group, count in keys:
            values += hypers[group]
            values[_ops.STEP_PLACE - len(hypers[group])] = 1.0 if on_device else float(count + 1)
        steps = [count for _, count in keys] if on_device else []
        set_lrs = [self.empty if lrs[group] is None else lrs[group] for group, _ in keys] if on_device else []
        if index == self.hyper_index:
            sent: list[int] = []
        else:
            sent, self.hyper_index = index, None
        telemetry = None
        if telemetry_stride:
            if self.telemetry is None:
                self.telemetry = torch.zeros(
                    (len(self.params), TELEMETRY_NUMBERS), dtype=torch.int64, device=self.device
                )
            telemetry = self.telemetry
        is_plain = not (grads or on_device or telemetry_stride or controls.has_tensors())
        if not (is_plain and self._step_in_c(sent, values, controls.grad_scale, counter)):
            _ops.plan_step_(
                self.plan,
                grads,
                sent,
                values,
                controls.grad_scale,
                controls.grad_divisor,
                controls.clip_coefficient,
                controls.found_inf,
                set_lrs,
                steps,
                counter,
                telemetry,
                max(1, telemetry_stride),
            )
        self.has_stepped = True
        self.hyper_index = index
        del held
        # The operators write behind autograd's back: a graph that saved a parameter must be told that it changed.
        torch.autograd.graph.increment_version(self.params)
        if not on_device:
            self._count(counts, set(absent))
        return True

    def _step_in_c(self, hyper_index: list[int], hypers: list[float], grad_scale: float, counter: Tensor) -> bool:
        """The operator without torch's dispatcher, which only a profiler would miss; False, where it is needed."""
        in_c = _ops.python_functions.get("step")
        if in_c is None or getattr(profiler, "_is_profiler_enabled", True):
            return False
        return bool(in_c(self.plan, hyper_index, hypers, grad_scale, counter))

    def _count(self, counts: list[int], absent: set[int]) -> None:
        if not counts:  # nothing in `known`: _is_current() brings it there
            now = self.common_count = self.common_count + 1
            in_c = _ops.python_functions.get("count")
            if in_c is not None:
                in_c(self.plan, self.dicts, STEP, now)
                return
            for held in self.dicts:
                held[STEP] = now
            return
        for i, (held, place) in enumerate(zip(self.dicts, self.step_places)):
            if i not in absent:
                held[STEP] = counts[i] + 1
            self.known[place] = held[STEP]
        self._remember_in_c()
        self._find_common_count()

    def _sets(self, counts: list[Any], absent: list[int], on_device: bool) -> tuple[list[tuple[int, Any]], list[int]]:
        """The (group, step count) pairs that this step needs hyperparameters for, and every parameter's place among them."""
        first = counts[0]
        if not absent and (all(map(is_, counts, repeat(first))) if on_device else counts.count(first) == len(counts)):
            return [(group, first) for group in self.group_list], self.group_places
        keys: list[tuple[int, Any]] = []
        places: dict[tuple[int, int], int] = {}
        index = []
        without = set(absent)
        for i, (group, count) in enumerate(zip(self.groups, counts)):
            if i in without:
                index.append(0)
                continue
            key = (group, id(count) if on_device else count)
            at = places.get(key)
            if at is None:
                at = places[key] = len(keys)
                keys.append((group, count))
            index.append(at)
        return keys, index

    def count_on_device(self) -> None:
        """Makes the step counts tensors, one for all parameters that have the same."""
        made: dict[int, Tensor] = {}
        for held in self.dicts:
            count = held[STEP]
            if type(count) is int:
                if count not in made:
                    made[count] = torch.tensor(count, dtype=torch.int64, device=self.device)
                held[STEP] = made[count]
        if made:
            self._remember()

    def _device_counters(self, absent: list[int]) -> list[Tensor]:
        self.count_on_device()
        counts: list[Tensor] = list(map(_get_step, self.dicts))
        if absent:
            # A count is shared only by parameters that step together.
            without = set(absent)
            present = {id(counts[i]) for i in range(len(counts)) if i not in without}
            copies: dict[int, Tensor] = {}
            for i in absent:
                if id(counts[i]) in present:
                    self.dicts[i][STEP] = copies.setdefault(id(counts[i]), counts[i].clone())
            if copies:
                self._remember()
                counts = list(map(_get_step, self.dicts))
        return counts

    def check(self) -> None:
        """Raises RuntimeError where the gradients are not what the plan was made for."""
        grads, _, _ = self._gradients()
        if grads:
            _ops.plan_check(self.plan, grads)

    def gradient_norm(self, max_norm: float) -> Tensor:
        """4 float32: the sum of squares as a double, the norm, the coefficient that clips to ``max_norm`` (0: 1)."""
        if self.norm is None:
            self.norm = torch.zeros(4, device=self.device)
        grads, _, held = self._gradients()
        _ops.plan_norm_(self.plan, grads, 1.0, None, max_norm, self.norm)
        del held
        return self.norm

    def _gradients(self) -> tuple[list[Tensor], list[int], list[Any]]:
        """What the operators take as gradients, the places of parameters that have none, and what must live until then.

        Handing gradients to an operator costs 130 ns each, taking their addresses 65: the list is empty where the plan has
        the addresses already, and full where a gradient is not quite what the plan was made for.
        """
        in_c = _ops.python_functions.get("take_gradients")
        taken = None if in_c is None else in_c(self.plan, self.params)
        if taken is not None:
            held, absent = taken
            return [], absent, held
        grads: list[Any] = [param.grad for param in self.params]
        absent = [] if all(map(is_not, grads, repeat(None))) else [i for i, grad in enumerate(grads) if grad is None]
        for i in absent:
            grads[i] = self.empty
        return grads, absent, []

    def commit(self, state: MutableMapping[Tensor, dict[str, Any]]) -> None:
        """New states become the optimizer's."""
        for param, held in self.new_states:
            state[param] = held
        self.new_states = []


def prepare(kind: str, plan: Plan, state: MutableMapping[Tensor, dict[str, Any]]) -> list[Prepared] | None:
    """A Prepared for every device and number of slots; None where a parameter needs the slower path."""
    if len(plan.entries) != sum(map(len, plan.group_lists)):
        return None  # a parameter that is listed twice
    by_call: dict[tuple[torch.device, int], list[Entry]] = {}
    for entry in plan.entries.values():
        by_call.setdefault((entry.param.device, len(entry.slots)), []).append(entry)
    result = []
    for (device, _), all_entries in by_call.items():
        entries, others = [], []
        for entry in all_entries:
            held = state.get(entry.param)
            (entries if held or entry.param.grad is not None else others).append(entry)
        if not entries:
            continue
        for entry in entries:
            if entry.param.dtype is not entry.dtype or not _is_regular(entry, state.get(entry.param)):
                return None
        missing = [entry for entry in entries if not state.get(entry.param)]
        made = dict(zip(map(id, missing), _states.new_states([(e.param, e.slots, e.form) for e in missing])))
        dicts = [state.get(entry.param) or made[id(entry)] for entry in entries]
        new = [(entry.param, made[id(entry)]) for entry in missing]
        result.append(Prepared(kind, device, entries, others, dicts, new))
    return result


def _is_regular(entry: Entry, held: dict[str, Any] | None) -> bool:
    """Whether the operators can take a parameter as it is: dense, its gradient and states in its own storage order."""
    param = entry.param
    order = _states.storage_order(param)
    if order is not None and not ordered(param, order).is_contiguous():
        return False
    grad = param.grad
    if grad is not None and (grad.layout != torch.strided or not _same_memory_order(grad, param)):
        return False
    if not held:
        return True
    if not _states.conforms(held, param, entry.slots, entry.form):
        return False
    names = [*entry.slots, *([CORRECTION] if entry.form.master_weights in CORRECTION_DTYPES else [])]
    return all(_same_memory_order(held[name], param) for name in names)


def _same_memory_order(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return all(x == y or size == 1 for x, y, size in zip(a.stride(), b.stride(), a.shape)) or a.numel() == 0


__all__ = ["Controls", "Prepared", "prepare"]
