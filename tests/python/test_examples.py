"""The examples run, each in 20 seconds of processor time."""

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import flashoptim_native

#: Of those that would take longer.
SHORT = {"tour": ["--quick"]}
EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "python").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(path), *SHORT.get(path.stem, [])],
        cwd=tmp_path,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if path.stem == "tour":
        for stop in (
            "1. Memory",
            "2. Corrections",
            "3. Gradient release",
            "4. Telemetry",
            "5. Policy",
            "6. A checkpoint",
        ):
            assert stop in done.stdout
        is_drawn = (tmp_path / "tour_out" / "tour.png").is_file()
        assert is_drawn == (importlib.util.find_spec("matplotlib") is not None)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "resume", "finetune_groups", "tour"}
