"""The package under test is the installed one; without one, python/ of this checkout with FLASHOPTIM_OPS_LIBRARY."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not take a busy machine's cores

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).resolve().parent))
if importlib.util.find_spec("flashoptim") is None:
    sys.path.insert(0, str(ROOT / "python"))

hypothesis.settings.register_profile("default", deadline=None, max_examples=60, derandomize=True)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
