"""Which parameters an optimizer's store holds, in which groups and plans."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import _offload, _ops, _parameters, _states
from ._offload import HostStates, OffloadOptions
from ._parameters import Local
from ._states import Format


class Records:
    """The parameters of an optimizer, in the order of its groups: one record each, in the C++ store, too.

    Args:
        kind: name of the update rule, as the operators know it.
        lock: held while records change.
        offload: how offloaded states are kept.
    """

    def __init__(self, kind: str, lock: Any, offload: OffloadOptions) -> None:
        self.kind = kind
        self._lock = lock
        #: The C++ store: what functions of ``_ops.store`` take.
        self.handle = _ops.store.new_store(kind)
        _ops.store.set_ring(self.handle, *offload.ring(), _offload.is_simulated())
        #: The memory of offloaded states.
        self.host = HostStates(kind, offload)
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

    def follow(self, groups: list[dict[str, Any]]) -> None:
        """Makes the parameters of ``groups`` the records, where they are not yet."""
        with self._lock:
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
        self.host.clear()
        _ops.store.reset(self.handle, params)
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

    def first_of(self, param: Tensor) -> int:
        """The record of a parameter that is in a group: of one that is listed twice, the same for both."""
        return self._index[id(param)]

    def group_of(self, record: int) -> int:
        return self._places[record][0]

    def name(self, record: int) -> str:
        """How messages call a parameter."""
        return _parameters.name_of(self._groups, *self._places[record])

    def names(self, records: Iterable[int]) -> Callable[[], list[str]]:
        """The same of several records, for who may want them: it takes time."""
        return lambda: [self.name(record) for record in records]

    def dtype_of(self, param: Tensor) -> torch.dtype:
        """The dtype of the weights that a parameter's correction belongs to."""
        record = self._index.get(id(param))
        known = None if record is None else self.dtypes[record]
        return param.dtype if known is None else known

    def form(self, record: int) -> Format:
        """How a parameter is to be stored, by the options of its group as they are."""
        return _states.format_of(self.params[record], self._groups[self.group_of(record)])

    def new_state(self, record: int, form: Format | None = None) -> dict[str, Any]:
        """A state of zeros for one parameter, where its group keeps states."""
        param, name = self.params[record], self.name(record)
        form = self.form(record) if form is None else form
        local = _parameters.local(param)
        if form.offload is None:
            return _states.new_states(self.kind, [(local, form, name)])[0]
        return self.host.new_state(param, local, form, name, self._offloaded)

    def placed(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """A state in the format of now where its group keeps states: the same, or a copy on the host."""
        record = self.first_of(param)
        form = self.form(record)
        return state if form.offload is None else self.host.place(state, self.new_state(record, form))

    def _offloaded(self) -> list[tuple[Tensor, Local, Format, str]]:
        """Every parameter that keeps, or will keep, states on the host."""
        found = []
        for record, param in enumerate(self.params):
            if self._groups[self.group_of(record)].get("offload") is not None and param.requires_grad:
                found.append((param, _parameters.local(param), self.form(record), self.name(record)))
        return found

    def is_offloading(self) -> bool:
        """Whether any group does."""
        return any(group.get("offload") is not None for group in self._groups)

    def forget_group(self, group: int) -> None:
        """The options of a group have changed: its parameters are described anew at their next step."""
        with self._lock:
            for record, (owner, _) in enumerate(self._places):
                if owner == group:
                    _ops.store.forget(self.handle, record)

    def remember_dtype(self, param: Tensor, dtype: torch.dtype | None = None) -> None:
        """The correction in a parameter's state belongs to weights of a dtype; None: of the one that it has."""
        record = self._index.get(id(param))
        if record is not None:
            self.dtypes[record] = param.dtype if dtype is None else dtype

    # Plans

    def plan(self) -> None:
        """Makes plans of the records that have been described, where they are not those that there are."""
        lists, index = self._lists, self._index
        self._lists, self._index = [], {}  # plans that an interrupt keeps from being known here are made anew
        plans = _ops.store.plan(self.handle)
        if plans is not None:
            self.plans = plans
            self._plan_of = {record: number for number, plan in enumerate(plans) for record in plan}
            self._seen += 1
        self._index, self._lists = index, lists

    @property
    def generation(self) -> int:
        """Changes whenever plans may have."""
        return self._seen

    def is_on_cuda(self) -> bool:
        """Whether any parameter is on a CUDA device."""
        if self._on_cuda is None or self._on_cuda[0] != self._seen:
            self._on_cuda = (self._seen, any(_parameters.plain(param).device.type == "cuda" for param in self.params))
        return self._on_cuda[1]

    def plan_of(self, record: int) -> int | None:
        """The plan that a record is in; None: none yet."""
        return self._plan_of.get(record)

    def device(self, plan: int) -> torch.device:
        return _parameters.plain(self.params[self.plans[plan][0]]).device


__all__ = ["Records"]
