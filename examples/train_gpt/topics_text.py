#!/usr/bin/env python3
"""Writes the text of Python's language topics (pydoc_data.topics) into a file: real prose that every machine has.

Topics repeat each other's paragraphs. Each is written once: otherwise the held-out end of the text would hold
much that the training part has shown already.
"""

import sys
from pathlib import Path
from pydoc_data import topics

MIN_REPEAT = 80  # characters; shorter paragraphs (headings, one-line examples) may repeat


def joined_topics() -> str:
    seen = set()
    texts = []
    for name in sorted(topics.topics):
        paragraphs = []
        for paragraph in topics.topics[name].split("\n\n"):
            key = paragraph.strip()
            if len(key) >= MIN_REPEAT and key in seen:
                continue
            seen.add(key)
            paragraphs.append(paragraph)
        texts.append("\n\n".join(paragraphs))
    return "\n\n".join(texts)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: topics_text.py FILE")
    Path(sys.argv[1]).write_text(joined_topics(), encoding="utf-8")
