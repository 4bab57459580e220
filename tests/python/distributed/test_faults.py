"""A process that dies, hangs or raises: the others end with an error in time, and what was complete stays whole."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import MAKE, Bag
from processes import Processes, device_count, run
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

NAMES = ("even", "uneven", "few_rows", "bias")
#: Seconds that a collective of these tests waits, and those within which all must have ended.
WAIT, LIMIT = 4, 40
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Torn(RuntimeError):
    """What a process of these tests raises."""


def _fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hung":
        time.sleep(LIMIT * 2)
    raise Torn("raised on purpose")


def _held(model: Any, optimizer: Any) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=FLAT),
    }


def _short_timeout(model: Any) -> None:
    mesh_group = next(
        iter(model.parameters())
    ).device_mesh.get_group()  # the world's own, or another, by torch's version
    for group in (dist.group.WORLD, mesh_group):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=WAIT), group)


def faulty(rank: int, world: int, where: str, how: str, path: str) -> str:
    """Trains, saves; then the last rank fails at ``where``. Returns what the others are told."""
    model = layouts.lay_out(Bag(NAMES), "fsdp", world)
    optimizer = MAKE["adamw"](model.named_parameters())
    layouts.steps(model, optimizer, 0, 2)
    dcp.save(_held(model, optimizer), checkpoint_id=path + "/complete")
    _short_timeout(model)
    fails = rank == world - 1
    try:
        if where == "step":
            layouts.set_gradients(model, 2)
            if fails:
                _fail(how)
            optimizer.clip_grad_norm_(1.0)  # the step itself asks nobody
            optimizer.step()
        elif where == "save":
            held = _held(model, optimizer)
            if fails:
                held["bad"] = _Unpicklable(how)
            dcp.save(held, checkpoint_id=path + "/torn")
        else:
            held = _held(model, optimizer)
            if fails:
                _fail(how)
            dcp.load(held, checkpoint_id=path + "/complete")
        dist.barrier()
    except (Exception, CheckpointException) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


class _Unpicklable:
    """Something to save that ends its process while it is written."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        _fail(self.how)


def resumed(rank: int, world: int, path: str) -> int:
    """The last complete checkpoint, on as many processes as there are."""
    model = layouts.lay_out(Bag(NAMES), "fsdp", world)
    for param in model.parameters():
        param.detach().zero_()
    optimizer = MAKE["adamw"](model.named_parameters())
    held = _held(model, optimizer)
    dcp.load(held, checkpoint_id=path + "/complete")
    set_model_state_dict(model, held["model"])
    set_optimizer_state_dict(model, optimizer, held["optim"], options=FLAT)
    layouts.steps(model, optimizer, 2, 4)
    got = layouts.whole_of(model, optimizer)
    return layouts.compare(got, layouts.bag_alone(NAMES, "adamw", {}, torch.bfloat16, 4), "resumed") if rank == 0 else 0


_CASES = [(where, how) for where in ("step", "save", "load") for how in ("killed", "hung", "raises")]
_SHORT = [("step", "killed"), ("save", "raises"), ("load", "hung")]


@pytest.mark.skipif(device_count() < 2, reason="one process has no other")
@pytest.mark.parametrize(("where", "how"), _CASES if os.environ.get("FLASHOPTIM_TEST_ALL") else _SHORT)
def test_a_process_that_fails(request, tmp_path, where, how):
    world = device_count()
    processes = Processes(world)
    start = time.monotonic()
    try:
        answers = processes.attempt(faulty, where, how, str(tmp_path), timeout=LIMIT, last=3.0)
    finally:
        processes.end()
    assert time.monotonic() - start < LIMIT + 15
    for ok, said in answers[:-1]:  # an error was raised there, or the back end ended the process
        assert (said != "nothing was said") if ok else said.startswith("died"), (where, how, answers)
    if how == "killed":
        assert not answers[-1][0] and "-9" in answers[-1][1]
    assert not (Path(tmp_path) / "torn" / ".metadata").exists()
    run(request, min(3, world), resumed, str(tmp_path))


def without_a_file(rank: int, world: int, path: str, by_torch: bool) -> tuple[str, bool, bool]:
    """Loading from a checkpoint of which one rank's file is missing, ours or torch's AdamW."""
    model = layouts.lay_out(Bag(NAMES), "fsdp", world)
    optimizer = torch.optim.AdamW(model.parameters()) if by_torch else MAKE["adamw"](model.named_parameters())
    layouts.steps(model, optimizer, 0, 2)
    dcp.save(_held(model, optimizer), checkpoint_id=path)
    layouts.steps(model, optimizer, 2, 3)
    states = layouts.whole_of(model, optimizer)
    held = _held(model, optimizer)
    dist.barrier()
    if rank == 0:
        os.remove(path + "/__1_0.distcp")
    dist.barrier()
    said = ""
    try:
        dcp.load(held, checkpoint_id=path)
    except (Exception, CheckpointException) as error:
        said = f"{type(error).__name__}: {error}"
    now = layouts.whole_of(model, optimizer)
    is_as_before = all(layouts.same_bits(now[key], states[key]) for key in states)
    steps_are = all(layouts.same_bits(now[key], states[key]) for key in states if key.endswith("/step"))
    return said, is_as_before, steps_are


@pytest.mark.skipif(device_count() < 2, reason="one process has one file")
def test_a_missing_file_leaves_what_torch_adamw_is_left_with(tmp_path):
    """DCP loads into live tensors, so an error in the middle of reading leaves some of them read."""
    world = 2
    results = []
    for by_torch in (True, False):
        processes = Processes(world)
        try:
            results.append(processes.run(without_a_file, str(tmp_path / str(by_torch)), by_torch))
        finally:
            processes.end()
    for theirs, ours in zip(*results):
        assert "__1_0.distcp" in theirs[0] and "__1_0.distcp" in ours[0]
        assert theirs[1] == ours[1]
