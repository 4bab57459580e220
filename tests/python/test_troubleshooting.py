"""What docs/troubleshooting.md quotes is what the sources say."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _sources() -> str:
    """All sources, with string literals that follow one another as one."""
    files = [*ROOT.glob("python/flashoptim_native/**/*.py"), *ROOT.glob("libtorch/**/*.cpp")]
    text = "\n".join(path.read_text() for path in sorted(files))
    return re.sub(r"[\"']\s*\n\s*f?[\"']", "", text)


def _quoted() -> list[str]:
    """First cells of the tables that are headed "message"."""
    messages = []
    for table in re.findall(
        r"^\| message .*\n\|[-|]+\|\n((?:\|.*\n)+)", (ROOT / "docs/troubleshooting.md").read_text(), re.M
    ):
        messages += [re.match(r"\| `([^`]+)` \|", row)[1] for row in table.splitlines()]
    return messages


def test_quoted_messages_exist():
    sources, messages = _sources(), _quoted()
    assert len(messages) >= 15
    assert [message for message in messages if message not in sources] == []
