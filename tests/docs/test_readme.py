"""What the README and the pages say of rooms, data shapes and names is so."""

from __future__ import annotations

import json
import re

import pytest

import qlora
from qlora.data.conversations import to_messages
from qlora.data.rows import Record
from tests.docs.pages import README, ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()
TREE = README.read_text().partition("## Finding your way")[2].partition("\n## ")[0]


def test_the_tree_names_every_room_at_its_level() -> None:
    rooms = {
        path.stem
        for path in (ROOT / "qlora").iterdir()
        if (path.is_dir() and (path / "__init__.py").exists())
        or (path.suffix == ".py" and not path.stem.startswith("__"))
    }
    named = {name: int(level) for name, level in re.findall(r"^ {6}(\w+)(?:/|\.py) +(\d) ", TREE, re.MULTILINE)}
    assert named.keys() == rooms and len(rooms) == 17
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    layers = [re.findall(r"\w+", line) for line in contract.splitlines() if '"' in line]
    assert {name: level for level, names in enumerate(reversed(layers)) for name in names} == named


def test_the_contract_on_the_page_is_the_one_that_is_checked() -> None:
    block = ARCHITECTURE.partition("## The contract")[2].partition("Four rules")[0]
    shown = [re.findall(r"\w+", line) for line in block.splitlines() if line.startswith("    ")]
    contract = (ROOT / "pyproject.toml").read_text().partition("layers = [")[2].partition("]")[0]
    layers = [re.findall(r"\w+", line) for line in contract.splitlines() if '"' in line]
    assert [sorted(line) for line in shown] == [sorted(line) for line in layers]


def test_the_architecture_names_every_file() -> None:
    """Room by room, and no file that does not exist."""
    listing = ARCHITECTURE.partition("## Every file")[2].partition("\n## ")[0]
    named = set()
    part = re.compile(r"^\*\*([\w.]+)\*\*(, level \d)?:?(.*?)(?=^\*\*|\Z)", re.MULTILINE | re.DOTALL)
    for room, level, text in part.findall(listing):
        folder = "qlora/" if level else ""
        if room.endswith(".py"):
            named.add(folder + room)
        for line in re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE):
            names = re.findall(r"[\w/]+\.(?:py|c|h|html)(?=[,\s]|$)", line)
            named.update(f"{folder}{room}/{name}" for name in names)
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("qlora", "eval")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".c", ".h", ".html") and path.name != "__init__.py"
    }
    assert sorted(named - found) == [] and sorted(found - named) == ["qlora/__main__.py"]


def test_what_the_tree_names_exists() -> None:
    for name in ("eval/", "examples/", "configs/", "tests/", "tools/", "benchmarks/", "train.py"):
        assert name in TREE and (ROOT / name).exists()
    for path in re.findall(r"^\d\. (.*?):", TREE, re.MULTILINE):
        for part in re.findall(r"`([^`]+)`", path):
            assert (ROOT / "qlora" / part).exists(), part


def test_every_data_shape_reads_as_shown() -> None:
    examples = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", DATA, flags=re.MULTILINE)
    assert len(examples) == 9
    expected = {"text": ["document"], "tokenized": ["tokens"]}
    expected["tools (OpenAI)"] = ["tools", "user", "assistant", "tool", "assistant"]
    expected["Gemini"] = ["system", "user", "assistant"]
    for shape, text in examples:
        roles = [m["role"] for m in to_messages(Record(json.loads(text), shape))]
        assert roles == expected.get(shape, ["user", "assistant"])


@pytest.mark.parametrize("name", qlora.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(qlora, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora.nothing
