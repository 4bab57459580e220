"""The attacks use what tests/python has; each says how much it tried, and the table is printed at the end."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

PYTHON_TESTS = Path(__file__).resolve().parents[1] / "python"
sys.path[:0] = [str(Path(__file__).resolve().parent), str(PYTHON_TESTS)]
if "flashoptim_native" not in sys.modules:
    sys.path.insert(0, str(PYTHON_TESTS.parents[1] / "python"))

_tallies = pytest.StashKey()


@pytest.fixture
def tally(request, record_property):
    """Counts of one attack; a test that leaves a finding in it has failed."""
    from attacks import Tally

    one = Tally()
    yield one
    for name, count in one.counts.items():
        record_property(name, count)
    request.config.stash.setdefault(_tallies, []).append((request.node.name, one))
    if request.node.stash.get(_passed, False):
        assert not one.findings, one.report()


_passed = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_passed] = report.passed
    return report


def pytest_terminal_summary(terminalreporter, config):
    tallies = config.stash.get(_tallies, [])
    if not tallies:
        return
    terminalreporter.section("attacks")
    sums, cases = {}, collections.Counter()
    for name, one in tallies:
        attack = name.partition("[")[0]
        sums.setdefault(attack, collections.Counter()).update({**one.counts, "failed": len(one.findings)})
        cases[attack] += 1
    for attack, counts in sums.items():
        ended = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        terminalreporter.write_line(f"{attack}, {cases[attack]} cases: {ended}")
