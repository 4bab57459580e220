"""docs/distributed.md says what works by the names of tests: they are there."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_tests_named_in_the_docs_are_there():
    text = (HERE.parents[2] / "docs" / "distributed.md").read_text()
    named = set(re.findall(r"`(test_[a-z0-9_]+)`", text))
    code = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", code, re.MULTILINE))
    assert len(named) > 30 and named <= there, sorted(named - there)
    rows = [line for line in text.split("### What was compared")[0].splitlines() if line.startswith("| ")]
    without = [row for row in rows if "`test_" not in row and not row.startswith(("| layout", "| feature"))]
    assert len(rows) > 25 and not without, without
