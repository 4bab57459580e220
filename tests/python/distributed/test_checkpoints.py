"""Checkpoints of torch.distributed.checkpoint: from any layout to any layout, by every option, with the same bits."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import MAKE, Bag
from processes import Failed, device_count, device_type, pool, run
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

LONG = bool(os.environ.get("FLASHOPTIM_TEST_ALL"))
NAMES = ("even", "uneven", "few_rows", "odd_rows", "thin_rows", "long_bias", "bias", "conv", "experts")
FEW = ("even", "uneven", "few_rows", "bias", "experts")
#: With those that layouts.CUT has other cuts for.
CUT_ALONG_ANY = (*NAMES, *(name for name in layouts.CUT if name not in NAMES))
WORLD = {
    **{"single": 1, "ddp2": 2, "fsdp1": 1, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "hsdp4": 4},
    **{"tp2": 2, "tp3": 3, "fsdp-cut2": 2, "fsdp-tp4": 4},
}


def _world(layout: str) -> int:
    return min(WORLD[layout], device_count())


def _kind(how: str) -> str:
    return how if how in MAKE else "adamw"


def _build(layout: str, world: int, names: tuple[str, ...], kind: str = "adamw", **options: Any) -> Any:
    model = Bag(names)
    if options.pop("freeze", False):
        next(iter(model.parameters())).requires_grad_(False)
    model = layouts.lay_out(model, layout.rstrip("1234"), world)
    return model, MAKE[kind](model.named_parameters(), **options)


FLAT = {"flatten_optimizer_state_dict": True}
#: By name: options of saving and loading.
OPTIONS: dict[str, dict[str, Any]] = {
    "nested": {},
    "flat": FLAT,
    "flat-offload": {**FLAT, "cpu_offload": True},
    "not-strict": {"strict": False},
    "keep-prefixes": {"keep_submodule_prefixes": True},
    "frozen": {"ignore_frozen_params": True},
    "fresh": {},
    "fresh-flat": FLAT,
    "expanded": {},
    "async": {},
    "convert": {},
    "convert-flat": FLAT,
    "both": {},
}


def _optimizer_kwargs(how: str) -> dict[str, Any]:
    return {"expanded": {"compress_state_dict": False}, "frozen": {"freeze": True}}.get(how, {})


def save(rank: int, world: int, layout: str, how: str, path: str, names: tuple[str, ...]) -> None:
    model, optimizer = _build(layout, world, names, _kind(how), **_optimizer_kwargs(how))
    if not how.startswith("fresh"):
        layouts.steps(model, optimizer, 0, 3)
    options = StateDictOptions(**OPTIONS.get(how, {}))
    if how == "both":
        one, other = get_state_dict(model, optimizer, options=options)
        held = {"model": one, "optim": other}
    else:
        held = {
            "model": get_model_state_dict(model, options=options),
            "optim": get_optimizer_state_dict(model, optimizer, options=options),
        }
    if how.startswith("fresh"):
        assert all(int(state["step"]) == 0 for state in optimizer.state.values())
    if how == "async":
        dcp.async_save(held, checkpoint_id=path).result()
    else:
        dcp.save(held, checkpoint_id=path)


def load(rank: int, world: int, layout: str, how: str, path: str, names: tuple[str, ...]) -> int:
    model, optimizer = _build(layout, world, names, _kind(how), **_optimizer_kwargs(how))
    _forget_weights(model)
    # Those of a DCP checkpoint are shards, and lie where the model does.
    options = StateDictOptions(**OPTIONS.get(how, {}))
    held = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    dcp.load(held, checkpoint_id=path)
    if how == "both":
        set_state_dict(
            model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optim"], options=options
        )
    else:
        strict = StateDictOptions(**{**OPTIONS[how], "strict": False}) if how == "frozen" else options
        set_model_state_dict(model, held["model"], options=strict)
        set_optimizer_state_dict(model, optimizer, held["optim"], options=options)
    return _check_loaded(rank, model, optimizer, how, names)


def _forget_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.zero_()


def _check_loaded(rank: int, model: Any, optimizer: Any, how: str, names: tuple[str, ...]) -> int:
    """Equal to one process that was never interrupted, now and two steps on."""
    first = 0 if how.startswith("fresh") else 3
    got = [layouts.whole_of(model, optimizer)]
    if how != "expanded":
        layouts.steps(model, optimizer, first, first + 2)
        got.append(layouts.whole_of(model, optimizer))
    if rank != 0:
        return 0
    frozen = int(how == "frozen")
    want = [layouts.bag_alone(names, _kind(how), {}, torch.bfloat16, count, frozen) for count in (first, first + 2)]
    if how.startswith("fresh"):  # states of zeros, where one process has none yet
        got[0] = {key: value for key, value in got[0].items() if "/" not in key}
    if how == "expanded":  # codes of fp32 values that were decoded: close, not the same
        exact = [key for key in want[0] if "/" not in key or key.endswith(("step", "correction"))]
        assert got[0].keys() == want[0].keys()
        return layouts.compare(*({key: one[key] for key in exact} for one in (got[0], want[0])), "loaded")
    both = zip(got, want, ("loaded", "went on from the checkpoint"))
    return sum(layouts.compare(one, other, what) for one, other, what in both)


def _trip(
    request: Any, tmp_path: Path, source: str, target: str, how: str, names: tuple[str, ...] = NAMES
) -> None:  # fmt: skip
    path = str(tmp_path / "checkpoint")
    run(request, _world(source), save, source, how, path, names)
    if how.startswith("convert"):
        dcp_to_torch_save(path, str(tmp_path / "one.pt"))
        shutil.rmtree(path)
        torch_save_to_dcp(str(tmp_path / "one.pt"), path)
    run(request, _world(target), load, target, how, path, names)


_LAYOUTS = ("single", "ddp2", "fsdp2", "fsdp3", "hsdp4", "tp2", "fsdp-cut2", "fsdp-tp4")
#: Every layout as source and as target.
_CHAIN = [
    *(("single", "fsdp3"), ("fsdp3", "fsdp-tp4"), ("fsdp-tp4", "fsdp2"), ("fsdp2", "hsdp4"), ("hsdp4", "tp2")),
    *(("tp2", "ddp2"), ("ddp2", "fsdp-cut2"), ("fsdp-cut2", "single"), ("tp2", "fsdp-tp4")),
]


@pytest.mark.parametrize(("source", "target"), list(itertools.product(_LAYOUTS, _LAYOUTS)) if LONG else _CHAIN)
def test_any_layout_to_any_layout(request, tmp_path, source, target):
    """Among the parameters are matrices cut along rows, columns and both, and experts along each of three dimensions.

    FSDP2 over tensor parallelism cuts one dimension twice, which torch calls _StridedShard.
    """
    _trip(request, tmp_path, source, target, "nested", CUT_ALONG_ANY)


@pytest.mark.parametrize("how", [how for how in OPTIONS if how != "nested"])
def test_every_option(request, tmp_path, how):
    _trip(request, tmp_path, "fsdp2", "fsdp3", how)


@pytest.mark.skipif(not LONG, reason="long: FLASHOPTIM_TEST_ALL=1")
@pytest.mark.parametrize("how", list(OPTIONS))
@pytest.mark.parametrize(
    ("source", "target"),
    [("single", "single"), ("ddp2", "ddp2"), ("single", "fsdp3"), ("fsdp3", "single"), ("fsdp-tp4", "tp3")],
)
def test_every_option_elsewhere(request, tmp_path, source, target, how):
    _trip(request, tmp_path, source, target, how)


@pytest.mark.parametrize("kind", list(MAKE) if LONG else ["ademamix", "sgd"])
def test_every_optimizer(request, tmp_path, kind):
    _trip(request, tmp_path, "fsdp-tp4", "fsdp3", kind)


# The whole on rank 0


def save_whole(rank: int, world: int, layout: str, path: str, flat: bool) -> None:
    model, optimizer = _build(layout, world, NAMES)
    layouts.steps(model, optimizer, 0, 3)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=flat)
    held = {
        "model": get_model_state_dict(model, options=options),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if rank == 0:
        torch.save(held, path)
    else:
        assert layout in ("single", "ddp2") or not held["optim"]
    dist.barrier()


def load_whole(rank: int, world: int, layout: str, path: str, flat: bool, by_broadcast: bool) -> int:
    model, optimizer = _build(layout, world, NAMES)
    _forget_weights(model)
    # torch loads no flat dict with full_state_dict=True, of its own AdamW neither; taken for shards, it is cut.
    options = StateDictOptions(
        full_state_dict=not flat, broadcast_from_rank0=by_broadcast, flatten_optimizer_state_dict=flat
    )
    has_it = rank == 0 or not by_broadcast
    held = torch.load(path, weights_only=True) if has_it else {"model": {}, "optim": {}}
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=by_broadcast)
    set_model_state_dict(model, held["model"], options=whole)
    set_optimizer_state_dict(model, optimizer, held["optim"], options=options)
    return _check_loaded(rank, model, optimizer, "whole", NAMES)


@pytest.mark.parametrize(
    ("source", "target", "flat", "by_broadcast"),
    [
        ("fsdp2", "fsdp3", False, True),
        ("fsdp3", "single", False, False),
        ("single", "fsdp3", True, False),
        ("fsdp2", "hsdp4", False, False),
        ("ddp2", "ddp2", False, True),
        ("fsdp2", "ddp2", True, False),
        ("fsdp-tp4", "fsdp-tp4", False, True),
        ("fsdp-tp4", "tp2", False, False),
    ],
)
def test_whole_state_dict(request, tmp_path, source, target, flat, by_broadcast):
    path = str(tmp_path / "whole.pt")
    run(request, _world(source), save_whole, source, path, flat)
    run(request, _world(target), load_whole, target, path, flat, by_broadcast)


# torchtitan's container


def titan_state_dict(optimizer: Any) -> dict[str, Any]:
    """States and options under the full names of parameters, as torchtitan's container flattens them."""
    held = optimizer.state_dict()
    names = {i: name for group in held["param_groups"] for i, name in zip(group["params"], group["param_names"])}
    flat = {f"state.{names[i]}.{key}": value for i, state in held["state"].items() for key, value in state.items()}
    for group in held["param_groups"]:
        for name in group["param_names"]:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            flat.update({f"param_groups.{name}.{key}": value for key, value in options.items()})
    return flat


def titan_unflattened(optimizer: Any, flat: dict[str, Any]) -> dict[str, Any]:
    state, groups, number = {}, [], 0
    for group in optimizer.param_groups:
        numbers = []
        for name, param in zip(group["param_names"], group["params"]):
            numbers.append(number)
            state[number] = {key: flat[f"state.{name}.{key}"] for key in optimizer.state[param]}
            number += 1
        first = group["param_names"][0]
        options = {key: flat[f"param_groups.{first}.{key}"] for key in group if key not in ("params", "param_names")}
        groups.append({"params": numbers, **options})
    return {"state": state, "param_groups": groups}


def titan(rank: int, world: int, path: str) -> int:
    """Groups of matrices and vectors, their own learning rates, states made by a step of zero gradients at lr 0."""

    def build() -> Any:
        model = layouts.lay_out(Bag(NAMES), "fsdp", world)
        groups = []
        for is_matrix in (True, False):
            named = [(name, p) for name, p in model.named_parameters() if (p.dim() > 1) == is_matrix]
            groups.append(
                {
                    "params": [p for _, p in named],
                    "param_names": [name for name, _ in named],
                    "lr": 1e-3 if is_matrix else 2e-3,
                    "weight_decay": 0.1 if is_matrix else 0.0,
                    "fused": True,
                    "foreach": False,
                }
            )
        return model, MAKE["adamw"](groups)

    model, optimizer = build()
    layouts.steps(model, optimizer, 0, 2)
    optimizer.param_groups[0]["lr"] = 5e-4
    dcp.save({"model": get_model_state_dict(model), **titan_state_dict(optimizer)}, checkpoint_id=path)
    other, other_optimizer = build()
    _forget_weights(other)
    rates = [group["lr"] for group in other_optimizer.param_groups]
    for group in other_optimizer.param_groups:
        group["lr"] = 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    other_optimizer.step()
    other_optimizer.zero_grad()
    for group, lr in zip(other_optimizer.param_groups, rates):
        group["lr"] = lr
    held = {"model": get_model_state_dict(other), **titan_state_dict(other_optimizer)}
    dcp.load(held, checkpoint_id=path)
    set_model_state_dict(other, held["model"])
    other_optimizer.load_state_dict(titan_unflattened(other_optimizer, held))
    assert [group["lr"] for group in other_optimizer.param_groups] == [5e-4, 2e-3]
    for one, its in ((model, optimizer), (other, other_optimizer)):
        layouts.steps(one, its, 2, 4)
    got, want = layouts.whole_of(other, other_optimizer), layouts.whole_of(model, optimizer)
    return layouts.compare(got, want, "torchtitan's container") if rank == 0 else 0


def test_torchtitan_conventions(request, tmp_path):
    run(request, _world("fsdp2"), titan, str(tmp_path / "checkpoint"))


# What is refused


def refused(rank: int, world: int, path: str, kind: str, names: tuple[str, ...], flat: bool) -> str:
    """What loading says; nothing of model and optimizer has changed then."""
    model, optimizer = _build("fsdp2", world, names, kind)
    layouts.steps(model, optimizer, 0, 1)
    before = layouts.whole_of(model, optimizer)
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    held = {"optim": get_optimizer_state_dict(model, optimizer, options=options)}
    try:
        dcp.load(held, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, held["optim"], options=options)
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        layouts.compare(layouts.whole_of(model, optimizer), before, "after the refusal")
        assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("kind", ["lion", "adam", "sgd"])
def test_checkpoint_of_another_optimizer_is_refused(request, tmp_path, kind, flat):
    path, how = str(tmp_path / "checkpoint"), "flat" if flat else "nested"
    run(request, _world("fsdp2"), save, "fsdp2", how, path, FEW)
    for message in run(request, _world("fsdp2"), refused, path, kind, FEW, flat):
        # Of the keys that are missing in the file the first is named: a slot, or the one of the optimizer's name.
        assert "Missing key" in message and ("flashoptim_native." + kind in message or "momentum_buffer" in message)


def resized(rank: int, world: int, path: str) -> None:
    layouts.SHAPES["even"] = (128, 64)
    try:
        save(rank, world, "fsdp2", "flat", path, FEW)
    finally:
        layouts.SHAPES["even"] = (96, 64)


def test_checkpoint_of_other_shapes_is_refused(request, tmp_path):
    path = str(tmp_path / "checkpoint")
    run(request, _world("fsdp2"), resized, path)
    for message in run(request, _world("fsdp2"), refused, path, "adamw", FEW, True):
        assert "128" in message and "96" in message


def later_format(rank: int, world: int, path: str) -> None:
    from flashoptim_native import _groups

    before, _groups.FORMAT_VERSION = _groups.FORMAT_VERSION, 3
    try:
        save(rank, world, "fsdp2", "flat", path, FEW)
    finally:
        _groups.FORMAT_VERSION = before


def test_checkpoint_of_another_format_version_is_refused(request, tmp_path):
    path = str(tmp_path / "checkpoint")
    run(request, _world("fsdp2"), later_format, path)
    for message in run(request, _world("fsdp2"), refused, path, "adamw", FEW, True):
        assert "flashoptim_native.adamw.2" in message


# Items and time, beside torch's AdamW


def count_items(rank: int, world: int) -> list[int]:
    result = []
    for make in (MAKE["adamw"], torch.optim.AdamW):
        model = layouts.lay_out(Bag(NAMES), "fsdp", world)
        optimizer = make(model.parameters())
        layouts.steps(model, optimizer, 0, 1)
        result.append(len(get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FLAT))))
    return result


def test_flat_checkpoint_has_no_more_items_than_torch_adamw(request):
    for ours, theirs in pool(_world("fsdp2")).run(count_items):
        assert ours <= theirs


def test_a_failing_case_names_what_failed():
    with pytest.raises(Failed, match="rank 0"):
        pool(1).run(refused, "", "no such optimizer", NAMES, True)
    assert device_type() in ("cpu", "cuda")
