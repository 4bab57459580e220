"""pytest plugin: puts our optimizers in the place of a suite's own, and holds its results against what is pinned.

run.py loads it in the suite's process; FLASHOPTIM_SUITE names the suite. Tests that are pinned in expected.toml must
fail (xfail, strict): one that passes has to be taken from the list, and a pattern that matches no test, too.
"""

import fnmatch
import importlib
import os
from pathlib import Path

import pytest
import tomllib

HERE = Path(__file__).resolve().parent
SUITE = os.environ["FLASHOPTIM_SUITE"]
PINS = tomllib.loads((HERE / "expected.toml").read_text()).get(SUITE, {})
SHIM = importlib.import_module(f"shims.{PINS['shim']}")
SHIM.install()


def pytest_collection_modifyitems(session, config, items):
    """Leaves the tests of ours, and expects what is pinned."""
    kept, others = [], []
    for item in items:
        (kept if SHIM.is_ours(item.nodeid) else others).append(item)
    items[:] = kept
    if others:
        config.hook.pytest_deselected(items=others)
    unused = []
    for pin in PINS.get("pins", []):
        for pattern in pin["tests"]:
            found = [item for item in kept if fnmatch.fnmatchcase(item.nodeid, pattern)]
            if not found:
                unused.append(pattern)
            for item in found:
                item.add_marker(pytest.mark.xfail(reason=pin["reason"], strict=True, run=pin.get("run", True)))
    if unused:
        raise pytest.UsageError(f"expected.toml: patterns of {SUITE} match no test: {', '.join(unused)}")
