"""Other people's training loops over these optimizers, from PyPI into an environment of their own (test-all).

docs/distributed.md, "Integrations", has the lines that they show. Each trains on two gloo processes, saves half-way,
and a second run that loads ends with the bits of the first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashoptim_native

HERE = Path(__file__).resolve().parent
VERSION = torch.__version__.split("+")[0]
PACKAGES = ["accelerate", "transformers", "lightning", "numpy"]
CASES = [
    *("accelerate-ddp", "accelerate-sharded", "accelerate-full", "lightning-ddp", "lightning-sharded"),
    *("lightning-full", "trainer-ddp", "trainer-sharded", "trainer-full", "transformers-fsdp2", "nemo-flat-offload"),
]

pytestmark = pytest.mark.skipif(
    not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="installs packages, minutes: FLASHOPTIM_TEST_ALL=1"
)


@pytest.fixture(scope="session")
def frameworks(tmp_path_factory):
    """Python of an environment with the frameworks beside this torch; FLASHOPTIM_FRAMEWORKS_PYTHON names another."""
    given = os.environ.get("FLASHOPTIM_FRAMEWORKS_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("frameworks") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    # One command, in which torch is pinned: else pip brings another.
    subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={VERSION}", *PACKAGES], check=True, timeout=1800)
    return python


@pytest.mark.parametrize("case", CASES)
def test_integration(frameworks, tmp_path, case):
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([package, str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [frameworks, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "integrations.py"), case, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "the same bits" in done.stdout
