"""The package's own name, and its stand-in for the package called flashoptim."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import flashoptim_native

PACKAGE = str(Path(flashoptim_native.__file__).resolve().parents[1])

USES_BOTH = """
import sys
sys.path[:0] = {paths!r}
import flashoptim_native
import flashoptim
assert flashoptim.WHO == "the other", flashoptim
import torch
p = torch.nn.Parameter(torch.ones(4, 64, dtype=torch.bfloat16))
p.grad = torch.ones_like(p)
optimizer = flashoptim_native.FlashAdamW([p], lr=0.5)
optimizer.step()
assert p[0, 0].item() < 1
try:
    flashoptim_native.install_as_flashoptim()
except RuntimeError as error:
    assert "'flashoptim'" in str(error) and "other_package" in str(error), error
else:
    raise AssertionError("took the other package's name")
assert flashoptim.WHO == "the other" and sys.modules["flashoptim"] is flashoptim
"""

STANDS_IN = """
import sys
sys.path[:0] = {paths!r}
import flashoptim_native
flashoptim_native.install_as_flashoptim()
flashoptim_native.install_as_flashoptim()
import flashoptim
import flashoptim.optimizers
from flashoptim.optimizers import FlashAdamW
from flashoptim import FlashLion
assert flashoptim is flashoptim_native and FlashAdamW is flashoptim_native.FlashAdamW
assert flashoptim.optimizers is flashoptim_native.optimizers
assert FlashAdamW.__module__ == "flashoptim_native.optimizers"
"""


def _run(program: str, other: Path) -> None:
    paths = [PACKAGE, str(other.parent)]
    done = subprocess.run(
        [sys.executable, "-c", program.format(paths=paths)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def _other_package(folder: Path) -> Path:
    other = folder / "other_package" / "flashoptim"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text('WHO = "the other"\n')
    return other


def test_both_packages_in_one_process(tmp_path: Path) -> None:
    _run(USES_BOTH, _other_package(tmp_path))


def test_stands_in_for_the_other_name(tmp_path: Path) -> None:
    _run(STANDS_IN, _other_package(tmp_path))
