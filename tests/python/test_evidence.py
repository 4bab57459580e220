"""benchmarks/evidence: a run that is stopped goes on to the same numbers, and the page says what the results say."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import flashoptim_native

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"
RUNS = ("lm-fp32-1", "lm-default-1")
TOKENS = {
    "sources": {
        "package": {"Package": "linux-source-6.1", "Version": "6.1.0-1"},
        "code": {"documents": 7, "bytes": 12000},
    },
    "code_train": {"tokens": 6000, "bytes_a_token": 2.0},
    "code_held": {"tokens": 600},
    "vocabulary": 512,
}


#: Calls run_lm's main with each list of options; prints the exit codes.
CALLS = """
import json, sys
import run_lm
print(json.dumps([run_lm.main(options) for options in json.loads(sys.argv[1])]))
"""


def calls(folder, *options):
    """Exit codes and output of run_lm.py, called with each list of options in one process."""
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(FOLDER), package, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    common = ["--toy", "--eager", "--lm-tokens", "1500", "--tokens", str(folder), "--work"]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps([common + list(map(str, each)) for each in options])],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The runs done at one go, with fine-tuning, and stopped at step 3."""
    folder = tmp_path_factory.mktemp("evidence")
    random = np.random.default_rng(0)
    for name, count in (("code_train", 6000), ("code_held", 600), ("prose_train", 600), ("prose_held", 300)):
        (random.integers(1, 64, count) * 7).astype(np.uint16).tofile(folder / f"{name}.bin")
    codes, output = calls(
        folder,
        [folder / "whole", *RUNS, "tune-default-1e-5"],
        [folder / "stopped", "--stop-at-step", 3, *RUNS],
        [folder / "stopped", *RUNS[:1]],
        [folder / "stopped", "--stop-at-step", 3, *RUNS],
        [folder / "stopped", *RUNS],
    )
    assert codes == [0, 3, 0, 3, 0] and "lm-fp32-1 is finished" in output
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_same_numbers(results, name):
    whole, stopped = (json.loads((results / w / "results" / f"{name}.json").read_text()) for w in ("whole", "stopped"))
    assert [resume["step"] for resume in stopped["resumes"]] == [3] and not whole["resumes"]
    assert all(r["same_bytes"] and r["loss_saved"] == r["loss_resumed"] for r in stopped["resumes"])
    for key in ("train_loss", "evaluations", "final", "bytes"):
        assert stopped[key] == whole[key], key
    assert len(whole["train_loss"]) == whole["run"]["steps"] == whole["final"]["step"]


def test_initial_weights_and_batches_are_the_same_for_every_optimizer(results):
    first = [json.loads((results / "whole" / "results" / f"{name}.json").read_text()) for name in RUNS]
    assert first[0]["evaluations"][0] == first[1]["evaluations"][0]
    assert first[0]["train_loss"][0] == first[1]["train_loss"][0]
    assert first[0]["train_loss"] != first[1]["train_loss"]


def test_the_page_has_the_results_numbers_and_names_what_was_not_run(results, tmp_path):
    spec = importlib.util.spec_from_file_location("evidence_report", FOLDER / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    (results / "whole" / "results" / "tokens.json").write_text(json.dumps(TOKENS))
    report.main(
        ["--import-from", str(results / "whole" / "results"), "--results", str(tmp_path / "r")]
        + ["--out", str(tmp_path / "page.md")]
    )
    text = (tmp_path / "page.md").read_text()
    for name in (*RUNS, "tune-default-1e-5"):
        run = json.loads((results / "whole" / "results" / f"{name}.json").read_text())
        assert f"| {run['final']['code']:.4f} |" in text
    assert "`lm-paper-1`" in text and "`tune-default-1e-5`" not in text and "`lm-fp32-2`" in text
    assert (tmp_path / "r" / report.PICTURE).stat().st_size > 1000


def test_an_unknown_run_is_an_error_that_names_what_is_allowed(results):
    with pytest.raises(AssertionError, match=r"no run 'lm-adam-1'.*allowed are.*fp32, default"):
        calls(results, [results / "other", "lm-adam-1"])
