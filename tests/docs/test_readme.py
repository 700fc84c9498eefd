"""What the README says of flags, files and names is so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import qlora
from qlora.config.fields import to_text
from qlora.config.run import RunConfig
from qlora.data.conversations import to_messages
from qlora.data.rows import Record

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_table_of_flags_is_complete_and_its_defaults_are_the_code_s() -> None:
    table = README.partition("## Flags of train.py")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `--([a-z0-9-]+)`[^|]*\| ([^|]+) \|", table, flags=re.MULTILINE))
    expected = {"config": "—"}
    sections = [field.default_factory for field in dataclasses.fields(RunConfig) if field.name != "debug"]
    for config in (*sections, RunConfig):
        for field in dataclasses.fields(config):  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING and dataclasses.is_dataclass(field.default_factory):
                continue
            default = to_text(getattr(config(), field.name))
            shown = {None: "—", "": "—", True: "`on`", False: "`off`"}.get(default, f"`{default}`")
            if isinstance(default, (int, float)) and not isinstance(default, bool):
                shown = f"`{default}`"  # 0 and 1 are no booleans here
            expected[field.name.replace("_", "-")] = shown
    assert rows == expected


def test_the_tree_names_every_module() -> None:
    tree = README.partition("## File tree")[2].partition("##")[0]
    for package in ("qlora",):
        for path in (ROOT / package).glob("*.py"):
            if path.name != "__init__.py":
                assert re.search(rf"^ +{re.escape(path.name)} ", tree, flags=re.MULTILINE), path.name
    for name in ("eval/", "examples/", "configs/", "tests/", "docs/LOG.md", "train.py"):
        assert name in tree and (ROOT / name).exists()


def test_every_data_shape_reads_as_shown() -> None:
    import json

    examples = re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|$", README, flags=re.MULTILINE)
    assert len(examples) == 8
    expected = {"text": ["document"], "tokenised": ["tokens"]}
    expected["tools (OpenAI)"] = ["tools", "user", "assistant", "tool", "assistant"]
    for shape, text in examples:
        roles = [m["role"] for m in to_messages(Record(json.loads(text), shape))]
        assert roles == expected.get(shape, ["user", "assistant"])


@pytest.mark.parametrize("name", qlora.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(qlora, name).__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = qlora.nothing
