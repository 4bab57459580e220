"""Processes with a process group, kept for many cases: gloo on the CPU, nccl where there are GPUs.

Each is forked from a server that has imported torch once. FLASHOPTIM_TEST_DEVICE=cpu tests gloo where there are GPUs.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: Seconds of one case, and of one collective.
CASE_TIMEOUT = 150
COLLECTIVE_TIMEOUT = 60

_numbers = itertools.count()


def device_type() -> str:
    """Where the tests run."""
    import flashoptim_native

    wanted = os.environ.get("FLASHOPTIM_TEST_DEVICE")
    if wanted is not None:
        return wanted
    return "cuda" if torch.cuda.is_available() and flashoptim_native._ops.has_cuda() else "cpu"


def device_count() -> int:
    """The most processes that a case can have."""
    return 4 if device_type() == "cpu" else min(4, torch.cuda.device_count())


def worlds(*wanted: int) -> list[int]:
    """Numbers of processes for a case: those wanted, or as many as there are GPUs."""
    return sorted({min(world, device_count()) for world in wanted})


def _work(rank: int, world: int, device: str, folder: str, pipe: Any) -> None:
    """One process: takes functions from the pipe until it is closed."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        # Checkpoints are planned on the host.
        "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT),
        device_id=torch.device("cuda", rank) if device == "cuda" else None,
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            answer = (True, function(rank, world, *arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def _server() -> Any:
    """multiprocessing's context whose server has imported what the processes need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes_preload"])
    # The server finds modules by its environment alone (it ignores sys.path before Python 3.14).
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


class Failed(AssertionError):
    """What went wrong in the processes, the first of them first."""


class Processes:
    """``world`` processes of one process group."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = _server()
        device = device_type()
        self._pipes, self._processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, world, device, self._folder.name, theirs), daemon=True, name=f"rank {rank}"
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(rank, world, *arguments)`` returns in every process.

        Raises:
            Failed: it raised somewhere, or did not end in time; the processes are gone then.
        """
        answers = self.attempt(function, *arguments)
        bad = [(rank, text) for rank, (ok, text) in enumerate(answers) if not ok]
        if bad:
            # A process that lost its peer says less than the one that failed.
            bad.sort(key=lambda one: any(word in one[1] for word in ("closed by peer", "Timed out", "no answer")))
            raise Failed("\n".join(f"rank {rank}: {text}" for rank, text in bad[:2]))
        return [value for _, value in answers]

    def attempt(
        self, function: Callable[..., Any], *arguments: Any, timeout: float = CASE_TIMEOUT, last: float = CASE_TIMEOUT
    ) -> list[tuple[bool, Any]]:
        """The same as (whether it returned, value or traceback) of every process; one that died says so.

        The last process is waited for ``last`` seconds more than the others.
        """
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, arguments))
        end = time.monotonic() + timeout
        answers: list[tuple[bool, Any]] = []
        for pipe, process in zip(self._pipes, self._processes):
            if pipe is self._pipes[-1]:
                end = min(end, time.monotonic() + last)
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    answers.append((False, f"no answer within {timeout} s"))
                    continue
                answers.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                process.join(5)
                answers.append((False, f"died ({process.exitcode})"))
            if not answers[-1][0]:  # the others wait for it, but not for long
                end = min(end, time.monotonic() + 10)
        if not all(ok for ok, _ in answers):
            self.end()
        return answers

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()  # one that has ended meanwhile is no error
                process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()


_pools: dict[int, Processes] = {}


def pool(world: int) -> Processes:
    """The processes of this session for cases of ``world`` ranks."""
    if world not in _pools or not _pools[world].alive:
        _pools[world] = Processes(world)
    return _pools[world]


def end_all() -> None:
    for processes in _pools.values():
        processes.end()
    _pools.clear()


class Counts:
    """What a session has compared, by memcmp."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = {}

    def add(self, test: str, arrays: int) -> None:
        self.cases[test] = self.cases.get(test, 0) + arrays


counts = Counts()


def run(request: Any, world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs a case, and counts the arrays that it says it has compared."""
    results = pool(world).run(function, *arguments)
    counts.add(request.node.nodeid.rsplit("::", 1)[-1], sum(value for value in results if isinstance(value, int)))
    return results


def scratch_folder(tmp_path: Path) -> str:
    folder = tmp_path / f"shared{next(_numbers)}"
    folder.mkdir()
    return str(folder)


__all__ = [
    "COLLECTIVE_TIMEOUT",
    "Failed",
    "Processes",
    "device_count",
    "device_type",
    "pool",
    "run",
    "scratch_folder",
    "worlds",
]
