"""Hook of mkdocs (mkdocs.yml): the README is the site's start page, and links out of docs/ lead to the sources.

In the repository, pages link to files beside docs/ (`../examples/...`), which the site does not have. Such a link
becomes one into the repository on the web, where REPOSITORY_URL names it, and else the path as code. Links between
pages stay, for mkdocs to check.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README as the start page."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: object, config: MkDocsConfig, files: Files) -> str:
    """Rewrites links that leave docs/."""
    source = getattr(page, "file").src_uri  # noqa: B009
    folder = ROOT if source == "index.md" else (ROOT / "docs" / source).parent
    address = os.environ.get("REPOSITORY_URL", "").rstrip("/")

    def rewritten(found: re.Match[str]) -> str:
        picture, text, target, anchor = found.groups()
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (folder / target).resolve()
        if not path.exists():
            return found[0]  # mkdocs says so
        if path.is_relative_to(ROOT / "docs"):
            inside = os.path.relpath(path, (ROOT / "docs" / source).parent)
            return f"{picture}[{text}]({inside}{anchor or ''})"
        where = path.relative_to(ROOT)
        if path == ROOT / "README.md":
            return f"[{text}]({os.path.relpath('index.md', Path(source).parent)}{anchor or ''})"
        if address:
            return f"[{text}]({address}/{where})"
        return f"`{where}`" if str(where) in text or text.strip("`") == target else f"{text} (`{where}`)"

    parts = re.split(r"(```.*?```)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(rewritten, part) for part in parts)
