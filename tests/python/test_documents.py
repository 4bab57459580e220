"""Tables in the docs name tests: those that they name are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_DEFINED = re.compile(r"^\s*def (test_\w+)\(", re.MULTILINE)


@pytest.mark.parametrize("document", ["compatibility.md", "convert.md"])
def test_tests_that_a_table_names_exist(document):
    files = [path for path in (ROOT / "tests").rglob("*") if path.suffix in (".py", ".cpp")]
    known = {path.name for path in files}
    for path in files:
        if path.suffix == ".py":
            known |= set(_DEFINED.findall(path.read_text()))
    text = (ROOT / "docs" / document).read_text()
    named = set(re.findall(r"`(test_\w+(?:\.py)?|\w+_test\.cpp)`", text))
    assert len(named) > 5
    assert named <= known, sorted(named - known)
