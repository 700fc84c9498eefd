"""Accuracy and margin of pairs, against full logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eval.preference import SCORES, PreferenceConfig, evaluate_preferences
from qlora.data.encode import encode_records
from qlora.data.example import IGNORE_INDEX
from qlora.data.readers import read_records
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from tests.models import save_tiny_trio
from tests.tiny import tiny_tokenizer


def test_scores_are_those_of_full_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the base, of an adapter on it and of the merged model, which is the adapter's."""
    save_tiny_trio(tmp_path, tiny_tokenizer())
    data, out = tmp_path / "pairs.jsonl", tmp_path / "out.json"
    rows = [{"prompt": f"Say {n}", "chosen": "ab" * n, "rejected": "b" * (9 - n)} for n in range(1, 9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"data": str(data), "compute_dtype": "float32", "output": str(out), "batch_size": 2, "cache": False}
    base = str(tmp_path / "base")
    evaluate_preferences(PreferenceConfig(model=base, **common))  # type: ignore[arg-type]
    result = json.loads(out.read_text())
    model = load_base_model(base, compute_dtype="float32", cache=False).eval()
    pairs, _ = encode_records(read_records(str(data)), tiny_tokenizer(), 1024, kind="pairs")
    hits = []
    for pair, row in zip(pairs, result["rows"], strict=True):
        means = []
        for side, part in zip(("chosen", "rejected"), pair.sequences, strict=True):
            kept = part.targets != IGNORE_INDEX
            with torch.no_grad():
                log_p = model(part.input_ids[None]).logits[0].float().log_softmax(-1)[kept]
            value = log_p.gather(1, part.targets[kept, None]).sum().item()
            assert row[side] == pytest.approx(value, abs=1e-3)
            means.append(value / int(kept.sum()))
        assert row["margin_per_token"] == pytest.approx(means[0] - means[1], abs=1e-4)
        hits.append(row["chosen"] > row["rejected"])
    scores = {score["name"]: score for score in result["scores"]}
    assert list(scores) == list(SCORES) and 0 < sum(hits) < len(hits)
    assert scores["accuracy"]["value"] == sum(hits) / len(hits)
    assert scores["accuracy"]["low"] < scores["accuracy"]["value"] < scores["accuracy"]["high"]

    found = []
    for model_flags in (
        {"model": base, "adapter": str(tmp_path / "adapter")},
        {"model": str(tmp_path / "merged")},
    ):
        evaluate_preferences(PreferenceConfig(**model_flags, **common, use_4bit="adapter" in model_flags))  # type: ignore[arg-type]
        found.append([row["margin"] for row in json.loads(out.read_text())["rows"]])
    assert found[0] == pytest.approx(found[1], abs=0.5) and found[0] != pytest.approx(
        [row["margin"] for row in result["rows"]], abs=0.5
    )
    assert "accuracy per token" in capsys.readouterr().out
    with pytest.raises(InputError, match="--data is required"):
        evaluate_preferences(PreferenceConfig(model=base))
