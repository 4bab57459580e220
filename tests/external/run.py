"""Runs other people's tests of optimizers over ours.

    python tests/external/run.py SUITE FOLDER [--python PYTHON] [--table FILE] [-- PYTEST ARGUMENTS]
    python tests/external/run.py --list

SUITE is a section of expected.toml, which says where FOLDER is to be had (`--list`); none of it is in this repository.
PYTHON is one with torch, pytest and what the suite imports; ours is put on its path. Tests that are expected to fail
are pinned there, each with its reason: 0 failures beside them, and none of them passing, is a pass. `--table` replaces
the suite's row in the table of docs/compatibility.md (or FILE).
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import tomllib

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD = "| suite | what | collected | passed | failed | expected to fail, or skipped there |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--table", nargs="?", const=ROOT / "docs" / "compatibility.md", type=Path)
    parser.add_argument("--what", default="", help="for the row: the setting, when it is not the default")
    parser.add_argument("--list", action="store_true")
    arguments, more = parser.parse_known_args()
    suites = tomllib.loads((HERE / "expected.toml").read_text())
    if arguments.list:
        for name, suite in suites.items():
            print(f"{name}: {suite['source']}; {', '.join(suite['files'])}")
        return 0
    if arguments.suite not in suites or arguments.folder is None:
        parser.error(f"SUITE is one of {', '.join(suites)}, and FOLDER where its files lie")
    suite = suites[arguments.suite]
    missing = [name for name in suite["files"] if not (arguments.folder / name).is_file()]
    if missing:
        parser.error(f"{arguments.folder} lacks {', '.join(missing)}; get it from {suite['source']}")
    counts = run(
        arguments.suite, suite, arguments.folder.resolve(), arguments.python, [one for one in more if one != "--"]
    )
    what = f"{suite['source']}{'; ' + arguments.what if arguments.what else ''}"
    row = f"| {arguments.suite} | {what} | " + " | ".join(f"{counts[name]:,}" for name in COUNTS) + " |"
    print(row)
    if arguments.table is not None:
        replace_row(arguments.table, arguments.suite, arguments.what, row)
    return 1 if counts["failed"] or counts["passed"] == 0 else 0


COUNTS = ("collected", "passed", "failed", "skipped")


def run(name, suite, folder, python, more):
    """Counts of the suite's tests, by JUnit's file of them."""
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "FLASHOPTIM_SUITE": name, **suite.get("environment", {})}
    paths = [str(HERE), str(ROOT / "python"), str(folder), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as results:
        junit = Path(results) / "junit.xml"
        command = [python, "-m", "pytest", "-p", "plugin", f"--junit-xml={junit}", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run([*command, *more, *suite["files"]], cwd=folder, env=environment)
        if not junit.is_file():
            sys.exit(f"{name}: pytest ended with {done.returncode} and no results")
        cases = list(ElementTree.parse(junit).iter("testcase"))
    failed = sum(any(one.find(kind) is not None for kind in ("failure", "error")) for one in cases)
    skipped = sum(one.find("skipped") is not None for one in cases)
    return {"collected": len(cases), "passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}


def replace_row(path, name, what, row):
    """Puts a row in the table of suites, in the place of that of the same suite and setting."""
    lines = path.read_text().splitlines()
    start = lines.index(HEAD) + 2
    end = next(
        index for index in range(start, len(lines) + 1) if index == len(lines) or not lines[index].startswith("|")
    )
    rows = [one for one in lines[start:end] if not is_row_of(one, name, what)]
    path.write_text("\n".join([*lines[:start], *sorted([*rows, row]), *lines[end:]]) + "\n")


def is_row_of(line, name, what):
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    return cells[0] == name and (cells[1].endswith(f"; {what}") if what else cells[1].count("; setting ") == 0)


if __name__ == "__main__":
    sys.exit(main())
