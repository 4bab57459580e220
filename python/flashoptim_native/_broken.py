"""What the command ``flashoptim-native`` says where the package cannot be imported: doctor's findings without it.

Imports neither torch nor the library: one of them is what does not load.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from pathlib import Path

_COMMAND = "flashoptim-native"


def end_the_command(error: BaseException) -> None:
    """Ends the process with a message, exit code 1 (doctor: a fault was found) or 2, if it is the command.

    Elsewhere nothing happens, and the import fails as it did.
    """
    if not _is_the_command():
        return
    arguments = sys.argv[1:] if Path(sys.argv[0]).name == _COMMAND else sys.orig_argv[_place_of_module() + 1 :]
    if arguments[:1] != ["doctor"]:
        print(f"error: {error}\n({_COMMAND} doctor says more)", file=sys.stderr)
        sys.exit(2)
    findings = _findings(error)
    if "--json" in arguments:
        print(json.dumps(findings, indent=1))
    else:
        for one in findings:
            print(f"{one['level']:<6} {one['name']:<8} {one['text']}")
            if one["remedy"]:
                print(f"{'':<15} -> {one['remedy']}")
    sys.exit(1)


def _is_the_command() -> bool:
    return Path(sys.argv[0]).name == _COMMAND or (sys.argv[0] == "-m" and _place_of_module() > 0)


def _place_of_module() -> int:
    """Where ``-m flashoptim_native`` names the module, in what Python was called with; 0: nowhere."""
    named = __name__.partition(".")[0]
    pairs = zip(sys.orig_argv, sys.orig_argv[1:])
    return next((at + 1 for at, pair in enumerate(pairs) if pair == ("-m", named)), 0)


def _findings(error: BaseException) -> list[dict[str, str]]:
    def finding(level: str, name: str, text: str, remedy: str = "") -> dict[str, str]:
        return {"level": level, "name": name, "text": text, "remedy": remedy}

    found = [finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")]
    spec = importlib.util.find_spec("torch")
    if spec is None:
        return [*found, finding("fault", "torch", "torch is not installed", "pip install torch (2.11 or later)")]
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    found.append(finding("ok", "torch", f"{version}, {Path(spec.origin or '').parent}"))
    if "torch" not in sys.modules:
        return [*found, finding("fault", "torch", f"it cannot be imported: {error}", "install torch anew")]
    override = os.environ.get("FLASHOPTIM_OPS_LIBRARY")
    remedy = "install flashoptim-native anew: pip install --force-reinstall --no-deps flashoptim_native-*.whl"
    if override:
        remedy = (
            "unset FLASHOPTIM_OPS_LIBRARY to use the installed package's own, or point it at one that was built here"
        )
    return [*found, finding("fault", "library", str(error), remedy)]


__all__ = ["end_the_command"]
