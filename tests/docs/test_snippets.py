"""The Python on docs/library.md and in the README runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.pages import README, ROOT
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def run_blocks(blocks: list[str], page: Path) -> None:
    """One after the other, in one namespace; a traceback names the page and the block."""
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_the_page_on_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, blocks = ROOT / "docs" / "library.md", python_blocks(ROOT / "docs" / "library.md")
    assert len(blocks) > 12
    monkeypatch.chdir(tmp_path)
    run_blocks(blocks, page)
    used = set(re.findall(r"(?:qlora\.|import .*?)\b(\w+)", "\n".join(blocks)))
    assert used >= {"inject_lora", "lora_state_dict", "save_adapter", "load_adapter", "parameter_summary"}


def test_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model and four rows in the place of path/to/llama and train.jsonl."""
    blocks = python_blocks(README)
    assert len(blocks) == 2 and "qlora.train(" in blocks[0] and "trainable_parameters" in blocks[1]
    monkeypatch.chdir(tmp_path)
    save_tiny_llama(tmp_path / "path" / "to" / "llama", tokenizer=tiny_tokenizer())
    rows = [{"instruction": f"say {n}", "output": str(n)} for n in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_blocks(blocks, README)
    assert (tmp_path / "merged" / "config.json").exists() and (
        tmp_path / "adapter" / "adapter_config.json"
    ).exists()
