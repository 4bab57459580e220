"""Adds up the JUnit files of a test run and prints the summary: a row a phase, then what failed.

usage: sum_up_tests.py RESULTS_DIR SECONDS PHASE:EXIT_CODE:SECONDS...        (RESULTS_DIR/PHASE.xml, where there is one)

EXIT_CODE is "not run" for a phase that was left out because another failed. The last line is
`N passed, N failed, N skipped`. A phase that ended badly without a failed test to show for it (a build error, a crash,
a time-out, a file that breaks off) counts as one failed test. The line is kept in RESULTS_DIR/summary.txt; the exit
code is 0 only where nothing failed and something passed.
"""

import sys
import xml.etree.ElementTree
from pathlib import Path

NOT_RUN = "not run"


def count(path: Path) -> tuple[int, list[str], int]:
    """(passed, names of failed, skipped) of one file written by CTest or pytest."""
    passed, failed, skipped = 0, [], 0
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None or case.get("status") == "fail":
            failed.append(f"{path.stem}: {case.get('classname', '')}.{case.get('name')}")
        elif case.find("skipped") is not None or case.get("status") in ("notrun", "disabled"):
            skipped += 1
        else:
            passed += 1
    return passed, failed, skipped


def main() -> int:
    results, seconds = Path(sys.argv[1]), int(sys.argv[2])
    phases = [phase.rsplit(":", 2) for phase in sys.argv[3:]]
    passed, failed, skipped = 0, [], 0
    rows = [("phase", "", "passed", "failed", "skipped", "seconds")]
    for name, code, phase_seconds in phases:
        path = results / f"{name}.xml"
        try:
            counts = count(path) if path.exists() else (0, [], 0)
        except xml.etree.ElementTree.ParseError:
            counts = (0, [f"{name}: {path.name} cannot be read"], 0)
        if code not in ("0", NOT_RUN) and not counts[1]:
            counts[1].append(f"{name}: ended with exit code {code}")
        result = NOT_RUN if code == NOT_RUN else "FAILED" if code != "0" or counts[1] else "ok"
        tests = (counts[0], len(counts[1]), counts[2])
        rows.append((name, result, *("-" if not path.exists() and not n else str(n) for n in tests), phase_seconds))
        passed, failed, skipped = passed + counts[0], failed + counts[1], skipped + counts[2]
    rows.append(("all together", "", str(passed), str(len(failed)), str(skipped), str(seconds)))

    print()
    for name, result, *numbers in rows:
        print(f"  {name:32} {result:8}" + "".join(f"{number:>9}" for number in numbers))
    for name in failed:
        print(f"  FAILED {name}")
    line = f"{passed} passed, {len(failed)} failed, {skipped} skipped"
    (results / "summary.txt").write_text(line + "\n")
    print(line)
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
