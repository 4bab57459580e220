"""The tables of docs/cpp_api.md, feature | Python | C++, and docs/compatibility.md name tests that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def table(page, heading, end):
    """The cells of the rows between two lines of a page of docs."""
    text = (ROOT / "docs" / page).read_text()
    lines = text.partition(heading)[2].partition(end)[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return cells[2:]


def rows():
    return table("cpp_api.md", "\n## What either front end has\n", "\n## ")


def compared_rows():
    return table("compatibility.md", "# Compatibility\n", "\n## Other people's test suites\n")


def python_tests():
    files = (ROOT / "tests").rglob("test_*.py")
    return {name for file in files for name in re.findall(r"^\s*def (test_\w+)", file.read_text(), re.MULTILINE)}


def cpp_tests():
    files = (ROOT / "tests" / "libtorch").glob("*.cpp")
    found = [re.findall(r"^TEST(?:_[FP])?\((\w+),\s*(\w+)\)", file.read_text(), re.MULTILINE) for file in files]
    return {f"{suite}.{name}" for pairs in found for suite, name in pairs}


def test_every_row_has_its_cells():
    assert len(rows()) > 20 and len(compared_rows()) > 20
    assert all(len(row) == 3 for row in rows())
    assert all(len(row) == 7 and all(row) for row in compared_rows())


@pytest.mark.parametrize("row", rows() + compared_rows(), ids=lambda row: row[0])
def test_every_cell_names_a_test_or_says_why_there_is_none(row):
    *_, python, cpp = row
    for cell, known in ((python, python_tests()), (cpp, cpp_tests())):
        names = re.findall(r"`(test_\w+|\w+\.\w+)`", cell)
        assert names or re.match(r"no: \S", cell), cell
        assert set(names) <= known, f"{sorted(set(names) - known)} of {cell!r} is no test"
