"""The table of docs/cpp_api.md, feature | Python | C++, names tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "cpp_api.md"


def rows():
    if not PAGE.exists():
        return []
    lines = PAGE.read_text().partition("## What either front end has")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[2:]


def python_tests():
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^\s*def (test_\w+)", file.read_text(), re.MULTILINE)}


def cpp_tests():
    files = (ROOT / "tests" / "libtorch").glob("*.cpp")
    found = [re.findall(r"^TEST(?:_[FP])?\((\w+),\s*(\w+)\)", file.read_text(), re.MULTILINE) for file in files]
    return {f"{suite}.{name}" for pairs in found for suite, name in pairs}


def test_every_row_has_two_cells():
    assert len(rows()) > 20
    assert all(len(row) == 3 for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_cell_names_a_test_or_says_why_there_is_none(row):
    _, python, cpp = row
    for cell, known in ((python, python_tests()), (cpp, cpp_tests())):
        names = re.findall(r"`([\w.]+)`", cell)
        assert names or cell.startswith("no: "), cell
        assert set(names) <= known, f"{sorted(set(names) - known)} of {cell!r} is no test"
