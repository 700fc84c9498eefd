"""The documentation pages, and what a test reads out of them: links, commands, code spans."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
LOG = ROOT / "docs" / "LOG.md"  # a record of the past: its commands and paths may be gone
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")


def name_of(page: Path) -> str:
    """The page's path inside the repository."""
    return page.relative_to(ROOT).as_posix()


def links(text: str) -> Iterator[tuple[str, str, str]]:
    """(text, path, anchor) of every relative link; code blocks hold none."""
    for words, target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield words, path, anchor


def commands(page: Path) -> list[str]:
    """The commands in a page's `sh` blocks, one per line, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def code_spans(page: Path) -> list[str]:
    """The inline code of a page, each span on one line; code blocks left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
