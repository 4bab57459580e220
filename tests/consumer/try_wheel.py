"""Looks at what a wheel's library needs of the system, installs it beside torch alone, and trains with it.

usage: try_wheel.py WHEEL     (run by a Python that has torch; its torch is what the new environment sees)

The library may need functions of glibc up to 2.28 and of no libstdc++ or OpenMP, which old
systems have in other versions. Installing the wheel must bring no other package and change none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

NEWEST_GLIBC = (2, 28)
SYSTEM_LIBRARIES = {
    *("libc.so.6", "libgcc_s.so.1", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    "ld-linux-x86-64.so.2",
}
TORCH = "libtorch_cpu.so"

LIST = "import json, importlib.metadata as m; print(json.dumps([f'{d.name} {d.version}' for d in m.distributions()]))"


def run(*command: str | Path, folder: str | None = None) -> str:
    """Output of a command, run in `folder` if there is one; its failure is an error that shows what it printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def check_library(wheel: Path, folder: Path) -> None:
    (library,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))
    path = zipfile.ZipFile(wheel).extract(library, folder)
    needed = set(re.findall(r"NEEDED +(\S+)", run("objdump", "-p", path)))
    if TORCH not in needed or not needed - {TORCH} <= SYSTEM_LIBRARIES:
        raise SystemExit(f"{library} needs {sorted(needed)}; allowed are {TORCH} and {sorted(SYSTEM_LIBRARIES)}")
    late = {
        f"{symbol} ({kind}_{version})"
        for kind, version, symbol in re.findall(
            r"UND\*.*\((GLIBC|GLIBCXX|CXXABI)_([0-9.]+)\) +(\S+)", run("objdump", "-T", path)
        )
        if kind != "GLIBC" or tuple(map(int, version.split(".")[:2])) > NEWEST_GLIBC
    }
    if late:
        raise SystemExit(f"{library} needs of a later system than glibc 2.28, or of libstdc++: {sorted(late)}")


def main(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_library(wheel, Path(folder) / "wheel")
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        python = Path(folder) / "bin" / "python"
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        # torch of this Python, which --system-site-packages would not show where this one is an environment itself.
        (Path(site) / "torch_of_build.pth").write_text(sysconfig.get_path("purelib") + "\n")
        before = run(python, "-c", LIST)
        # With dependencies and without an index: what is not there already would be an error.
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--no-index")
        run(*pip, wheel)
        after = run(python, "-c", LIST)
        changed = set(json.loads(after)) ^ set(json.loads(before))
        if {one.partition(" ")[0] for one in changed} != {"flashoptim-native"}:
            raise SystemExit(f"the wheel changed more than itself: {sorted(changed)}")
        print(run(python, HERE / "one_step.py", folder=folder).strip())
        print(run(python, HERE.parents[1] / "examples" / "readme" / "train.py", folder=folder).strip())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]).resolve())
