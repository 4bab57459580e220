"""The store behind an optimizer: its parameters as records, and the one way through a step.

The store proper is C++ (libtorch/store). It looks at every tensor at every step, by address, shape, strides and dtype,
and names the records of which something is not as it was described; here each of them is seen to: a state is made,
converted or left as it is, a parameter or gradient that lies otherwise is copied, and the record is described anew.
Then the C++ store steps. It holds parameters, but nothing of their states: what is taken out of ``optimizer.state`` is
free at once.
"""

from __future__ import annotations

import functools
import threading
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
#: By record: copies, for one step, of a parameter and a gradient that lie otherwise than the state.
Staged = dict[int, tuple[Tensor | None, Tensor | None]]
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


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


class Store:
    """The parameters of an optimizer, in the order of its groups. Threads take turns."""

    def __init__(self, kind: str, lock: Any = None) -> None:
        self.kind = kind
        self._handle = _ops.store.new_store(kind)
        #: Whoever steps, loads or shows states holds it; one optimizer's stores have one.
        self.lock: Any = threading.RLock() if lock is None else lock
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
        self._on_cuda: tuple[int, bool] | None = None

    # Records

    def follow(self, groups: list[dict[str, Any]]) -> None:
        """Makes the parameters of ``groups`` the records, where they are not yet."""
        with self.lock:
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
        self._lists, self._index = [], {}  # what an interrupt leaves half done is done anew
        self._groups = groups
        self.dtypes = [belonged.get(id(param)) for param in params]
        self.params, self._places = params, places
        self.plans, self._plan_of = [], {}
        self._seen += 1
        _ops.store.reset(self._handle, params)
        self._index = {id(param): record for record, param in enumerate(params)}
        self._lists = [list(group["params"]) for group in groups]

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

    def names(self, records: Iterable[int]) -> Callable[[], list[str]]:
        """The same of several records, for who may want them: it takes time."""
        return lambda: [self.name(record) for record in records]

    def make_states(self, state: State, params: Sequence[Tensor]) -> None:
        """States of zeros for ``params``, which have none; none is made where one cannot be."""
        with _Change(state, self._handle) as change:
            self._make_missing([self._index[id(param)] for param in params], state, change)

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
        with self.lock:
            for record, (owner, _) in enumerate(self._places):
                if owner == group:
                    _ops.store.forget(self._handle, record)

    def remember_dtype(self, param: Tensor, dtype: torch.dtype | None = None) -> None:
        """The correction in a parameter's state belongs to weights of a dtype; None: of the one that it has."""
        record = self._index.get(id(param))
        if record is not None:
            self.dtypes[record] = param.dtype if dtype is None else dtype

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
        )

    def _run(self, state: State, counts_on_device: bool, call: Callable[[Any], Any]) -> int:
        staged: Staged = {}
        with self.lock, _Change(state, self._handle) as change:
            for _ in range(_MOST_LOOKS):
                done = call(staged or None)
                if type(done) is int:
                    break
                self._see_to(done, state, change, staged, counts_on_device)
                self._plan()
            else:
                raise RuntimeError(f"the records {done} cannot be described; please report this")
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
        staged: Staged = {}
        with self.lock, _Change(state, self._handle) as change:
            for _ in range(_MOST_LOOKS):
                held = state.get(param)
                if counts_on_device and isinstance(held, dict) and _is_host_count(held.get(STEP)):
                    counter = torch.tensor(held[STEP], dtype=torch.int64, device=_local_device(param))
                    change.set(held, STEP, counter)
                done = _ops.store.step_one(
                    self._handle,
                    record,
                    held if isinstance(held, dict) and held else None,
                    staged.get(record),
                    hypers,
                    lr,
                    controls(record),
                    grad_scale,
                    max(1, telemetry_stride),
                )
                if done == 1:
                    break
                if done == _PLAN_FIRST:
                    self._plan()
                else:
                    self._see_to([record], state, change, staged, False)
            else:
                raise RuntimeError(f"{self.name(record)} cannot be described; please report this")

    def steps(self) -> int:
        """How many calls have stepped."""
        taken: int = _ops.store.steps(self._handle)
        return taken

    def is_on_cuda(self) -> bool:
        """Whether any parameter is on a CUDA device."""
        if self._on_cuda is None or self._on_cuda[0] != self._seen:
            self._on_cuda = (self._seen, any(_local_device(param).type == "cuda" for param in self.params))
        return self._on_cuda[1]

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
        staged: Staged,
        counts_on_device: bool,
    ) -> None:
        if is_capturing():
            raise RuntimeError(
                "step() cannot be captured in a CUDA graph as things are: call step() once before the capture, and "
                "keep parameters, their states and the set of those with gradients as they are then"
            )
        records = [need for need in needs if need >= 0]
        self._make_missing(records, state, change)
        for record in records:
            self._describe(record, state, change, staged)
        if counts_on_device:
            self._count_on_device(records, state, change)
        if _UNSHARE_COUNTERS in needs:
            self._unshare_counters(state, change)

    def _plan(self) -> None:
        lists, index = self._lists, self._index
        self._lists, self._index = [], {}  # plans that an interrupt keeps from being known here are made anew
        plans = _ops.store.plan(self._handle)
        if plans is not None:
            self.plans = plans
            self._plan_of = {record: number for number, plan in enumerate(plans) for record in plan}
            self._seen += 1
        self._index, self._lists = index, lists

    @property
    def generation(self) -> int:
        """Changes whenever plans may have."""
        return self._seen

    def _make_missing(self, records: Sequence[int], state: State, change: _Change) -> None:
        """States of zeros for parameters that have none, those of a device in one launch."""
        by_device: dict[torch.device, list[tuple[int, Local, Format]]] = {}
        for record in records:
            param = self.params[record]
            if param.grad is None or not _is_missing(state.get(param)):
                continue
            self._check(record)
            local = _parameters.local(param)
            by_device.setdefault(local.tensor.device, []).append((record, local, self.form(record)))
        for items in by_device.values():
            made = _states.new_states(self.kind, [(local, form, self.name(record)) for record, local, form in items])
            for (record, _, _), new in zip(items, made):
                change.put(self.params[record], new)
                change.set(self.dtypes, record, self.params[record].dtype)

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
        staged: Staged,
    ) -> None:
        self._check(record)
        param, name, form = self.params[record], self.name(record), self.form(record)
        same = self._index[id(param)]
        if same != record:
            raise RuntimeError(f"{name} and {self.name(same)} share memory; every parameter must be listed once")
        local = _parameters.local(param)
        held = state[param]
        if not isinstance(held, dict):
            raise RuntimeError(f"the state of {name} is a {type(held).__name__}; allowed is a dict")
        fit = _states.fit(self.kind, held, local, form, name, self.dtypes[record])
        if fit == Fit.NO or not _states.is_count(held.get(STEP)):
            held = self._convert(record, held, local, form, change)
            fit = _states.fit(self.kind, held, local, form, name, None)
        elif isinstance(held[STEP], Tensor) and held[STEP].device != local.tensor.device:
            change.set(held, STEP, held[STEP].to(local.tensor.device))
        order = _order_of(held, _states.slots_of(self.kind, form), local.tensor)
        weights = grad = None
        if fit == Fit.OWN_ORDER or not _lies(local.tensor, order):
            weights = _copy_in(local.tensor, order)
        if param.grad is not None:
            found = _parameters.local_gradient(param, param.grad)
            if not _lies(found, order) or found.is_neg():
                grad = _copy_in(found, order)
            elif _parameters.is_placed_otherwise(param, param.grad) or found is not _parameters.plain(param.grad):
                grad = found
        staged.pop(record, None)
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
            weights is not None,
            held,
        )
        change.set(self.dtypes, record, param.dtype)

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
        if held is None or _is_missing(held):
            state[param] = held = _states.new_states(self.kind, [(local, form, self.name(record))])[0]
        elif _states.fit(self.kind, held, local, form, self.name(record), self.dtypes[record]) == Fit.NO:
            with _Change(state, self._handle) as change:
                held = self._convert(record, held, local, form, change)
        self.dtypes[record] = param.dtype
        return held

    # Step counts on the device

    def _count_on_device(self, records: Sequence[int], state: State, change: _Change) -> None:
        """Makes step counts tensors, one for all parameters that have the same."""
        made: dict[tuple[torch.device, int], Tensor] = {}
        for record in records:
            held = state[self.params[record]]
            count = held[STEP]
            if _is_host_count(count):
                key = (_local_device(self.params[record]), count)
                if key not in made:
                    made[key] = torch.tensor(count, dtype=torch.int64, device=key[0])
                change.set(held, STEP, made[key])

    def _unshare_counters(self, state: State, change: _Change) -> None:
        """Parameters that sit out a step get counters of their own: one is shared only by those that step together."""
        known = [(param, state.get(param)) for param in self.params]
        held = [(param, one) for param, one in known if isinstance(one, dict) and STEP in one]
        stepping = {id(one[STEP]) for param, one in held if param.grad is not None}
        copies: dict[int, Tensor] = {}
        for param, one in held:
            count = one[STEP]
            if param.grad is None and isinstance(count, Tensor) and id(count) in stepping:
                change.set(one, STEP, copies.setdefault(id(count), count.clone()))


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


def _is_missing(held: Any) -> bool:
    """Whether an entry of ``optimizer.state`` is none, or as empty as a new one."""
    return held is None or (isinstance(held, dict) and not held)


def _is_host_count(count: Any) -> bool:
    return type(count) is int and _states.is_count(count)


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


__all__ = ["Controls", "Store", "is_capturing"]
