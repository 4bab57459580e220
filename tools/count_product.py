"""Counts what the table in docs/architecture.md ("Before and after the store") compares, of any commit.

usage: count_product.py [COMMIT ...]      (default: HEAD)

Product files are the sources below include, src, libtorch and python; a class is Python's. A file names an optimizer
where "lion" occurs in it, in any case, but as the end of a number: of all names it means nothing else.
"""

import ast
import re
import subprocess
import sys

FOLDERS = ("include/", "src/", "libtorch/", "python/")
LION = re.compile(r"(?<!mil)(?<!bil)lion", re.IGNORECASE)
SOURCES = (".h", ".cpp", ".cu", ".cuh", ".py")


def git(*arguments):
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def count(commit):
    names = [n for n in git("ls-tree", "-r", "--name-only", commit).splitlines() if n.startswith(FOLDERS)]
    texts = {name: git("show", f"{commit}:{name}") for name in names if name.endswith(SOURCES)}
    lines = {name: text.count("\n") for name, text in texts.items()}
    classes = [
        (node.end_lineno - node.lineno + 1, node.name)
        for name, text in texts.items()
        if name.endswith(".py")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef)
    ]
    longest, largest = max(lines, key=lines.get), max(classes)
    return {
        "product files": len(texts),
        "lines": sum(lines.values()),
        "longest file": f"{longest}, {lines[longest]}",
        "longest class of Python's": f"{largest[1]}, {largest[0]}",
        "files that name Lion": sum(LION.search(text) is not None for text in texts.values()),
        "lines over 120 columns": sum(len(line) > 120 for text in texts.values() for line in text.splitlines()),
    }


def main():
    commits = sys.argv[1:] or ["HEAD"]
    counts = [count(commit) for commit in commits]
    print("| |", " | ".join(commits), "|")
    print("|---|" + "--:|" * len(commits))
    for what in counts[0]:
        print(f"| {what} |", " | ".join(str(one[what]) for one in counts), "|")


if __name__ == "__main__":
    main()
