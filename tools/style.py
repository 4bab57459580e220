"""Checks or mends how sources are written: clang-format, ruff format, ruff, mypy, lines of at most 120 columns, and
how long files and classes are, what they are called and import (structure.py).

usage: style.py [--mend] [--junit FILE] [ROOT]

Every finding names the file and the command that mends it. --mend (`make format`) formats C++, CUDA and Python, sorts
imports and wraps Markdown, and checks nothing. The tools are those beside the Python that runs this; tools/setup.sh
installs them in the versions that decide.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structure
import wrap_markdown

COLUMNS = 120
CPP = (".h", ".cpp", ".cu", ".cuh")
#: What ruff passes over: lines of Python that end in a word for a tool.
PRAGMA = re.compile(r"#\s*(type: ignore|noqa)")
#: Others whose width counts; that of Python's other lines is ruff's to check.
WIDE = (*CPP, ".sh", ".cmake", ".md", ".in", ".toml", ".yml", ".yaml", "CMakeLists.txt", "Makefile", ".ci/run")
RUFF = r"(?P<file>[^:]+):(?P<message>\d+:\d+: .*)"
#: Written by programs: tables of a measurement.
GENERATED = ("benchmarks/results/",)


@dataclass(frozen=True)
class Finding:
    file: str
    message: str


@dataclass(frozen=True)
class Check:
    name: str
    find: Callable[[], list[Finding]]
    remedy: str

    def mend(self, file: str) -> str:
        return "make format (code blocks by hand)" if self.name == "columns" and file.endswith(".md") else self.remedy


def sources(root: Path) -> list[str]:
    """Files below `root`, relative to it, without what is built, installed or hidden (but .ci)."""
    found = []
    for folder, folders, files in os.walk(root):
        top = Path(folder) == root
        folders[:] = sorted(
            name
            for name in folders
            if (not name.startswith(".") or name == ".ci")
            and name != "__pycache__"
            and not (top and (name.startswith("build") or name in ("dist", "out", "demo_out")))
        )
        found += [(Path(folder) / name).relative_to(root).as_posix() for name in sorted(files)]
    return found


class Sources:
    """The files of one tree, and the tools' answers about them."""

    def __init__(self, root: Path):
        self.root = root
        self.files = files = [name for name in sources(root) if not name.startswith(GENERATED)]
        self.cpp = [name for name in files if name.endswith(CPP)]
        self.python = [name for name in files if name.endswith(".py")]
        self.markdown = [name for name in files if name.endswith(".md")]
        self.wide = [name for name in files if name.endswith(WIDE)]

    def run(self, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / tool
        if not program.exists():
            raise FileNotFoundError(f"no {tool} beside {sys.executable}: tools/setup.sh installs it")
        return subprocess.run([program, *arguments], cwd=self.root, text=True, capture_output=True, check=False)

    def ask(self, pattern: str, tool: str, *arguments: str) -> list[Finding]:
        """What a tool says, by lines that match `pattern` (groups: file, message). It cannot fail unseen."""
        result = self.run(tool, *arguments)
        output = (result.stdout + result.stderr).splitlines()
        found = [Finding(m["file"], m["message"]) for m in (re.match(pattern, line) for line in output) if m]
        if result.returncode != 0 and not found:
            found = [Finding(tool, f"ended with exit code {result.returncode}: {' '.join(output)[-600:]}")]
        return found

    def clang_format(self) -> list[Finding]:
        pattern = r"(?P<file>[^:]+):(?P<message>\d+:\d+: error: .*)"
        cores = os.cpu_count() or 1
        shares = [share for share in (self.cpp[i::cores] for i in range(cores)) if share]
        with ThreadPoolExecutor(cores) as pool:
            answers = pool.map(lambda share: self.ask(pattern, "clang-format", "--dry-run", "-Werror", *share), shares)
        return [finding for answer in answers for finding in answer]

    def ruff_format(self) -> list[Finding]:
        return self.ask(RUFF, "ruff", "format", "--check", "--output-format", "concise", *self.python)

    def ruff(self) -> list[Finding]:
        return self.ask(RUFF, "ruff", "check", "--output-format", "concise", *self.python)

    def mypy(self) -> list[Finding]:
        return self.ask(r"(?P<file>[^:]+):(?P<message>\d+: error: .*)", "mypy", "--no-error-summary")

    def columns(self) -> list[Finding]:
        found = []
        for name in (*self.wide, *self.python):
            text = (self.root / name).read_text()
            if name.endswith(".md"):
                long = wrap_markdown.too_long(text, COLUMNS)
            else:
                lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if len(line) > COLUMNS]
                long = [n for n, line in lines if not name.endswith(".py") or PRAGMA.search(line)]
            found += [Finding(name, f"{n}: more than {COLUMNS} columns") for n in long]
        return found

    def structure(self) -> list[Finding]:
        return [Finding(name, message) for name, message in structure.findings(self.root, self.files)]

    def mend(self) -> int:
        """Formats everything that a machine can; returns the number of files it has not understood."""
        failed = 0
        for tool, arguments in (
            ("clang-format", ["-i", *self.cpp]),
            ("ruff", ["check", "--fix-only", "--quiet", *self.python]),
            ("ruff", ["format", "--quiet", *self.python]),
        ):
            result = self.run(tool, *arguments)
            print(result.stdout + result.stderr, end="")
            failed += result.returncode != 0
        for name in self.markdown:
            before = (self.root / name).read_text()
            after = wrap_markdown.wrap(before, COLUMNS)
            if after != before:
                (self.root / name).write_text(after)
        return failed


def answer(check: Check) -> tuple[Check, list[Finding], float]:
    start = time.monotonic()
    try:
        found = check.find()
    except FileNotFoundError as error:
        found = [Finding(check.name, str(error))]
    return check, found, time.monotonic() - start


def write_junit(path: Path, answers: list[tuple[Check, list[Finding], float]]) -> None:
    """A test a check; where one has findings, a failed test a file."""
    suite = ElementTree.Element("testsuite", name="style")
    for check, found, seconds in answers:
        files = sorted({finding.file for finding in found})
        if not files:
            ElementTree.SubElement(suite, "testcase", classname="style", name=check.name, time=f"{seconds:.1f}")
        for file in files:
            messages = [finding.message for finding in found if finding.file == file]
            name = f"{file} ({len(messages)}): {check.mend(file)}"
            case = ElementTree.SubElement(suite, "testcase", classname=check.name, name=name)
            ElementTree.SubElement(case, "failure").text = "\n".join(messages)
    ElementTree.ElementTree(suite).write(path, encoding="unicode", xml_declaration=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mend", action="store_true", help="format instead of checking")
    parser.add_argument("--junit", type=Path, help="also write the result as JUnit's XML")
    parser.add_argument("root", type=Path, nargs="?", default=Path(__file__).resolve().parent.parent)
    arguments = parser.parse_args()
    tree = Sources(arguments.root.resolve())
    if arguments.mend:
        return 1 if tree.mend() else 0

    checks = [
        Check("clang-format", tree.clang_format, "make format"),
        Check("ruff format", tree.ruff_format, "make format"),
        Check("ruff", tree.ruff, "mend by hand; see .venv/bin/ruff check"),
        Check("mypy", tree.mypy, "mend by hand; see .venv/bin/mypy"),
        Check("columns", tree.columns, "break by hand"),
        Check("structure", tree.structure, "mend by hand; tools/structure.py says what is allowed"),
    ]
    answers = []
    with ThreadPoolExecutor(len(checks)) as pool:
        for check, found, seconds in pool.map(answer, checks):
            print(f"[style] {check.name}: {f'{len(found)} findings' if found else 'ok'}, {seconds:.1f} s", flush=True)
            for finding in found:
                print(f"{finding.file}:{finding.message}   ({check.mend(finding.file)})")
            answers.append((check, found, seconds))
    if arguments.junit:
        write_junit(arguments.junit, answers)
    return 1 if any(found for _, found, _ in answers) else 0


if __name__ == "__main__":
    sys.exit(main())
