"""examples/python/train_fsdp2.py by torchrun: killed, resumed on as many processes and on another number."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import device_count

import flashoptim_native

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["--steps", "12", "--save-every", "4"]


def torchrun(world: int, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    script = str(ROOT / "examples" / "python" / "train_fsdp2.py")
    return subprocess.run(
        [*command, script, "--out", str(out), *SMALL, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def weights(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.skipif(
    device_count() < 2 or not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="two processes, long: FLASHOPTIM_TEST_ALL=1"
)
def test_killed_and_resumed(tmp_path):
    world = min(2, device_count())
    uninterrupted = weights(torchrun(world, tmp_path / "a"))
    killed = torchrun(world, tmp_path / "b", "--kill-at", "6")
    assert killed.returncode != 0 and "step 4" in killed.stdout and "step 8" not in killed.stdout
    assert (tmp_path / "b" / "step_000004" / ".metadata").exists()
    resumed = torchrun(world, tmp_path / "b")
    assert "from step 4" in resumed.stdout and weights(resumed) == uninterrupted
    # On another number of processes, from step 8.
    shutil.rmtree(tmp_path / "b" / "step_000012")
    assert "from step 8" in torchrun(min(3, device_count()), tmp_path / "b").stdout
    # Released gradients are not clipped, and one process adds up in another order: another run.
    other = torchrun(1, tmp_path / "c", "--release")
    assert weights(other).startswith("weights after step 12: ")
