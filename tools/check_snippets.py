"""Checks the documentation against the tree: code blocks that name a file are that file's lines, links lead somewhere.

A block is checked where the line before its fence is `<!-- snippet: path -->`: its lines must stand in that file, in
one piece, up to indentation. usage: check_snippets.py REPOSITORY
"""

import re
import sys
import textwrap
from pathlib import Path


def indentation_free(text: str) -> list[str]:
    return textwrap.dedent(text).strip("\n").splitlines()


def contains(lines: list[str], block: list[str]) -> bool:
    """Whether `block` is a run of `lines`, with any one indentation taken off."""
    for start in range(len(lines) - len(block) + 1):
        if indentation_free("\n".join(lines[start : start + len(block)])) == block:
            return True
    return False


def problems(root: Path, document: Path) -> list[str]:
    text = document.read_text()
    name = document.relative_to(root)
    found = []
    for path, block in re.findall(r"<!-- snippet: (\S+) -->\n```\w*\n(.*?)```", text, re.DOTALL):
        if not (root / path).is_file():
            found.append(f"{name}: snippet of {path}, which does not exist")
        elif not contains((root / path).read_text().splitlines(), indentation_free(block)):
            found.append(f"{name}: the snippet is not what stands in {path}")
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" not in link and not (document.parent / link).exists():
            found.append(f"{name}: link to {link}, which does not exist")
    return found


def main() -> int:
    root = Path(sys.argv[1]).resolve()
    documents = [*root.glob("*.md"), *root.glob("docs/*.md")]
    found = [problem for document in sorted(documents) for problem in problems(root, document)]
    print("\n".join(found) or f"{len(documents)} documents agree with the tree")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
