"""Links, names, code and figures in README.md and docs/ hold."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from docs.pictures import LAYERS, relative_error
from qlora.model.weights import read_weights
from tests.docs.pages import LOG, PAGES, README, ROOT, code_spans, commands, links, name_of

BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
FILE = re.compile(r"\.(py|c|md|json|yaml|html|sbatch)$")
MAX_PICTURE = 150 * 1024
MAX_LINES = 250


def heading_anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def defined_names(file: Path) -> set[str]:
    """The functions, classes and variables of a Python file; members as Class.member."""
    names: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    names.update(prefix + part.id for part in ast.walk(target) if isinstance(part, ast.Name))

    collect(ast.parse(file.read_text()).body, "")
    return names


def problems_of(page: Path, text: str) -> list[str]:
    """What is wrong with a page's links, one line each."""
    problems = []
    for words, path, anchor in links(text):
        target = (page.parent / path).resolve() if path else page
        name = NAME.fullmatch(words)
        if not target.is_relative_to(ROOT) or not target.exists():
            problems.append(f"{path}: no such file")
        elif re.match(r"L\d", anchor):
            problems.append(f"{path}#{anchor}: links to a line; link to the file, and put the name in the text")
        elif anchor and anchor not in map(
            heading_anchor, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        ):
            problems.append(f"{path}#{anchor}: no such heading")
        elif target.suffix == ".py" and name and not FILE.search(name[1]) and name[1] not in defined_names(target):
            problems.append(f"{path} does not define {name[1]}")
    return problems


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings exist, and a link from a name leads to the file that defines it."""
    assert problems_of(page, page.read_text()) == []


def test_many_names_are_linked() -> None:
    """At least these, so that the test above does not pass on nothing."""
    for page, least in ((ROOT / "docs" / "qlora.md", 10), (ROOT / "docs" / "architecture.md", 15)):
        linked = [words for words, path, _ in links(page.read_text()) if path.endswith(".py")]
        assert len([words for words in linked if NAME.match(words)]) >= least


def test_bad_links_are_found() -> None:
    page = ROOT / "docs" / "page.md"
    here = "../tests/docs/test_docs.py"
    good = f"[`problems_of`]({here}) [`MAX_LINES`]({here}) [`tests/docs/test_docs.py`]({here}) [any words]({here})"
    assert problems_of(page, f"{good} [x](https://example.org) [y](../README.md#pages)") == []
    assert problems_of(page, f"[`nothing`]({here})") == [f"{here} does not define nothing"]
    assert problems_of(page, f"[`links`]({here})") == [f"{here} does not define links"], "imported, not defined"
    assert problems_of(page, f"[`problems_of`]({here}#L40)") == [
        f"{here}#L40: links to a line; link to the file, and put the name in the text"
    ]
    assert len(problems_of(page, "[a](../none.py) [b](../README.md#none) [c](../../outside)")) == 3


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= MAX_LINES


def test_every_page_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / path).resolve() for _, path, _ in links(README.read_text())}
    assert [name_of(page) for page in PAGES if page != README and page not in linked] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=name_of)
def test_files_and_programs_of_a_page_exist(page: Path) -> None:
    """Test files, programs started with -m, and scripts that commands and code spans name."""
    for code in (*commands(page), *code_spans(page)):
        for path in re.findall(r"(?<![\w/])(?:tests|examples|configs)/[\w./-]+", code):
            assert "<" in code or (ROOT / path).exists(), code
        for program in re.findall(r"python -m ((?:benchmarks|tools|docs|tests)[\w.]*)", code):
            assert (ROOT / program.replace(".", "/")).with_suffix(".py").exists(), code


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
    shown = {(page.parent / path).resolve() for page in PAGES for _, path, _ in links(page.read_text())}
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.stat().st_size < MAX_PICTURE
        assert picture in shown, f"no page shows {picture.name}"
