"""Where our code writes files: in Python nowhere but in examples. A kill while torch.save writes leaves a file that is
refused; written beside and renamed, as docs/reliability.md says, the old one or the new one."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from attacks import DOCUMENTED, IS_LONG, contents, small

TRIES = 400 if IS_LONG else 24


def save_until_killed(path, optimizer, ready):
    while True:
        beside = f"{path}.new"
        with open(beside, "wb") as file:
            torch.save(optimizer.state_dict(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        os.write(ready, b".")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is killed")
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, tally):
    chance = random.Random(3)
    _, optimizer = small(steps=2)
    path = tmp_path / "checkpoint.pt"
    _, loaded = small(steps=0)
    for number in range(TRIES):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            save_until_killed(path, optimizer, write)
        assert os.read(read, 1) == b"."  # once written, so there is an old one
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        try:
            loaded.load_state_dict(torch.load(path, weights_only=True))
        except Exception as error:
            tally.find(f"kill {number}: {type(error).__name__}: {error}")
            continue
        same = contents(loaded)[2] == contents(optimizer)[2]
        tally.count("whole") if same else tally.find(f"kill {number}: another state")


def test_a_file_that_a_kill_cut_is_refused(tmp_path, tally):
    """torch.save to the name itself: what a kill, or a full disk, leaves of it."""
    _, optimizer = small(steps=2)
    path = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    _, loaded = small(steps=0)
    for end in range(0, len(whole), 1 if IS_LONG else 401):
        path.write_bytes(whole[:end])
        try:
            loaded.load_state_dict(torch.load(path, weights_only=True))
        except (*DOCUMENTED, EOFError, OSError):
            tally.count("refused")
        else:
            tally.find(f"cut at {end} of {len(whole)}")
