"""Wraps Markdown prose that is wider than a number of columns. Code, tables and headings stay as they are.

From the first line of a paragraph that is too long, the rest of the paragraph is filled anew; a paragraph whose lines
all fit is left alone, so that a change stays where it was made.
"""

import re
import textwrap

MARKER = re.compile(r"( *)([-*+]|\d+[.)])( +)(?=\S)")
#: What would begin a list, a heading, a quotation, a table or an underline if a line began with it.
BEGINS_A_BLOCK = re.compile(r" (?=(?:[-*+]|\d+[.)]|#{1,6}|=+|-+)(?: |$)|[>|]|```|~~~)")
GLUE = "\0"


def is_prose(line: str) -> bool:
    return bool(line.strip()) and not re.match(r" *(\||#{1,6} |<!--|```|~~~|>)", line)


def fill(lines: list[str], first_indent: str, indent: str, columns: int) -> list[str]:
    text = " ".join(line.strip() for line in lines)
    text = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", GLUE), text)
    text = BEGINS_A_BLOCK.sub(GLUE, text)
    options = {"break_long_words": False, "break_on_hyphens": False}
    wrapped = textwrap.wrap(text, columns, initial_indent=first_indent, subsequent_indent=indent, **options)
    return [line.replace(GLUE, " ") for line in wrapped]


def wrap_paragraph(paragraph: list[str], columns: int) -> list[str]:
    marker = MARKER.match(paragraph[0])
    indent = " " * (len(marker[0]) if marker else len(paragraph[0]) - len(paragraph[0].lstrip()))
    long = next((i for i, line in enumerate(paragraph) if len(line) > columns), None)
    if long is None or any(line.endswith(("  ", "\\")) for line in paragraph[:-1]):  # hard breaks keep their lines
        return paragraph
    rest = paragraph[long:]
    first_indent = indent
    if long == 0 and marker:
        first_indent, rest = marker[0], [rest[0][len(marker[0]) :], *rest[1:]]
    return paragraph[:long] + fill(rest, first_indent, indent, columns)


def wrap(text: str, columns: int) -> str:
    out: list[str] = []
    paragraph: list[str] = []
    fence = ""
    depth = 0  # columns of indentation of the list item that blank lines do not end

    def flush() -> None:
        if paragraph:
            out.extend(wrap_paragraph(paragraph, columns))
            paragraph.clear()

    for line in text.split("\n"):
        opening = re.match(r" *(```+|~~~+)", line)
        if fence:
            out.append(line)
            if opening and opening[1].startswith(fence):
                fence = ""
            continue
        marker = MARKER.match(line)
        indentation = len(line) - len(line.lstrip())
        if opening:
            flush()
            fence = opening[1]
        if not is_prose(line) or (not paragraph and not marker and indentation >= depth + 4):
            flush()
            out.append(line)
            continue
        if marker:
            flush()
            depth = len(marker[0])
        elif not paragraph and indentation < depth:
            depth = 0
        paragraph.append(line)
    flush()
    return "\n".join(out)


def too_long(text: str, columns: int) -> list[int]:
    """Numbers of the lines that are wider, but for tables and lines of one word (an address)."""
    lines = enumerate(text.split("\n"), 1)
    return [n for n, line in lines if len(line) > columns and line[0] != "|" and " " in line.strip()]
