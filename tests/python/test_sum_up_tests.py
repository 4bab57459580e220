"""tools/sum_up_tests.py: the table and the last line of a test run, from what CTest and pytest write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "sum_up_tests.py"

CTEST = """<?xml version="1.0" encoding="UTF-8"?>
<testsuite name="Linux-c++" tests="4" failures="1" disabled="1" skipped="1">
  <testcase name="core.One" classname="core.One" time="0.1" status="run"><system-out/></testcase>
  <testcase name="core.Two" classname="core.Two" time="0.1" status="fail"><failure message=""/></testcase>
  <testcase name="core.Three" classname="core.Three" time="0" status="notrun"><skipped message="SKIP"/></testcase>
  <testcase name="core.Four" classname="core.Four" time="0" status="disabled"/>
</testsuite>
"""
PYTEST = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="1" tests="4">
  <testcase classname="tests.test_a" name="test_one" time="0.1"/>
  <testcase classname="tests.test_a" name="test_two" time="0.1"><failure message="no">no</failure></testcase>
  <testcase classname="tests.test_a" name="test_three" time="0.1"><error message="no">no</error></testcase>
  <testcase classname="tests.test_a" name="test_four" time="0.1"><skipped message="why"/></testcase>
</testsuite></testsuites>
"""
GOOD = '<testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"/></testsuite>'


def sum_up(folder: Path, *phases: str) -> tuple[int, list[str]]:
    """Exit code and lines printed; the last one is also what summary.txt holds."""
    command = [sys.executable, SCRIPT, folder, "100", *phases]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert (folder / "summary.txt").read_text() == lines[-1] + "\n"
    return done.returncode, lines


def test_a_good_run(tmp_path):
    (tmp_path / "C++ tests.xml").write_text(GOOD)
    code, lines = sum_up(tmp_path, "build:0:60", "C++ tests:0:30")
    assert code == 0
    assert [line.split() for line in lines[1:]] == [
        ["phase", "passed", "failed", "skipped", "seconds"],
        ["build", "ok", "-", "-", "-", "60"],
        ["C++", "tests", "ok", "2", "0", "0", "30"],
        ["all", "together", "2", "0", "0", "100"],
        ["2", "passed,", "0", "failed,", "0", "skipped"],
    ]


def test_failed_tests_of_both_runners_are_named(tmp_path):
    (tmp_path / "C++ tests.xml").write_text(CTEST)
    (tmp_path / "Python tests.xml").write_text(PYTEST)
    code, lines = sum_up(tmp_path, "C++ tests:8:30", "Python tests:1:40")
    assert code == 1
    assert lines[-4:] == [
        "  FAILED C++ tests: core.Two.core.Two",
        "  FAILED Python tests: tests.test_a.test_two",
        "  FAILED Python tests: tests.test_a.test_three",
        "2 passed, 3 failed, 3 skipped",
    ]


@pytest.mark.parametrize("written", [None, GOOD], ids=["no file", "all passed"])
def test_a_phase_that_ends_badly_is_a_failure_whatever_its_file_says(tmp_path, written):
    (tmp_path / "style.xml").write_text(GOOD)
    if written:
        (tmp_path / "C++ tests.xml").write_text(written)
    code, lines = sum_up(tmp_path, "style:0:1", "C++ tests:134:30")
    assert code == 1
    assert lines[-2:] == [
        "  FAILED C++ tests: ended with exit code 134",
        f"{4 if written == GOOD else 2} passed, 1 failed, 0 skipped",
    ]


@pytest.mark.parametrize("exit_code", ["0", "134"])
def test_a_file_that_breaks_off_is_a_failure(tmp_path, exit_code):
    (tmp_path / "style.xml").write_text(GOOD)
    (tmp_path / "C++ tests.xml").write_text("<testsuite><testc")
    code, lines = sum_up(tmp_path, "style:0:1", f"C++ tests:{exit_code}:30")
    assert code == 1
    assert lines[-2:] == ["  FAILED C++ tests: C++ tests.xml cannot be read", "2 passed, 1 failed, 0 skipped"]


def test_an_exit_code_of_0_hides_no_failed_test(tmp_path):
    (tmp_path / "style.xml").write_text(GOOD)
    (tmp_path / "C++ tests.xml").write_text(CTEST)
    code, lines = sum_up(tmp_path, "style:0:1", "C++ tests:0:30")
    assert code == 1
    assert "1 failed" in lines[-1]
    assert any(line.split()[:3] == ["C++", "tests", "FAILED"] for line in lines)


def test_what_was_left_out_is_shown_and_is_no_second_failure(tmp_path):
    (tmp_path / "style.xml").write_text(GOOD)
    code, lines = sum_up(tmp_path, "style:0:1", "build:1:5", "C++ tests:not run:0")
    assert code == 1
    assert any("C++ tests" in line and "not run" in line for line in lines)
    assert lines[-2:] == ["  FAILED build: ended with exit code 1", "2 passed, 1 failed, 0 skipped"]


def test_nothing_passed_is_no_success(tmp_path):
    assert sum_up(tmp_path, "build:0:60")[0] == 1
