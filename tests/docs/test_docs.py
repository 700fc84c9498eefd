"""Links and code in README.md and docs/ hold.

`python -m tests.docs.test_docs` moves links to where the lines are.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from docs.pictures import LAYERS, relative_error
from qlora.model.weights import read_weights

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[([^\[\]]*)\]\(([^()\s]+)\)")
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
MAX_PICTURE = 150 * 1024


def links(text: str) -> Iterator[tuple[str, str, str]]:
    """(text, path, anchor) of every relative link; code blocks hold none."""
    for words, target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield words, path, anchor


def heading_anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def definition_of(name: str, file: Path) -> int:
    """Number of the line that defines a name; 0 if none does."""
    pattern = re.compile(rf"\s*(def|class) {re.escape(name)}\b|{re.escape(name)}\b[^=]* = ")
    return next((n for n, line in enumerate(file.read_text().splitlines(), 1) if pattern.match(line)), 0)


def problems_of(page: Path, text: str) -> list[str]:
    """What is wrong with a page's links, one line each."""
    problems = []
    for words, path, anchor in links(text):
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists():
            problems.append(f"{path} is not there")
        elif anchor.startswith("L"):
            lines, number, name = target.read_text().splitlines(), int(anchor[1:]), words.strip("`")
            if number > len(lines) or not re.search(rf"\b{re.escape(name)}\b", lines[number - 1]):
                problems.append(
                    f"{path}#{anchor}: no {name} there; it is defined in line {definition_of(name, target)}"
                )
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            if anchor not in map(heading_anchor, headings):
                problems.append(f"{path}#{anchor}: no such heading")
    return problems


def mended(page: Path, text: str) -> str:
    """The page with every link to a line at the line that defines the name."""

    def move(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#L")
        target = page.parent / path
        if not anchor or not target.is_file():
            return match[0]
        return f"[{match[1]}]({path}#L{definition_of(match[1].strip('`'), target) or anchor})"

    return LINK.sub(move, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings are there, and a link to a line leads to the name it gives."""
    assert problems_of(page, page.read_text()) == [], "python -m tests.docs.test_docs moves links to lines"


def test_there_are_links_to_lines() -> None:
    page = ROOT / "docs" / "qlora.md"
    assert sum(anchor.startswith("L") for _, _, anchor in links(page.read_text())) > 10


def test_bad_links_are_found_and_mended(tmp_path: Path) -> None:
    page = ROOT / "docs" / "page.md"
    at = definition_of("inject_lora", ROOT / "qlora" / "injection.py")
    good = f"[`inject_lora`](../qlora/injection.py#L{at})"
    assert at > 0 and problems_of(page, good) == []
    bad = good.replace(f"#L{at}", "#L1")
    assert problems_of(page, bad) == [
        f"../qlora/injection.py#L1: no inject_lora there; it is defined in line {at}"
    ]
    assert mended(page, bad) == good
    wrong = f"[a](../none.py) [b](../README.md#none) [c](../../outside) {good.replace(str(at), '99999')}"
    assert len(problems_of(page, wrong)) == 4
    assert problems_of(page, "[x](https://example.org) [y](../README.md#file-tree)") == []


def test_the_page_s_code_prints_what_it_says() -> None:
    """All blocks in one namespace, as a reader types them."""
    blocks = BLOCK.findall((ROOT / "docs" / "qlora.md").read_text())
    assert len(blocks) >= 4 and all(expected for _, expected in blocks)
    names: dict[str, object] = {}
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/qlora.md", "exec"), names)
        assert printed.getvalue().rstrip() == expected.rstrip()


def test_the_quantization_errors_are_those_of_the_page(smollm2: str) -> None:
    """Of 4-bit levels on normal numbers and on the real model, in blocks of 64."""
    normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    weights = [weight for _, weight in read_weights(smollm2, LAYERS)]
    found = {}
    for kind in ("nf4", "fp4", "int4"):
        real = sum(relative_error(weight, kind, 64) for weight in weights) / len(weights)
        found[kind] = f"{relative_error(normal, kind, 64):.3f}", f"{real:.3f}"
    words = "0.092 on normal numbers and 0.096 on SmolLM2-135M; for FP4 0.122 and 0.130, for int4 0.108 and 0.119"
    assert found == {"nf4": ("0.092", "0.096"), "fp4": ("0.122", "0.130"), "int4": ("0.108", "0.119")}
    assert words in " ".join((ROOT / "docs" / "qlora.md").read_text().split())


def test_pictures_are_small_and_shown() -> None:
    shown = {path for page in PAGES for _, path, _ in links(page.read_text())}
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < MAX_PICTURE
        assert {picture.name, f"docs/{picture.name}"} & shown, f"no page shows {picture.name}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(mended(page, page.read_text()))
