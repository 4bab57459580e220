"""benchmarks/memory: its scripts run at a tiny size, and its loss is the cross entropy."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashoptim_native

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "memory"


def run(script, *options):
    package = str(Path(flashoptim_native.__file__).resolve().parents[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, options)],
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("mixed", [False, True])
def test_chunked_cross_entropy(mixed):
    spec = importlib.util.spec_from_file_location("memory_common", FOLDER / "common.py")
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    data = torch.randint(50, (2, 11))
    results = []
    for is_chunked in (False, True):
        torch.manual_seed(1)
        hidden = torch.randn(2, 11, 16, requires_grad=True)
        weight = torch.randn(50, 16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if is_chunked:
                loss = common.chunked_cross_entropy(hidden, weight, data, chunk=4)
            else:
                logits = torch.nn.functional.linear(hidden, weight)
                loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), data.flatten())
        (3 * loss).backward()
        results.append((loss, hidden.grad, weight.grad))
    tolerance = {"rtol": 0.05, "atol": 5e-3} if mixed else {"rtol": 1e-5, "atol": 1e-6}
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(common.chunked_cross_entropy(hidden, weight, data, 5), loss, **tolerance)


def test_scripts_and_report(tmp_path):
    options = ("--device", "cpu", "--tiny", "--steps", "3", "--out", tmp_path)
    run("llama_shape.py", *options)
    run("llama_shape.py", *options, "--gradient-release")
    run("gpt2.py", *options)
    run("llama_shape.py", *options[:-1], tmp_path / "pairs", "--gradient-release", "--checkpoint-blocks", "2")
    (pairs,) = (json.loads(path.read_text()) for path in (tmp_path / "pairs").glob("*.json"))
    runs = {path.stem: json.loads(path.read_text())["results"] for path in tmp_path.glob("*.json")}
    for name in ("llama_shape-tiny-flash", "gpt2-tiny-flash"):
        plain, released = runs[name], runs[f"{name}-release"]
        assert plain["loss"] == released["loss"]
        assert (plain["gradient_bytes_per_parameter"], released["gradient_bytes_per_parameter"]) == (2.0, 0.0)
    assert (
        pairs["results"]["loss"] == runs["llama_shape-tiny-flash"]["loss"] and pairs["config"]["checkpoint_blocks"] == 2
    )
    torchs = runs["gpt2-tiny-torch-fused"]
    assert abs(torchs["val_loss"] - runs["gpt2-tiny-flash"]["val_loss"]) < 0.02
    assert 16.0 < torchs["bytes_per_parameter"] < 16.01
    text = run("report.py", "--runs", tmp_path)
    assert "| FlashAdamW, bf16, 24 bit, gradient release |" in text and "## llama_shape" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
