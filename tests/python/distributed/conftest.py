"""Ends the processes of the session, and says how much they compared."""

import multiprocessing
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes


def pytest_terminal_summary(terminalreporter):
    cases = processes.counts.cases
    if cases:
        terminalreporter.write_line(
            f"distributed, {processes.device_type()}: {len(cases)} cases, {sum(cases.values())} arrays compared by "
            "memcmp with those of one process, each rank's counted once"
        )


@pytest.fixture(scope="session", autouse=True)
def _processes_end():
    yield
    processes.end_all()
    multiprocessing.active_children()
