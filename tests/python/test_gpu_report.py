"""tools/gpu_report.py: a page of what tools/gpu_check.sh has written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

BENCHMARK = """\
NVIDIA H100 80GB HBM3, 132 multiprocessors, CUDA driver 13.0, copy 3000 GB/s
256Mi, one tensor            AdamW default, bf16 g bf16, 24        268.4   1.2000   1.1900     2740\
   91.3%    1.2500      8.9
ResNet-50                    AdamW default, bf16 g bf16, 24         25.6   0.1400   0.1300     2240\
   74.7%    0.2800     15.8
ResNet-50                      gradient norm                               0.0348              1471   48.7%
"""
TORCH = "256Mi, one tensor            torch AdamW fused, fp32               268.4   2.7991   3.0140    3.0703\n"


def report(logs: Path, **training) -> list[str]:
    (logs / "benchmark.txt").write_text(BENCHMARK)
    (logs / "torch_fused_AdamW.log").write_text(TORCH)
    (logs / "checks.txt").write_text("bits   ok   70 s\n")
    (logs / "facts.txt").write_text("device=NVIDIA H100 80GB HBM3, 580, 81559 MiB\ncommit=abc1234\ncommand=run\n")
    if training:
        (logs / "memory").mkdir()
        (logs / "memory" / "llama_shape-flash.json").write_text(json.dumps(training))
    script = [sys.executable, ROOT / "tools" / "gpu_report.py", logs, logs / "page.md"]
    subprocess.run(script, check=True)
    return (logs / "page.md").read_text().splitlines()


def test_aims_are_held_against_what_was_measured(tmp_path):
    page = report(tmp_path, results={"parameters": 8_000_000_000, "optimizer_ms": 35.0})
    assert "- commit abc1234, everything from one run: `run`; copy" in page
    assert "| 256Mi, one tensor | 1.200 | 91.3 % | 1.16 | 1.13 | 2.80 | no |" in page
    # Wall time, and its own share.
    assert "| ResNet-50, wall time | 0.280 | 37.4 % | 0.25 | 0.16 |  | no |" in page
    assert "| Llama-3.1-8B's shape, in training | 35.00 | 93.3 % | 36 | 34 | does not fit | yes |" in page
    assert "| ResNet-50 | gradient norm | 0.0348 | 1471 | 48.7 % |" in page
    assert "bits   ok   70 s" in page


@pytest.mark.parametrize("training", [{}, {"results": None}], ids=["not run", "out of memory"])
def test_without_the_step_in_training(tmp_path, training):
    assert not any("in training" in line for line in report(tmp_path, **training))
