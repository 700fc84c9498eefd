"""The examples of a skipped step."""

from __future__ import annotations

import json
from pathlib import Path

from qlora.data.example import IGNORE_INDEX
from qlora.training.skipped import keep_examples
from tests.training.test_loop import make_examples


def test_a_skipped_step_is_kept_for_inspection(tmp_path: Path) -> None:
    window, folder = make_examples(3), tmp_path / "skipped"
    window[1].origin = "train.jsonl:17"
    where = f"Its examples are in {tmp_path}/skipped/step-000012.jsonl"
    assert keep_examples(folder, 12, window, is_main=False) == where and not folder.exists()
    assert keep_examples(folder, 12, window, is_main=True) == where
    rows = [json.loads(line) for line in (tmp_path / "skipped/step-000012.jsonl").read_text().splitlines()]
    assert [row["where"] for row in rows] == ["", "train.jsonl:17", ""]
    for row, example in zip(rows, window, strict=True):
        assert row["input_ids"] == example.input_ids.tolist()
        assert [IGNORE_INDEX if t is None else t for t in row["targets"]] == example.targets.tolist()
    (tmp_path / "skipped").rename(tmp_path / "moved")
    (tmp_path / "skipped").write_text("in the way")
    # A failure to write names the rows at least, and so does a run without a folder.
    assert "train.jsonl:17" in keep_examples(folder, 13, window, is_main=True)
    assert "train.jsonl:17" in keep_examples(None, 13, window, is_main=True)
