"""benchmarks/step/beside_torch.py runs at a tiny size and prints a row for everything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import flashoptim_native

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "step" / "beside_torch.py"


def run(*options):
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_row_for_every_step():
    done = run("--numel", "8192", "--threads", "1", "--turns", "2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "8192 elements, 1 threads" in lines[0] and flashoptim_native.cpu_isa() in lines[0] and "GB/s" in lines[0]
    rows = {line[:28].strip(): [float(x) for x in line[28:].split()] for line in lines[2:]}
    assert list(rows) == [
        "torch fused fp32",
        "torch fused bf16",
        "flashoptim default 24 bit",
        "flashoptim paper 24 bit",
        "copy",
    ]
    assert all(0 < least <= median for least, median, *_ in rows.values())
    assert rows["torch fused fp32"][2:] == [1.0, 1.0]


def test_wrong_options_are_refused():
    done = run("--numel", "0")
    assert done.returncode == 2 and "--numel" in done.stderr


def test_one_parameter_alone():
    script = SCRIPT.with_name("step_param.py")
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), "cpu", "--counts", "3", "7", "--rounds", "1"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["cpu", "3", "parameters:"],
        ["cpu", "7", "parameters:"],
    ]
