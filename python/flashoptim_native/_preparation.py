"""What a look found, seen to before a step: states made and converted, tensors copied, records described."""

from __future__ import annotations

import functools
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _ops, _packing, _parameters, _states
from ._groups import Stored
from ._ops import Fit
from ._parameters import Local
from ._records import Records
from ._states import STEP, Format
from ._tracing import is_capturing

State = MutableMapping[Tensor, dict[str, Any]]
#: By record: copies, for one step, of a parameter and a gradient that lie otherwise than the state.
Staged = dict[int, tuple[Tensor | None, Tensor | None]]

#: What a step can need beside records (PythonStore of libtorch/ops/python_store.h); see to the others, then plan.
PLAN_FIRST = -1
_UNSHARE_COUNTERS = -2


class _Change:
    """What a step has to change before it can be taken: taken back where it fails, except behind a step that was done.

    (An interrupt comes as an exception right behind any call.)
    """

    def __init__(self, state: State, handle: Any) -> None:
        self._state = state
        self._handle = handle
        self._steps = _ops.store.steps(handle)
        self._undo: list[Callable[[], Any]] = []

    def __enter__(self) -> _Change:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and _ops.store.steps(self._handle) == self._steps:
            for undo in reversed(self._undo):
                undo()

    def put(self, param: Tensor, new: dict[str, Any]) -> None:
        """A new entry of ``optimizer.state``."""
        if param in self._state:
            self._undo.append(functools.partial(self._state.__setitem__, param, self._state[param]))
        else:
            self._undo.append(functools.partial(self._state.pop, param, None))
        self._state[param] = new

    def set(self, holder: Any, key: Any, value: Any) -> None:
        """Another value in a dict or list that has one."""
        if holder[key] is not value:
            self._undo.append(functools.partial(holder.__setitem__, key, holder[key]))
            holder[key] = value

    def rewrite(self, param: Tensor, values: Tensor) -> None:
        """The same weight in other digits: the correction has changed with them."""
        local = _parameters.plain(param).detach()
        self._undo.append(functools.partial(local.copy_, local.clone()))
        local.copy_(values)


class Preparation:
    """Of one step, from the look that finds something otherwise to the step itself.

    As a context it takes back what it has changed where the step fails.

    Args:
        state: the optimizer's.
    """

    def __init__(self, records: Records, state: State) -> None:
        self._records = records
        self._state = state
        self._change = _Change(state, records.handle)
        #: Copies that the step is to read, and to write the parameter back from.
        self.staged: Staged = {}

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *error: Any) -> None:
        self._change.__exit__(*error)

    def see_to(self, needs: Sequence[int], counts_on_device: bool) -> None:
        """What ``needs`` names: records, and what a look wants beside them (PythonStore of libtorch/ops)."""
        if is_capturing():
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph as things are: call step() once before the capture, and "
                "keep parameters, their states and the set of those with gradients as they are then"
            )
        _ops.store.synchronize(self._records.handle)  # states are read, and may go to other memory
        records = [need for need in needs if need >= 0]
        self.make_missing(records)
        for record in records:
            self._describe(record)
        if counts_on_device:
            self.count_on_device(records)
        if _UNSHARE_COUNTERS in needs:
            self._unshare_counters()

    def conforming_state(self, record: int) -> dict[str, Any]:
        """The state of a parameter in the format of now: as it is, converted, or new."""
        records = self._records
        _ops.store.synchronize(records.handle)
        param, form, name = records.params[record], records.form(record), records.name(record)
        local = _parameters.local(param)
        held = self._state.get(param)
        if held is None or _is_missing(held):
            held = records.new_state(record, form)
            self._change.put(param, held)
        elif _states.fit(records.kind, held, local, form, name, records.dtypes[record]) == Fit.NO:
            held = self._convert(record, held, local, form)
        self._change.set(records.dtypes, record, param.dtype)
        return held

    def make_missing(self, chosen: Sequence[int]) -> None:
        """States of zeros for parameters that have none, those of a device in one launch."""
        records = self._records
        by_device: dict[torch.device, list[tuple[int, Local, Format]]] = {}
        for record in chosen:
            param = records.params[record]
            if param.grad is None or not _is_missing(self._state.get(param)):
                continue
            self._check(record)
            form = records.form(record)
            if form.offload is not None:
                self._change.put(param, records.new_state(record, form))
                self._change.set(records.dtypes, record, param.dtype)
                continue
            local = _parameters.local(param)
            by_device.setdefault(local.tensor.device, []).append((record, local, form))
        for items in by_device.values():
            named = [(local, form, records.name(record)) for record, local, form in items]
            made = _states.new_states(records.kind, named)
            for (record, _, _), new in zip(items, made):
                self._change.put(records.params[record], new)
                self._change.set(records.dtypes, record, records.params[record].dtype)

    def _check(self, record: int) -> None:
        records = self._records
        param, name = records.params[record], records.name(record)
        _parameters.check_parameter(param, name)
        if param.grad is not None:
            _parameters.check_gradient(param, param.grad, name)

    def _describe(self, record: int) -> None:
        self._check(record)
        records = self._records
        param, name, form = records.params[record], records.name(record), records.form(record)
        same = records.first_of(param)
        if same != record:
            raise RuntimeError(f"{name} and {records.name(same)} share memory; every parameter must be listed once")
        local = _parameters.local(param)
        held = self._state[param]
        if not isinstance(held, dict):
            raise RuntimeError(f"the state of {name} is a {type(held).__name__}; allowed is a dict")
        fit = _states.fit(records.kind, held, local, form, name, records.dtypes[record])
        if fit == Fit.NO or not _states.is_count(held.get(STEP)):
            held = self._convert(record, held, local, form)
            fit = _states.fit(records.kind, held, local, form, name, None)
        elif isinstance(held[STEP], Tensor) and held[STEP].device != local.tensor.device:
            self._change.set(held, STEP, held[STEP].to(local.tensor.device))
        order = _order_of(held, _states.slots_of(records.kind, form), local.tensor)
        weights = grad = None
        if fit == Fit.OWN_ORDER or not _lies(local.tensor, order):
            weights = _copy_in(local.tensor, order)
        if param.grad is not None:
            found = _parameters.local_gradient(param, param.grad)
            if not _lies(found, order) or found.is_neg():
                grad = _copy_in(found, order)
            elif _parameters.is_placed_otherwise(param, param.grad) or found is not _parameters.plain(param.grad):
                grad = found
        self.staged.pop(record, None)
        if weights is not None or grad is not None:
            self.staged[record] = (weights, grad)
        gradient_dtype = local.tensor.dtype if param.grad is None else param.grad.dtype
        _ops.store.describe(
            records.handle,
            record,
            name,
            records.group_of(record),
            form.master_weights,
            form.codec,
            form.has_momentum,
            _ops.DTYPES[gradient_dtype],
            local.place,
            local.tensor if weights is None else weights,
            weights is not None,
            held,
            form.offload is not None,
        )
        self._change.set(records.dtypes, record, param.dtype)

    def _convert(self, record: int, held: dict[str, Any], local: Local, form: Format) -> dict[str, Any]:
        records = self._records
        param = records.params[record]
        name = records.name(record)
        # ZeroRedundancyOptimizer puts what a state dict holds into optimizer.state.
        unpacked = _packing.unpacked(records.kind, held, local, form, Stored(), name)
        before = records.dtypes[record]
        new, rewritten = _states.converted(records.kind, unpacked, local, form, name, before)
        if before == torch.float32 and _states.CORRECTION in new and _states.CORRECTION not in unpacked:
            _states.warn_of_lost_digits(name, param.dtype)
        if form.offload is not None:
            new = records.host.place(new, records.new_state(record, form))
        self._change.put(param, new)
        if rewritten is not None:
            self._change.rewrite(param, rewritten)
        return new

    def count_on_device(self, records: Sequence[int]) -> None:
        """Makes step counts tensors, one for all parameters that have the same."""
        made: dict[tuple[torch.device, int], Tensor] = {}
        for record in records:
            param = self._records.params[record]
            held = self._state.get(param)
            count: Any = held.get(STEP) if isinstance(held, dict) else None
            if isinstance(held, dict) and _is_host_count(count):
                key = (_parameters.plain(param).device, count)
                if key not in made:
                    made[key] = torch.tensor(count, dtype=torch.int64, device=key[0])
                self._change.set(held, STEP, made[key])

    def _unshare_counters(self) -> None:
        """Parameters that sit out a step get counters of their own: one is shared only by those that step together."""
        known = [(param, self._state.get(param)) for param in self._records.params]
        held = [(param, one) for param, one in known if isinstance(one, dict) and STEP in one]
        stepping = {id(one[STEP]) for param, one in held if param.grad is not None}
        copies: dict[int, Tensor] = {}
        for param, one in held:
            count = one[STEP]
            if param.grad is None and isinstance(count, Tensor) and id(count) in stepping:
                self._change.set(one, STEP, copies.setdefault(id(count), count.clone()))


def _is_missing(held: Any) -> bool:
    """Whether an entry of ``optimizer.state`` is none, or as empty as a new one."""
    return held is None or (isinstance(held, dict) and not held)


def _is_host_count(count: Any) -> bool:
    return type(count) is int and _states.is_count(count)


# Order of elements in memory


def _order_of(held: dict[str, Any], slots: Sequence[str], param: Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor that lies as a state does; as the parameter where the state has no array."""
    for name in (*(_states.key_of(held, slot) for slot in slots), _states.CORRECTION):
        if name is not None and name in held:
            return tuple(_parameters.plain(held[name]).stride())
    return tuple(param.stride() if _is_dense(param) else torch.empty_like(param).stride())


def _is_dense(tensor: Tensor) -> bool:
    return bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _lies(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the elements lie with these strides; those of dimensions of one element do not matter."""
    if tensor.numel() == 0:
        return True
    return all(a == b or size == 1 for a, b, size in zip(tensor.stride(), strides, tensor.shape))


def _copy_in(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    values = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
    return values.copy_(tensor.detach())


__all__ = ["PLAN_FIRST", "Preparation", "State"]
