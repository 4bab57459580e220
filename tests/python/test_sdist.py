"""The source distribution: what is in it, and that it builds without nvcc, says so, and trains."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"CMakeLists.txt", "LICENSE", "README.md", "cmake", "include", "libtorch", "pyproject.toml", "python", "src"}


def run(*command, **more):
    done = subprocess.run(
        [str(one) for one in command], capture_output=True, text=True, timeout=1800, check=False, **more
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    program = f"import scikit_build_core.build as b; b.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=ROOT)
    (made,) = folder.iterdir()
    return made


def test_it_holds_what_a_build_needs_and_no_more(sdist):
    with tarfile.open(sdist) as file:
        names = {Path(name).relative_to(Path(name).parts[0]) for name in file.getnames()}
    roots = {name.parts[0] for name in names}
    assert roots >= SOURCES | {"PKG-INFO"}
    unknown = {root for root in roots if (ROOT / root).is_dir()} - SOURCES
    assert unknown == set()
    assert not any(name.suffix in (".so", ".pyc") or "tests" in name.parts for name in names)
    tracked = run("git", "-C", ROOT, "ls-files", "python", "cmake", "include", "libtorch", "src").split()
    assert {Path(one) for one in tracked} <= names
    assert sdist.stat().st_size < 1_000_000


@pytest.mark.skipif(not os.environ.get("FLASHOPTIM_TEST_ALL"), reason="compiles, two minutes: FLASHOPTIM_TEST_ALL=1")
def test_it_builds_without_nvcc_and_trains(sdist, tmp_path):
    """In an environment that has torch and this package alone; pip may bring nothing else."""
    scripts = Path(sys.executable).parent
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FLASHOPTIM", "PYTHON", "CUDA"))}
    env["PATH"] = os.pathsep.join([str(scripts), "/usr/bin", "/bin"])
    pip = (sys.executable, "-m", "pip")
    options = ("--disable-pip-version-check", "--no-index")
    said = run(
        *pip, "wheel", *options, "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path / "wheel", sdist,
        env=env,
    )  # fmt: skip
    assert "no nvcc found" in said and "GPU code is left out" in said
    (wheel,) = (tmp_path / "wheel").iterdir()
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "torch_of_build.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(*pip, "--python", python, "install", *options, wheel)
    said = run(python, ROOT / "tests" / "consumer" / "one_step.py", cwd=tmp_path, env=env)
    assert "expected about 0.999" in said
