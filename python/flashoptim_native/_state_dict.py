"""Groups and states of a checkpoint, made to fit an optimizer before anything of it changes."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checksums, _groups, _load_checks, _model_loads, _packing, _parameters, _states, _validate
from ._groups import ParamGroup, Stored
from ._ops import StateCodec

_CODEC_NAMES = {StateCodec.DEFAULT: "default", StateCodec.PAPER: "paper"}

#: Options of PyTorch's own optimizers that mean nothing here.
_FOREIGN_OPTIONS = ("foreach", "fused", "capturable", "differentiable", "amsgrad", "decoupled_weight_decay")


def merged_groups(
    kind: str, groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[ParamGroup]:
    """Saved groups with this optimizer's parameters, its own options of formats, and whatever they lack; checked."""
    if len(groups) != len(saved):
        raise ValueError(
            f"the state dict has {len(saved)} parameter groups; allowed is this optimizer's number, {len(groups)}"
        )
    result = []
    for index, (group, old) in enumerate(zip(groups, saved)):
        if len(group["params"]) != len(old["params"]):
            raise ValueError(
                f"group {index} of the state dict has {len(old['params'])} parameters; allowed is this optimizer's "
                f"number, {len(group['params'])}"
            )
        _load_checks.group(group, old, index)
        left_out = ("params", *_FOREIGN_OPTIONS, *_groups.PACKED_OPTIONS)
        taken = {key: value for key, value in old.items() if key not in left_out and not _is_description(key)}
        new = {key: _load_checks.copied(value, f"{key!r} of group {index}") for key, value in taken.items()}
        if old.get("amsgrad"):
            warnings.warn(
                f"amsgrad=True of group {index} of the state dict is ignored: it is not supported", stacklevel=3
            )
        if old.get("decoupled_weight_decay") and kind == "adam":
            warnings.warn(
                f"decoupled_weight_decay=True of group {index} of the state dict is ignored: FlashAdam's decay is not "
                "decoupled, FlashAdamW's is",
                stacklevel=3,
            )
        for key, value in group.items():
            if key == "params":
                new[key] = value
            elif _is_description(key):
                new[key] = dict(value)
            elif key == "decay_lr" and key not in new:
                new[key] = old.get("initial_lr", value)
            elif key != "initial_lr":
                new.setdefault(key, value)
        if isinstance(new.get("betas"), list):
            new["betas"] = tuple(new["betas"])
        if new.get("decouple_lr"):
            new.setdefault("decay_lr", _validate.real_number("lr", new.get("initial_lr", new["lr"])))
        _validate.check_hyperparameters(kind, new)
        result.append(ParamGroup.of(kind, new))
    return result


def _is_description(key: Any) -> bool:
    return isinstance(key, str) and key.startswith(_groups.PREFIX)


class Loaded(NamedTuple):
    """What a checkpoint's states become."""

    state: defaultdict[Any, Any]
    #: New values of parameters whose dtype is another than their correction's was.
    params: list[tuple[Tensor, Tensor]]
    #: Checksums of the weights that corrections belong to; None: not known.
    origins: dict[Tensor, int | None]


@torch.no_grad()
def converted_states(
    kind: str,
    groups: Sequence[Mapping[str, Any]],
    state_dict: Mapping[str, Any],
    vouched: Container[Any],
    place: Callable[[Tensor, dict[str, Any]], dict[str, Any]],
) -> Loaded:
    """States by parameter, in the formats of ``groups``. Changes nothing, and shares nothing with ``state_dict``.

    ``vouched``: parameters, by their numbers in ``state_dict``, whose states are as they were saved. Those of others
    must hold what an optimizer can write. ``place`` puts the state of a parameter where its group keeps states.
    """
    saved_groups = state_dict["param_groups"]
    numbers = list(chain.from_iterable(group["params"] for group in saved_groups))
    said = [_groups.read_description(kind, group, index) for index, group in enumerate(saved_groups)]
    owners = [(g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]
    by_number = dict(zip(numbers, owners))
    state: defaultdict[Any, Any] = defaultdict(dict)
    params: list[tuple[Tensor, Tensor]] = []
    unknown: set[str] = set()
    for number, saved in state_dict["state"].items():
        g, i, param = by_number[number]
        name = _parameters.name_of(groups, g, i)
        local = _parameters.local(param)
        form = _states.format_of(param, groups[g])
        description = said[g]
        stored = Stored() if description is None else description.of(i, len(groups[g]["params"]))
        belongs_to = None if stored.dtype is None else getattr(torch, stored.dtype)
        _states.check_owner(kind, saved, name)
        _load_checks.arrays(kind, saved, local, name)
        if belongs_to is None and param.dtype == torch.float32 and saved.get(_states.CORRECTION) is not None:
            raise ValueError(
                f"state 'correction' of {name}: a torch.float32 parameter has none, and nothing says which 16-bit "
                "dtype it belongs to; allowed is a state without, or with the description that state_dict() writes"
            )
        held = _packing.unpacked(kind, saved, local, form, stored, name)
        new, rewritten = _states.converted(kind, held, local, form, name, belongs_to)
        state[param] = place(param, new)
        if number not in vouched:
            _load_checks.values(kind, held, local, form, name)
        unknown |= {str(key) for key in saved if key not in _states.known_keys(kind)}
        if rewritten is not None:
            params.append((param, rewritten))
    if unknown:
        warnings.warn(
            f"states of the state dict hold {', '.join(sorted(unknown))}, which {kind} does not know: copies are "
            f"kept in "
            "optimizer.state, and nothing is done with them",
            stacklevel=3,
        )
    everyone = [param for group in groups for param in group["params"]]
    origins = _model_loads.origins_of(state_dict.get(_model_loads.KEY), everyone, state)
    # Their weights have other digits in another dtype.
    origins |= dict.fromkeys((param for param, _ in params), None)
    return Loaded(state, params, origins)


def described_groups(
    kind: str, groups: Sequence[Mapping[str, Any]], packed: Sequence[Mapping[str, Any]], state: Mapping[Any, Any],
    dtype_of: Callable[[Tensor], torch.dtype],
) -> list[dict[str, Any]]:  # fmt: skip
    """Groups as ``state_dict()`` shows them: their options as a tensor that says how states are stored.

    It lies where the states do: torch's ``set_optimizer_state_dict(full_state_dict=True)`` wants one device for all.
    """
    result = []
    device = _device_of(groups, state)
    for group, shown in zip(groups, packed):
        stored = []
        for param in group["params"]:
            held = state.get(param) or {}
            codec = _states.stored_codec(kind, held, _states.slots_in(kind, held))
            has_correction = held.get(_states.CORRECTION) is not None
            stored.append(
                Stored(
                    _CODEC_NAMES.get(codec),
                    str(dtype_of(param)).removeprefix("torch.") if has_correction else None,
                )
            )
        key = _groups.description_key(kind)
        options = {name: group[name] for name in _groups.PACKED_OPTIONS}
        result.append({**shown, key: _groups.describe(kind, options, stored).to(device)})
    return result


def _device_of(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> torch.device:
    """Where the first parameter with a state has its arrays; without any, the first parameter."""
    params = [param for group in groups for param in group["params"]]
    first = next((param for param in params if state.get(param)), params[0] if params else None)
    return torch.device("cpu") if first is None else _parameters.plain(first).device


def check_owned(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """ValueError unless every entry of ``state`` is a dict of a parameter of ``groups``."""
    owned = {id(param) for group in groups for param in group["params"]}
    for key, held in state.items():
        if id(key) not in owned:
            what = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)
            raise ValueError(
                f"optimizer.state holds an entry of {what}, which is in no group: nothing could load it; delete it "
                "(del optimizer.state[...]), or add the parameter to a group"
            )
        if not isinstance(held, Mapping):
            raise ValueError(f"optimizer.state holds a {type(held).__name__} for a parameter; allowed is a dict")


def shown(
    kind: str,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    dtype_of: Callable[[Tensor], torch.dtype],
    compress: bool,
) -> dict[str, Any]:
    """What ``state_dict()`` gives: parameters by number, states as they are stored (``compress``) or in fp32."""
    params = [param for group in groups for param in group["params"]]
    numbers = {id(param): number for number, param in reversed(list(enumerate(params)))}
    states: dict[Any, Any] = {}
    for param, held in state.items():
        if not isinstance(param, Tensor):
            states[param] = held
        elif compress:
            states[numbers[id(param)]] = _packing.packed(held)
        else:
            states[numbers[id(param)]] = _packing.expanded(kind, held, param)
    packed = [{**group, "params": [numbers[id(param)] for param in group["params"]]} for group in groups]
    result = {"state": states, "param_groups": described_groups(kind, groups, packed, state, dtype_of)}
    if compress:
        result[_model_loads.KEY] = _model_loads.weights_of(params, state)
    result[_checksums.KEY] = _checksums.of_state_dict(result, len(params))
    return result
