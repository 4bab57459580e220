"""Readers against files that the packages write now, from PyPI into an environment of their own (test-all).

FLASHOPTIM_PEERS_PYTHON names another Python that has them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashoptim_native import convert
from test_convert import KINDS, fp32_states, is_shown

MAKER = Path(__file__).resolve().parents[1] / "data" / "convert" / "make_samples.py"
PACKAGES = ["bitsandbytes", "torchao", "flashoptim==0.1.4", "safetensors", "numpy"]

pytestmark = pytest.mark.skipif(
    not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="installs packages, minutes: FLASHOPTIM_TEST_ALL=1"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    given = os.environ.get("FLASHOPTIM_PEERS_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.mktemp("peers") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    made = str(folder / "bin" / "python")
    version = torch.__version__.split("+")[0]
    subprocess.run([made, "-m", "pip", "install", "-q", f"torch=={version}", *PACKAGES], check=True, timeout=1800)
    return made


@pytest.mark.parametrize(("package", "count"), [("bitsandbytes", 6), ("torchao", 3), ("reference", 3)])
def test_what_a_package_writes_today(python, tmp_path, package, count):
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": ""}
    subprocess.run([python, str(MAKER), str(tmp_path), package], check=True, env=environment, timeout=900)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == count
    for file in files:
        held = convert.load(file)
        named = {**KINDS, "adamw32": "adamw"}
        kind = next(named[part] for part in file.stem.split("_") if part in named)
        assert convert.detect(held["saved"]) == package
        states = fp32_states(held["saved"], kind)
        for number, slots in held["expected"].items():
            for slot, values in slots.items():
                if slot != "weights":
                    is_shown(states[number][slot], values)


def test_safetensors_reads_what_we_write_and_the_other_way(python, tmp_path):
    weights = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.arange(4), "d": torch.zeros(0, 2)}
    torch.save(weights, tmp_path / "weights.pt")
    convert.weights_file(tmp_path / "weights.pt", tmp_path / "ours.safetensors", dtype=torch.bfloat16, keep_fp32=["*"])
    code = """
import sys, torch
from safetensors.torch import load_file, save_file
weights = load_file(sys.argv[1] + "/ours.safetensors")
save_file(weights, sys.argv[1] + "/theirs.safetensors", {"format": "pt"})
"""
    subprocess.run([python, "-c", code, str(tmp_path)], check=True)
    for name in ("ours", "theirs"):
        read = convert.load_weights(tmp_path / f"{name}.safetensors")
        assert read.keys() == weights.keys()
        assert all(torch.equal(read[key], value) and read[key].dtype == value.dtype for key, value in weights.items())
