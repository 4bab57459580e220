"""The examples run, each in 20 seconds of processor time."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import flashoptim_native

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "python").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "resume", "finetune_groups"}
