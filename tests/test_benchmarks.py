"""benchmarks/: the FLOP formula against what torch counts, our side of the comparison, its table and its data."""

from __future__ import annotations

import argparse
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import peers
from benchmarks.roofline import describe_machine, product_rate, useful_flops
from benchmarks.word_problems import write_problems
from qlora.dataset import load_examples
from qlora.model import load_base_model, load_tokenizer
from qlora.tokenize import IGNORE_INDEX, Example
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


def make_example(length: int, num_targets: int) -> Example:
    targets = torch.full((length,), IGNORE_INDEX)
    targets[length - num_targets :] = 7
    return Example(torch.full((length,), 5), targets)


# ---- the limit --------------------------------------------------------------------------------------------


def test_useful_flops_written_out(tmp_path: Path) -> None:
    """Two sequences through 2 layers of width 64: q and o 64 x 64, k and v 64 x 32, three matrices of 64 x 160."""
    model = load_base_model(str(save_tiny_llama(tmp_path)), compute_dtype="float32", cache=False)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160
    head = 4 * 300 * 64 * (3 + 5)  # 3 and 5 supervised tokens
    attention = 2 * (
        6 * 64 * 10**2 + 6 * 64 * 7**2
    )  # 2 layers, 4 heads of 16; 12 products over half of the square
    window = [make_example(10, 3), make_example(7, 5)]
    assert useful_flops(model, window) == 2 * (2 * layer) * 2 * 17 + head + attention
    assert useful_flops(model, window, True) == 2 * (2 * layer) * 3 * 17 + head + attention
    assert useful_flops(model, window, 1 / 2) == 2 * (2 * layer) * 2.5 * 17 + head + attention


def test_useful_flops_against_torch(tmp_path: Path) -> None:
    """What torch counts for a frozen dense model whose embeddings want a gradient, all tokens supervised.

    It writes the whole square of scores out, so its attention is twice ours.
    """
    length = 24
    path = str(save_tiny_llama(tmp_path))
    dense = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager").requires_grad_(False)
    inputs = torch.randn(1, length, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        dense(inputs_embeds=inputs).logits.sum().backward()
    ours = load_base_model(path, compute_dtype="float32", cache=False)
    attention_again = 2 * 6 * 64 * length**2
    assert useful_flops(ours, [make_example(length, length)]) == counter.get_total_flops() - attention_again


def test_product_rate() -> None:
    assert product_rate(torch.float32, torch.device("cpu")) > 1e8  # any machine's


def test_the_machine_is_described() -> None:
    assert re.search(r".+, \d+ threads, 20\d\d-\d\d-\d\d$", describe_machine())


# ---- our side ---------------------------------------------------------------------------------------------


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    """Two steps of three word problems on a tiny model."""
    model = save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    options = argparse.Namespace(
        model=str(model), data=None, steps=2, batch_size=3, learning_rate=2e-4, max_length=2048
    )
    (tmp_path / "job").mkdir()
    return peers.write_job(options, tmp_path / "job")


def test_our_side_computes_the_loss_of_the_rows(
    job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss is that of the untouched 4-bit model on the rows as the other side reads them."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    result = peers.train_ours(job | {"dtype": "float32"})
    assert [len(result[key]) for key in ("seconds", "losses", "limit")] == [2, 2, 2]
    assert min(result["seconds"] + result["limit"]) > 0 and result["peak_bytes"] > 2**20

    assert sorted(job["order"]) == list(range(6)) != job["order"]
    model = load_base_model(job["model"], compute_dtype="float32")
    total = num_targets = 0.0
    for row in [job["rows"][i] for i in job["order"][:3]]:
        ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"]).bool()
        assert 0 < mask.sum() < len(mask)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum"))
        num_targets += int(mask.sum())
    assert result["losses"][0] == pytest.approx(total / num_targets, abs=1e-5)  # fp32 sums in another order


def test_too_few_rows(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer())
    data = write_problems(tmp_path / "rows.jsonl", 5)
    options = argparse.Namespace(model=str(model), data=str(data), steps=2, batch_size=3, max_length=2048)
    with pytest.raises(SystemExit, match="has 5 rows, too few for 2 steps"):
        peers.write_job(options, tmp_path)


# ---- the table --------------------------------------------------------------------------------------------


def make_run(seconds: float, peak_gib: float, losses: tuple[float, float] = (2.0, 1.5), **more: Any) -> dict:
    """A first step that would spoil every figure if it counted, and a measured one."""
    return {"seconds": [99.0, seconds], "losses": list(losses), "peak_bytes": peak_gib * 2**30, **more}


def cells(table: Any) -> list[list[str]]:
    return [list(row) for row in zip(*(list(column.cells) for column in table.columns), strict=True)]


def test_report_judges_each_goal() -> None:
    """A measured window of 2 rows of 101 ids: 200 tokens. Three rounds, on a machine 1 to 3 times slower."""
    job = {"batch_size": 2, "steps": 2, "rows": [{"input_ids": [0] * 101}] * 4, "order": [0, 1, 2, 3]}
    slower = (1, 3, 2)
    ours = [make_run(1.0 * s, 1, limit=[99.0, 0.85 * s], dtype="float32") for s in slower]
    runs = {
        "ours": ours,
        "TRL bf16": [make_run(6.0 * s, 4) for s in slower],
        "TRL fp32": [make_run(3.0 * s, 2, (2.0, 1.5005)) for s in slower],
        "TRL fp32-": [make_run(4.0 * s, 8, (2.0, 1.502)) for s in slower],
    }
    same = {"float32": ours, "bfloat16": [make_run(9.0, 9, (2.01, 1.5))]}
    assert cells(peers.report(job, runs, same)) == [
        ["ours, float32", "100", "", "1.00", "", ""],
        ["PEFT + TRL bf16, its default", "17", "6.00 x (>= 5: yes)", "4.00",
            "0.25 x (<= 0.3: yes)", "1.0e-02 (<= 0.001: NO)"],
        ["PEFT + TRL fp32, its best here", "33", "3.00 x (>= 3.5: NO)", "2.00",
            "0.50 x (<= 0.3: NO)", "5.0e-04 (<= 0.001: yes)"],
        ["PEFT + TRL fp32-", "25", "4.00 x", "8.00", "0.12 x", "2.0e-03 (<= 0.001: NO)"],
        ["the limit", "118", "0.85 x (>= 0.8: yes)", "", "", ""],
    ]  # fmt: skip


# ---- the data ---------------------------------------------------------------------------------------------


def test_word_problems_are_right_and_as_long_as_gsm8k(tmp_path: Path, smollm2: str) -> None:
    """Every calculation holds. GSM8K's first 1,000 rows: 214 tokens on average, 58 % of them supervised."""
    data = write_problems(tmp_path / "rows.jsonl", 300)
    text = data.read_text()
    assert len(set(text.splitlines())) == 300
    sums = re.findall(r"<<([\d+*-]+)=(\d+)>>", text)
    assert len(sums) > 900
    assert all(eval(sum_) == int(result) for sum_, result in sums)
    examples, _ = load_examples(str(data), load_tokenizer(smollm2), 1024, say=lambda line: None)
    lengths = [len(e) for e in examples]
    assert 200 < statistics.mean(lengths) < 250
    assert 0.55 < sum(e.num_targets for e in examples) / sum(lengths) < 0.62
