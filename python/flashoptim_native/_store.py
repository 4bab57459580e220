"""The store behind an optimizer: its parameters as records, and the one way through a step.

The store proper is C++ (libtorch/store). It looks at every tensor at every step, by address, shape, strides and dtype, and
names the records of which something is not as it was described; here each of them is seen to: a state is made, converted or
left as it is, a parameter or gradient that lies otherwise is copied, and the record is described anew. Then the C++ store
steps. It holds no tensor: what is taken out of ``optimizer.state`` is free at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from . import _ops, _packing, _parameters, _states
from ._groups import Stored
from ._ops import Fit
from ._parameters import Local
from ._states import STEP, Format

State = MutableMapping[Tensor, dict[str, Any]]
#: Tensors of one plan that a step reads or writes: nonfinite, grad_divisor, clip_coefficient, found_inf, telemetry.
Controls = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

#: What a step can need beside records (PythonStore of libtorch/ops/python_store.h).
_PLAN_FIRST = -1
_UNSHARE_COUNTERS = -2
#: Looks after which a store that still is not content has a fault.
_MOST_LOOKS = 5


def outside_compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps torch.compile from tracing into a function, which works on real tensors' addresses.

    torch.compiler.disable does that; it takes seconds to import, so only where something is being compiled.
    """
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if get_eval_frame_callback() is None:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


class Store:
    """The parameters of an optimizer, in the order of its groups."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._handle = _ops.store.new_store(kind)
        self._groups: list[dict[str, Any]] = []
        self._lists: list[list[Tensor]] = []
        self.params: list[Tensor] = []
        self._places: list[tuple[int, int]] = []  # group and position of every record
        self._index: dict[int, int] = {}
        #: The dtype that each parameter had when its record was described: its correction belongs to it.
        self.dtypes: list[torch.dtype | None] = []
        #: Records of every plan.
        self.plans: list[list[int]] = []
        self._plan_of: dict[int, int] = {}
        self._seen = 0  # plans made so far

    # Records

    def follow(self, groups: list[dict[str, Any]]) -> None:
        """Makes the parameters of ``groups`` the records, where they are not yet."""
        if len(groups) == len(self._lists):
            same = _ops.store.same_objects
            if all(same(group["params"], known) for group, known in zip(groups, self._lists)):
                self._groups = groups
                return
        self._reset(groups)

    def _reset(self, groups: list[dict[str, Any]]) -> None:
        belonged = {id(param): dtype for param, dtype in zip(self.params, self.dtypes)}
        params: list[Tensor] = []
        places: list[tuple[int, int]] = []
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                _parameters.check_parameter(param, _parameters.name_of(groups, index, position))
                params.append(param)
                places.append((index, position))
        self._groups = groups
        self._lists = [list(group["params"]) for group in groups]
        self.dtypes = [belonged.get(id(param)) for param in params]
        self.params, self._places = params, places
        self._index = {id(param): record for record, param in enumerate(params)}
        self.plans, self._plan_of = [], {}
        self._seen += 1
        _ops.store.reset(self._handle, params)

    def index(self, param: Tensor, groups: list[dict[str, Any]]) -> int:
        """The record of a parameter, at a cost that does not depend on their number.

        Raises:
            ValueError: it is in no group.
        """
        record = self._index.get(id(param))
        if record is None or not self._is_at(record, param, groups):
            self.follow(groups)
            record = self._index.get(id(param))
        if record is None:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} and dtype {param.dtype} is in no group of this optimizer"
            )
        self._groups = groups
        return record

    def _is_at(self, record: int, param: Tensor, groups: list[dict[str, Any]]) -> bool:
        group, position = self._places[record]
        if group >= len(groups) or self.params[record] is not param:
            return False
        params = groups[group]["params"]
        return position < len(params) and params[position] is param

    def group_of(self, record: int) -> int:
        return self._places[record][0]

    def name(self, record: int) -> str:
        """How messages call a parameter."""
        return _parameters.name_of(self._groups, *self._places[record])

    def make_states(self, state: State, params: Sequence[Tensor]) -> None:
        """States of zeros for ``params``, which have none; none is made where one cannot be."""
        change = _Change(state)
        try:
            self._make_missing([self._index[id(param)] for param in params], state, change)
        except BaseException:
            change.undo()
            raise

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype of the weights that a parameter's correction belongs to."""
        record = self._index.get(id(param))
        known = None if record is None else self.dtypes[record]
        return param.dtype if known is None else known

    def form(self, record: int) -> Format:
        """How a parameter is to be stored, by the options of its group as they are."""
        return _states.format_of(self.params[record], self._groups[self.group_of(record)])

    def forget_group(self, group: int) -> None:
        """The options of a group have changed: its parameters are described anew at their next step."""
        for record, (owner, _) in enumerate(self._places):
            if owner == group:
                _ops.store.forget(self._handle, record)

    def remember_dtype(self, param: Tensor, dtype: torch.dtype) -> None:
        """The correction in a parameter's state belongs to weights of this dtype."""
        record = self._index.get(id(param))
        if record is not None:
            self.dtypes[record] = dtype

    # Steps

    @outside_compile
    def step(
        self,
        state: State,
        hypers: Sequence[list[float]],
        lrs: Sequence[Tensor | None] | None,
        controls: Callable[[], list[Controls]],
        grad_scale: float,
        telemetry_stride: int,
        counts_on_device: bool,
    ) -> int:
        """One step of every parameter with a gradient; their number. Nothing has changed where it raises."""
        return self._run(
            state,
            counts_on_device,
            lambda staged: _ops.store.step(
                self._handle,
                state,
                staged,
                counts_on_device,
                hypers,
                lrs,
                controls(),
                grad_scale,
                max(1, telemetry_stride),
            ),
        )

    @outside_compile
    def gradient_norm(self, state: State, grad_scale: float, max_norm: float, result: Tensor) -> int:
        """The norm of all gradients, of one device and number of slots, to ``result``: 4 float32."""
        return self._run(
            state,
            False,
            lambda staged: _ops.store.gradient_norm(self._handle, state, staged, grad_scale, None, max_norm, result),
            is_step=False,
        )

    def _run(self, state: State, counts_on_device: bool, call: Callable[[Any], Any], is_step: bool = True) -> int:
        change = _Change(state)
        staged: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        try:
            for _ in range(_MOST_LOOKS):
                done = call(staged or None)
                if type(done) is int:
                    break
                self._see_to(done, state, change, staged, counts_on_device)
            else:
                raise RuntimeError(f"the records {done} cannot be described; please report this")
        except BaseException:
            change.undo()
            raise
        if done and is_step:
            self._bump(self.params if done == len(self.params) else [p for p in self.params if p.grad is not None])
        return done

    @outside_compile
    def step_one(
        self,
        record: int,
        state: State,
        hypers: list[float],
        lr: Tensor | None,
        controls: Callable[[int], Controls],
        grad_scale: float,
        telemetry_stride: int,
        counts_on_device: bool,
    ) -> None:
        """One step of one parameter, which has a gradient."""
        param = self.params[record]
        change = _Change(state)
        staged: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        try:
            for _ in range(_MOST_LOOKS):
                held = state.get(param)
                if held and counts_on_device and type(held[STEP]) is int:
                    held[STEP] = torch.tensor(held[STEP], dtype=torch.int64, device=_local_device(param))
                done = _ops.store.step_one(
                    self._handle,
                    record,
                    held or None,
                    staged.get(record),
                    hypers,
                    lr,
                    controls(record),
                    grad_scale,
                    max(1, telemetry_stride),
                )
                if done == 1:
                    break
                needs = [_PLAN_FIRST] if done == -1 else [record]
                self._see_to(needs, state, change, staged, False)
            else:
                raise RuntimeError(f"{self.name(record)} cannot be described; please report this")
        except BaseException:
            change.undo()
            raise
        self._bump([param])

    @staticmethod
    def _bump(params: Iterable[Tensor]) -> None:
        # The store writes behind autograd's back: a graph that saved a parameter must be told that it changed.
        torch.autograd.graph.increment_version(params)

    def plan_of(self, record: int) -> int | None:
        """The plan that a record is in; None: none yet."""
        return self._plan_of.get(record)

    def device(self, plan: int) -> torch.device:
        return _local_device(self.params[self.plans[plan][0]])

    # What a look found

    def _see_to(
        self,
        needs: Sequence[int],
        state: State,
        change: _Change,
        staged: dict[int, tuple[Tensor | None, Tensor | None]],
        counts_on_device: bool,
    ) -> None:
        records = [need for need in needs if need >= 0]
        self._make_missing(records, state, change)
        for record in records:
            self._describe(record, state, change, staged)
        if counts_on_device:
            self._count_on_device(records, state)
        if _UNSHARE_COUNTERS in needs:
            self._unshare_counters(state)
        if records or _PLAN_FIRST in needs:
            self.plans = _ops.store.plan(self._handle)
            self._plan_of = {record: number for number, plan in enumerate(self.plans) for record in plan}
            self._seen += 1

    @property
    def generation(self) -> int:
        """Changes whenever plans may have."""
        return self._seen

    def _make_missing(self, records: Sequence[int], state: State, change: _Change) -> None:
        """States of zeros for parameters that have none, those of a device in one launch."""
        by_device: dict[torch.device, list[tuple[int, Local, Format]]] = {}
        for record in records:
            param = self.params[record]
            if param.grad is None or state.get(param):
                continue
            self._check(record)
            local = _parameters.local(param)
            by_device.setdefault(local.tensor.device, []).append((record, local, self.form(record)))
        for items in by_device.values():
            made = _states.new_states(self.kind, [(local, form, self.name(record)) for record, local, form in items])
            for (record, _, _), new in zip(items, made):
                change.put(self.params[record], new)

    def _check(self, record: int) -> None:
        param, name = self.params[record], self.name(record)
        _parameters.check_parameter(param, name)
        if param.grad is not None:
            _parameters.check_gradient(param, param.grad, name)

    def _describe(
        self,
        record: int,
        state: State,
        change: _Change,
        staged: dict[int, tuple[Tensor | None, Tensor | None]],
    ) -> None:
        self._check(record)
        param, name, form = self.params[record], self.name(record), self.form(record)
        local = _parameters.local(param)
        held = state[param]
        if not isinstance(held, dict):
            raise RuntimeError(f"the state of {name} is a {type(held).__name__}; allowed is a dict")
        fit = _states.fit(self.kind, held, local, form, self.dtypes[record])
        if fit == Fit.NO or not _states.is_count(held.get(STEP)):
            held = self._convert(record, held, local, form, change)
            fit = _states.fit(self.kind, held, local, form, None)
        elif isinstance(held[STEP], Tensor) and held[STEP].device != local.tensor.device:
            held[STEP] = held[STEP].to(local.tensor.device)
        order = _order_of(held, _states.slots_of(self.kind, form), local.tensor)
        weights = grad = None
        if fit == Fit.OWN_ORDER or not _lies(local.tensor, order):
            weights = _copy_in(local.tensor, order)
        if param.grad is not None:
            found = _parameters.local_gradient(param, param.grad)
            if not _lies(found, order):
                grad = _copy_in(found, order)
            elif _parameters.is_sharded(param) and found is not _parameters.plain(param.grad):
                grad = found
        if weights is not None or grad is not None:
            staged[record] = (weights, grad)
        gradient_dtype = local.tensor.dtype if param.grad is None else param.grad.dtype
        _ops.store.describe(
            self._handle,
            record,
            name,
            self.group_of(record),
            form.master_weights,
            form.codec,
            form.has_momentum,
            _ops.DTYPES[gradient_dtype],
            local.place,
            local.tensor if weights is None else weights,
            held,
        )
        self.dtypes[record] = param.dtype

    def _convert(
        self, record: int, held: dict[str, Any], local: Local, form: Format, change: _Change
    ) -> dict[str, Any]:
        param = self.params[record]
        name = self.name(record)
        # ZeroRedundancyOptimizer puts what a state dict holds into optimizer.state.
        unpacked = _packing.unpacked(self.kind, held, local, form, Stored(), name)
        new, rewritten = _states.converted(self.kind, unpacked, local, form, name, self.dtypes[record])
        change.put(param, new)
        if rewritten is not None:
            change.rewrite(param, rewritten)
        return new

    def conforming_state(self, record: int, state: State) -> dict[str, Any]:
        """The state of a parameter in the format of now: as it is, converted, or new."""
        param, form = self.params[record], self.form(record)
        local = _parameters.local(param)
        held = state.get(param)
        if not held:
            state[param] = held = _states.new_states(self.kind, [(local, form, self.name(record))])[0]
        elif _states.fit(self.kind, held, local, form, self.dtypes[record]) == Fit.NO:
            change = _Change(state)
            held = self._convert(record, held, local, form, change)
        self.dtypes[record] = param.dtype
        return held

    # Step counts on the device

    def _count_on_device(self, records: Sequence[int], state: State) -> None:
        """Makes step counts tensors, one for all parameters that have the same."""
        made: dict[tuple[torch.device, int], Tensor] = {}
        for record in records:
            held = state[self.params[record]]
            count = held[STEP]
            if type(count) is int:
                key = (_local_device(self.params[record]), count)
                if key not in made:
                    made[key] = torch.tensor(count, dtype=torch.int64, device=key[0])
                held[STEP] = made[key]

    def _unshare_counters(self, state: State) -> None:
        """Parameters that sit out a step get counters of their own: one is shared only by those that step together."""
        held = [(param, state[param]) for param in self.params if state.get(param)]
        stepping = {id(one[STEP]) for param, one in held if param.grad is not None}
        copies: dict[int, Tensor] = {}
        for param, one in held:
            count = one[STEP]
            if param.grad is None and isinstance(count, Tensor) and id(count) in stepping:
                one[STEP] = copies.setdefault(id(count), count.clone())


class _Change:
    """New entries of ``optimizer.state`` that a step needs: taken back where the step fails."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._before: list[tuple[Tensor, dict[str, Any] | None]] = []
        self._values: list[tuple[Tensor, Tensor]] = []

    def put(self, param: Tensor, new: dict[str, Any]) -> None:
        self._before.append((param, self._state.get(param)))
        self._state[param] = new

    def rewrite(self, param: Tensor, values: Tensor) -> None:
        """The same weight in other digits: the correction has changed with them."""
        local = _parameters.plain(param).detach()
        self._values.append((local, local.clone()))
        local.copy_(values)

    def undo(self) -> None:
        for local, values in reversed(self._values):
            local.copy_(values)
        for param, before in reversed(self._before):
            if before is None:
                self._state.pop(param, None)
            else:
                self._state[param] = before


def _local_device(param: Tensor) -> torch.device:
    return _parameters.plain(param).device


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


__all__ = ["Controls", "Store"]
