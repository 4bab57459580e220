"""tools/style.py and tools/wrap_markdown.py: what they find, what they mend, what they name."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "style.py"
BESIDE = Path(sys.executable).parent
MISSING = [tool for tool in ("clang-format", "ruff", "mypy") if not (BESIDE / tool).exists()]
needs_tools = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not in {BESIDE}; tools/setup.sh installs them")

PACKAGE = "python/flashoptim_native/__init__.py"
GOOD = {
    PACKAGE: "one: int = 1\n",
    "src/good.cpp": "int one() { return 1; }\n",
    "docs/good.md": "# Title\n\nSome prose.\n",
    "build/dev/bad.cpp": "int  one( ){return 1;}\n",  # built: nobody's business
    "benchmarks/results/table.md": "word " * 30,  # written by a program
}


def wrap_markdown():
    spec = importlib.util.spec_from_file_location("wrap_markdown", ROOT / "tools" / "wrap_markdown.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tree(folder: Path, **files: str) -> Path:
    """A small repository with this one's settings, good but for the files named."""
    for name in (".clang-format", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    for name, text in {**GOOD, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def style(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *options, folder]
    return subprocess.run(command, text=True, capture_output=True, check=False)


@needs_tools
def test_a_good_tree_has_one_passed_test_a_check(tmp_path):
    result = style(tree(tmp_path), "--junit", str(tmp_path / "style.xml"))
    assert (result.returncode, result.stderr) == (0, "")
    cases = list(ElementTree.parse(tmp_path / "style.xml").iter("testcase"))
    assert [case.get("name") for case in cases] == [
        "clang-format",
        "ruff format",
        "ruff",
        "mypy",
        "columns",
        "structure",
    ]
    assert not any(case.find("failure") is not None for case in cases)


@needs_tools
@pytest.mark.parametrize(
    ("file", "text", "check", "mend"),
    [
        ("src/bad.cu", "int  one( ){return 1;}\n", "clang-format", "make format"),
        ("tools/bad.py", "one = (1,2)\n", "ruff format", "make format"),
        ("tools/bad.py", "import os\n", "ruff", "by hand"),
        ("tools/bad.py", f"# {'x' * 119}\n", "ruff", "by hand"),  # 121 columns
        ("tools/bad.py", f'one = "{"x" * 90}"  # type: ignore[assignment]\n', "columns", "by hand"),
        (PACKAGE, "def one(a):\n    return a\n", "mypy", "by hand"),
        ("docs/bad.md", "word " * 30 + "\n", "columns", "make format"),
        ("tools/bad.sh", f"echo {'x' * 116}\n", "columns", "by hand"),
        (".ci/run", f"echo {'x' * 116}\n", "columns", "by hand"),
        ("src/CMakeLists.txt", f"# {'x' * 119}\n", "columns", "by hand"),
        ("tests/long.sh", "true\n" * 601, "structure", "by hand"),
        ("src/long.h", "struct Long {\n" + "  int one();\n" * 299 + "};\n", "structure", "by hand"),
        ("python/flashoptim_native/long.py", "class Long:\n" + "    one = 1\n" * 300, "structure", "by hand"),
        ("src/two.h", "struct One {};\nstruct One {};\n", "structure", "by hand"),
    ],
)
def test_a_finding_names_the_file_and_what_mends_it(tmp_path, file, text, check, mend):
    result = style(tree(tmp_path, **{file: text}), "--junit", str(tmp_path / "style.xml"))
    assert result.returncode == 1
    assert any(line.startswith(f"{file}:") and mend in line for line in result.stdout.splitlines())
    failed = [c for c in ElementTree.parse(tmp_path / "style.xml").iter("testcase") if c.find("failure") is not None]
    assert [case.get("classname") for case in failed] == [check]
    assert failed[0].get("name").startswith(f"{file} (")
    assert mend in failed[0].get("name")


def test_modules_that_import_each_other_at_import_are_found(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import structure
    finally:
        sys.path.pop(0)
    package = "python/flashoptim_native"
    files = {
        f"{package}/__init__.py": "from .a import one\n",
        f"{package}/a.py": "from . import b\none = 1\n",
        f"{package}/b.py": "from .inner.c import two\n",
        f"{package}/inner/__init__.py": "",
        f"{package}/inner/c.py": "def later():\n    from .. import a\n    return a\n\n\ntwo = 2\n",
    }
    tree(tmp_path, **files)
    assert structure.findings(tmp_path, list(files)) == []
    for text in ("from .. import a\n", "if True:\n    from ..a import one\n", "import flashoptim_native.a\n"):
        (tmp_path / package / "inner/c.py").write_text(text)
        [(file, message)] = structure.findings(tmp_path, list(files))
        assert file == f"{package}/a.py"
        assert message.endswith(" -> ".join(f"flashoptim_native.{name}" for name in ("a", "b", "inner.c", "a")))


@needs_tools
def test_a_tool_that_cannot_work_is_a_finding(tmp_path):
    folder = tree(tmp_path)
    (folder / "pyproject.toml").write_text("[tool.ruff]\nline-length = true\n[tool.mypy]\nfiles = ['absent']\n")
    result = style(folder)
    assert result.returncode == 1
    for name in ("ruff format", "ruff", "mypy"):
        assert f"[style] {name}: 1 findings" in result.stdout


@needs_tools
def test_mend_formats_all_languages(tmp_path):
    bad = {
        "src/bad.cu": "int  one( ){return 1;}\n",
        "tools/bad.py": "import sys\nimport os\nprint(os.name,sys.path)\n",
        "docs/bad.md": "word " * 30 + "\n",
    }
    folder = tree(tmp_path, **bad)
    assert style(folder, "--mend").returncode == 0
    assert (folder / "tools/bad.py").read_text() == "import os\nimport sys\n\nprint(os.name, sys.path)\n"
    assert style(folder).returncode == 0
    assert (folder / "build/dev/bad.cpp").read_text() == GOOD["build/dev/bad.cpp"]
    assert (folder / "benchmarks/results/table.md").read_text() == GOOD["benchmarks/results/table.md"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one two three four five", "one two three\nfour five"),
        ("short\none two three four five\nsix", "short\none two three\nfour five six"),
        ("a\nb\nc", "a\nb\nc"),
        ("- one two three four five", "- one two\n  three four\n  five"),
        ("1. one two three four", "1. one two\n   three four"),
        ("  - one two three", "  - one two\n    three"),
        ("one two thre - four", "one two\nthre - four"),
        ("one two thre 4. five", "one two\nthre 4. five"),
        ("one two `a b c d` three", "one two\n`a b c d`\nthree"),
        ("| one | two | three |", "| one | two | three |"),
        ("# one two three four", "# one two three four"),
        ("```\none two three four\n```", "```\none two three four\n```"),
        ("text\n\n    one two three four", "text\n\n    one two three four"),
        ("- a\n\n  one two three four", "- a\n\n  one two\n  three four"),
        ("- a\n\n      one two three four", "- a\n\n      one two three four"),
        ("one two three  \nfour five six seven", "one two three  \nfour five six seven"),
    ],
)
def test_markdown_is_wrapped_where_it_is_prose(before, after):
    wrap = wrap_markdown().wrap
    assert wrap(before, 13) == after
    assert wrap(after, 13) == after


def test_tables_and_addresses_may_be_wide():
    text = "| " + "x " * 10 + "|\nhttps://example.org/long\none two three four\n"
    assert wrap_markdown().too_long(text, 13) == [3]
