"""The command ``flashoptim-native``: plan, bench, inspect, convert, doctor."""

from __future__ import annotations

import importlib.util
import sys


def main() -> None:
    """Runs the command; ends the process."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"flashoptim-native needs {' and '.join(missing)}, which the library alone does not: "
            "pip install 'flashoptim-native[cli]'"
        )
    from ._app import app

    app(prog_name="flashoptim-native")


__all__ = ["main"]
