"""benchmarks/: the FLOP formula against what torch counts, the side-by-side run; the fidelity study."""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from benchmarks import before, fidelity, fidelity_report, peers, seven_b
from benchmarks.roofline import describe_machine, product_rate, useful_flops
from benchmarks.word_problems import write_problems
from qlora.adapters.model import LoRAModel
from qlora.cli.exits import run
from qlora.config.lora import LoRAConfig
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import inject_lora
from qlora.lora.optimizer import build_optimizer
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.weight import QuantConfig, dequantize_weight, quantize_weight
from qlora.system.errors import InputError
from qlora.training.held_out import evaluate
from qlora.training.loop import Limits, Trainer, TrainingData
from qlora.training.schedule import build_schedule
from tests.models import save_tiny_llama
from tests.shortcuts import load_examples
from tests.tiny import tiny_tokenizer
from tests.training.test_loop import Log


def make_example(length: int, num_targets: int) -> Example:
    targets = torch.full((length,), IGNORE_INDEX)
    targets[length - num_targets :] = 7
    return Example(torch.full((length,), 5), targets)


# ---- the 7B shape -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "share"), [(None, 1.0), (100.0, 0.0)])
def test_training_part_of_seven_b(
    budget: float | None, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer recomputed, or with a budget as few as it takes; a share of the limit for each step."""
    monkeypatch.setattr(seven_b, "NUM_TOKENS", 32)
    result = seven_b.train(save_tiny_llama(tmp_path / "model"), 2, budget)
    assert result["recomputed"] == share
    assert len(result["shares"]) == len(result["step_seconds"]) == 2 and min(result["shares"]) > 0
    assert all(0 < loss < 10 for loss in result["losses"])


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("adapter_switch", "./missing", "--model ./missing does not exist"),
        ("checkpoint_cost", "--model ./missing --data ./missing.jsonl", "missing"),
        ("devices", "--folder ./missing", "missing"),
        ("generation", "--model ./missing.gguf", "--model missing.gguf does not exist"),
        ("merge_drift", "--model ./missing --adapter a --data b --calibration c", "--model ./missing does"),
        ("peers", "--model {model} --data missing.jsonl --peer-python {python}", "missing.jsonl does not exist"),
        ("seven_b", "--folder ./missing", "--folder missing does not exist"),
        ("word_problems", "./missing/rows.jsonl", "missing/rows.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str,
    flags: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was a traceback where a module of qlora/ had found it."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    argv = flags.format(model=model, python=sys.executable).split()
    monkeypatch.setattr(sys, "argv", [name, *argv])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        runpy.run_path(peers.__file__.replace("peers", name), run_name="__main__")
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert shown.startswith("error: ") and said in shown and shown.count("\n") == 1


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


@pytest.fixture(params=["sft"])
def job(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Two steps of three word problems on a tiny model."""
    model = save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    options = argparse.Namespace(
        model=str(model), data=None, steps=2, batch_size=3, learning_rate=2e-4, max_length=2048,
        objective=request.param,
    )  # fmt: skip
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


@pytest.mark.parametrize("job", ["dpo"], indirect=True)
def test_our_side_learns_the_pairs(job: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and reference agree in the first step: log 2. The other side reads the same sequences."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    result = peers.train_ours(job | {"dtype": "float32"})
    assert result["losses"][0] == pytest.approx(math.log(2), abs=1e-6) != result["losses"][1]
    tokenizer = load_tokenizer(job["model"])
    for row in job["rows"]:
        texts = [tokenizer.decode(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        assert "How much money" in texts[0] and "####" in texts[1] and "####" in texts[2] != texts[1]
        assert [len(ids) - sum(mask) for ids, mask in peers.sequences_of(row)] == [len(row["prompt_ids"])] * 2


def test_too_few_rows(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer())
    data = write_problems(tmp_path / "rows.jsonl", 5)
    options = argparse.Namespace(
        model=str(model), data=str(data), steps=2, batch_size=3, max_length=2048, objective="sft"
    )
    with pytest.raises(InputError, match="has 5 rows, too few for 2 steps"):
        peers.write_job(options, tmp_path)


# ---- the table --------------------------------------------------------------------------------------------


def make_run(seconds: float, peak_gib: float, losses: tuple[float, float] = (2.0, 1.5), **more: Any) -> dict:
    """A first step that would spoil every figure if it counted, and a measured one."""
    return {"seconds": [99.0, seconds], "losses": list(losses), "peak_bytes": peak_gib * 2**30, **more}


def cells(table: Any) -> list[list[str]]:
    return [list(row) for row in zip(*(list(column.cells) for column in table.columns), strict=True)]


def test_report_judges_each_goal() -> None:
    """A measured window of 2 rows of 101 ids: 200 tokens. Three rounds, on a machine 1 to 3 times slower."""
    rows = [{"input_ids": [0] * 101, "completion_mask": []}] * 4
    job = {"batch_size": 2, "steps": 2, "rows": rows, "order": [0, 1, 2, 3], "objective": "sft"}
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


# ---- the fidelity study -----------------------------------------------------------------------------------

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two cells, two seeds, two steps each on a tiny model: (directory, the command's flags)."""
    folder = tmp_path_factory.mktemp("study")
    model = save_tiny_llama(folder / "tiny", tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    rows, held_out = write_problems(folder / "train.jsonl", 9), write_problems(folder / "test.jsonl", 3, seed=1)
    flags = ["--model", str(model), "--data", str(rows), "--eval-data", str(held_out), "--steps", "2"]
    flags += ["--seeds", "2", "--batch-size", "2", "--max-length", "2048", "--compute-dtype", "float32"]
    flags += ["--problems", "2", "--max-new-tokens", "3", "--only", "nf4-qv-r8, bf16-all-r8"]
    flags += ["--output-dir", str(folder / "small")]
    assert run(fidelity.main, flags) == 0
    return folder / "small", flags


def test_the_study_trains_as_a_run_of_its_own_would(study: tuple[Path, list[str]], tmp_path: Path) -> None:
    """The second adapter on a base: as on a fresh one, to the last digit; the answers are of the same model."""
    directory, flags = study
    parts = sorted(path.name for path in directory.glob("*.json"))
    names = [f"{cell}-seed{seed}.json" for cell in ("nf4-qv-r8", "bf16-all-r8") for seed in (0, 1)]
    bases = ["nf4.json", "bf16.json"]
    answers = [f"answers-{name}" for name in names + bases]
    assert parts == sorted([*names, *answers, *(f"base-{base}" for base in bases), "study.json"])
    result = json.loads((directory / "nf4-qv-r8-seed1.json").read_text())

    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    network = load_base_model(flags[1], compute_dtype="float32")
    examples, held_out = load_examples(flags[3], load_tokenizer(flags[1]), 2048, eval_source=flags[5])
    before = [evaluate(network, [example], accelerator, 2048) for example in held_out]
    inject_lora(network, LoRAConfig(), seed=1)
    freeze_base(network)
    losses: list[float] = []
    Trainer(
        network, build_optimizer(lora_parameters(network), "adamw"), build_schedule("cosine", 1e-3, 1, 2),
        TrainingData(examples, 2, 1, 2048, seed=1), accelerator, Limits(2, max_grad_norm=1.0),
        [Log(lambda line: losses.append(line["loss"]))],
    ).fit()  # fmt: skip
    assert result["losses"] == losses
    assert result["eval_loss"] == evaluate(network, held_out, accelerator, 2 * 2048)
    base = json.loads((directory / "base-nf4.json").read_text())
    assert base["row_losses"] == [[loss, e.num_targets] for loss, e in zip(before, held_out, strict=True)]
    assert result["eval_loss"] != pytest.approx(statistics.mean(before), abs=1e-6)


def test_a_seed_gives_every_base_the_same_adapter_and_rows(study: tuple[Path, list[str]]) -> None:
    directory, flags = study
    config, starts = LoRAConfig(rank=4), []
    for use_4bit in (True, False):
        model = LoRAModel(load_base_model(flags[1], use_4bit, compute_dtype="float32"))
        for name, seed in (("first", 5), ("second", 6)):
            model.add_adapter(name, config, seed)
        model.set_adapter("second")
        starts.append(lora_state_dict(model.model))
    assert len(starts[0]) == 8 and all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    tokens = {
        (cell, seed): json.loads((directory / f"{cell}-seed{seed}.json").read_text())["tokens"]
        for cell in ("nf4-qv-r8", "bf16-all-r8")
        for seed in (0, 1)
    }
    assert tokens["nf4-qv-r8", 0] == tokens["bf16-all-r8", 0] != tokens["nf4-qv-r8", 1]


def test_weight_error_against_one_weight_at_a_time(study: tuple[Path, list[str]]) -> None:
    directory, flags = study
    dense = LlamaForCausalLM.from_pretrained(flags[1])
    weights = [p.data for n, p in dense.named_parameters() if "_proj" in n]
    assert len(weights) == 14
    quantized = [dequantize_weight(quantize_weight(w, QuantConfig()), torch.float32) for w in weights]
    errors = [float((q - w).norm() / w.norm()) for q, w in zip(quantized, weights, strict=True)]
    found = json.loads((directory / "base-nf4.json").read_text())["weight_error"]
    assert found == pytest.approx(statistics.mean(errors), rel=1e-5) and 0.08 < found < 0.1


def test_a_killed_study_goes_on(study: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    """The missing part alone is made again, and is the same."""
    directory, flags = study
    path = directory / "bf16-all-r8-seed1.json"
    first, others = json.loads(path.read_text()), {p: p.stat().st_mtime_ns for p in directory.glob("*seed*.json")}
    path.unlink()
    assert run(fidelity.main, flags) == 0
    assert "bf16-all-r8-seed1.json: " in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert again["losses"] == first["losses"] and again["eval_loss"] == first["eval_loss"]
    del others[path]
    assert len(others) == 7 and all(p.stat().st_mtime_ns == changed for p, changed in others.items())


def test_intervals_against_those_by_hand() -> None:
    """t(0.975) is 4.303 for 2 degrees of freedom, 12.706 for 1; Wilson's of 0 of 8 ends at z^2 / (n + z^2)."""
    mean, half = fidelity_report.mean_interval([1.0, 2.0, 6.0])  # s = sqrt(7)
    assert mean == 3 and half == pytest.approx(4.303 * 7**0.5 / 3**0.5, rel=1e-4)
    assert fidelity_report.mean_interval([2.0]) == (2.0, None)
    # d = 2 x 1 and 1 x 3 over 4 tokens: r = 5 / 4; residuals 3 / 4 and -3 / 4
    ratio, half = fidelity_report.row_interval([(3.0, 1), (2.0, 3)], [(1.0, 1), (1.0, 3)])
    assert ratio == 5 / 4 and half == pytest.approx(12.706 * (2 * 2 * 9 / 16) ** 0.5 / 4, rel=1e-4)
    assert fidelity_report.show_match([[False] * 4] * 2) == "0/8 [0%, 32%]"  # 3.8416 / 11.8416
    assert fidelity_report.show_match([]) == "—"


def make_study(losses: dict[str, list[float]]) -> dict[str, Any]:
    """A study's results with these losses, cell by cell and seed by seed."""
    settings = dict(model="m", data="d", eval_data="e", rows=9, eval_rows=2, steps=2, batch_size=2, match="json")
    settings |= dict(max_length=99, learning_rate=1e-3, alpha=16.0, compute_dtype="float32", problems=4)
    time = {"seconds": 90.0, "cpu_seconds": 60.0}
    cells = {
        f"{cell}-seed{seed}": {"cell": cell, "seed": seed, "eval_loss": loss, "trainable": 1234, "tokens": 50}
        | time
        for cell, values in losses.items()
        for seed, loss in enumerate(values)
    }
    bases = {
        name: {"row_losses": [[loss, 1], [loss + 1, 3]], "weight_error": 0.0123} | time
        for name, loss in (("bf16", 1.0), ("nf4", 1.5))
    }
    answers = {name: {"correct": [True, False]} | time for name in ("nf4", *cells)}
    return {"settings": settings, "bases": bases, "cells": cells, "answers": answers}


def test_tables_say_what_the_intervals_say() -> None:
    """Paired within a seed: shifts of the seeds themselves do not count; a cell may have fewer seeds."""
    study = make_study(
        {
            "bf16-qv-r8": [1.0, 2.0, 3.0],
            "nf4-qv-r8": [1.11, 2.09, 3.10],
            "fp4-qv-r8": [0.9, 1.0],
            "nf4-all-r8": [1.01, 1.99, 3.0],
            "nf4-qv-r4": [1.0],
        }
    )
    tables = fidelity_report.make_tables(study)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if "|" in line]
    assert ["NF4", "1.23%", "2.250", "+0.500 [+0.500, +0.500]", "—", "1/2 [9%, 91%]"] in rows
    assert ["bf16", "q/v", "8", "1,234", "3", "2.000 ± 2.484", "—", "3/6 [19%, 81%]"] in rows
    assert ["NF4 − bf16, q/v", "3", "+0.100 [+0.075, +0.125]", "higher"] in rows
    assert ["all-linear − q/v, NF4", "3", "-0.100 [-0.100, -0.100]", "lower"] in rows
    assert ["FP4 − bf16, q/v", "2", "-0.550 [-6.268, +5.168]", "no difference found"] in rows
    assert ["rank 4 − 8, NF4", "1", "-0.110", "one seed"] in rows
    assert not any("rank 64" in row[0] for row in rows)
    assert "12 trainings" in tables and "27 minutes of processor time, 40 minutes" in tables  # of 27 parts


def test_the_report_of_a_study_goes_into_a_page(study: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, _ = study
    page = tmp_path / "page.md"
    begin, end = fidelity_report.marks("small")
    page.write_text(f"Before.\n{begin}\nold\n{end}\nAfter.\n")
    assert run(fidelity.main, ["--report-only", "--output-dir", str(directory), "--page", str(page)]) == 0
    tables = (directory / "report.md").read_text().strip()
    assert page.read_text() == f"Before.\n{begin}\n\n{tables}\n\n{end}\nAfter.\n"
    assert fidelity_report.make_tables(json.loads((tmp_path / "page-small.json").read_text())) == tables
    assert "| NF4 | q/v | 8 | 3,584 | 2 |" in tables
    for picture in (directory / "loss.png", tmp_path / "page-small.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"only": "nf4-qv-r9"}, "--only names nf4-qv-r9; the cells are bf16-qv-r8, "),
        ({"seeds": 0}, "seeds is 0; give --seeds 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give --learning-rate"),
        ({"alpha": 0.0}, "alpha is 0.0; give --alpha"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        fidelity.FidelityConfig(**settings)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--model", "m"], "--model, --data and --eval-data are required"),
        (["--report-only", "--output-dir", "nowhere"], "nowhere holds no study"),
    ],
)
def test_wrong_flags(flags: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(fidelity.main, flags) == 2
    assert problem in capsys.readouterr().err


def test_other_settings_and_other_files_are_refused(study: tuple[Path, list[str]], tmp_path: Path) -> None:
    directory, flags = study
    with pytest.raises(InputError, match=r"with other settings \(steps 2, not 3\); choose another --output-dir"):
        fidelity.main([*flags, "--steps", "3"])
    (tmp_path / "study.json").write_bytes((directory / "study.json").read_bytes())
    with pytest.raises(InputError, match=r"No part of the study in .* is finished"):
        fidelity_report.read_study(tmp_path)
    (tmp_path / "nf4-qv-r8-seed0.json").write_text('{"loss": 1}')
    with pytest.raises(InputError, match=r"seed0.json is not a result of this command; remove it"):
        fidelity_report.read_study(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(InputError, match=r"page.md cannot take the tables .it lacks the lines <!-- small: "):
        fidelity_report.write_report(directory, page)
    assert page.read_text() == "no marks"


def test_the_page_of_the_study_is_what_its_results_say() -> None:
    """docs/fidelity.md holds the tables that its .json gives."""
    page, results = (DOCS / "fidelity.md").read_text(), sorted(DOCS.glob("fidelity-*.json"))
    assert results
    for path in results:
        name = path.stem.removeprefix("fidelity-")
        tables = fidelity_report.make_tables(json.loads(path.read_text()))
        assert fidelity_report.fill_page(page, name, tables) == page
        assert path.with_suffix(".png").name in page


# ---- before -----------------------------------------------------------------------------------------------


def test_two_checkouts_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This tree stands for both sides; paths are those of the directory that the command was started in."""
    save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer(), max_position_embeddings=2048)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(before, "check_out", lambda commit, directory: directory.symlink_to(before.ROOT))
    before.main(["d130d9e", "--rounds", "1", "--sequence", "200", "--", "--model", "tiny", "--max-steps", "2"])
    printed = capsys.readouterr().out
    assert printed.index("round 1, d130d9e") < printed.index("round 1, this checkout")
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["d130d9e", "this checkout"]
    assert rows[0][3] == rows[1][3]  # the same loss
    assert float(re.findall(r"memory ([0-9.]+)", printed)[0]) == pytest.approx(1, abs=0.2)


def test_a_side_that_fails_says_why(tmp_path: Path) -> None:
    side = before.Side("new", before.ROOT, tmp_path / "cache")
    with pytest.raises(
        InputError, match=r"(?s)of new ended with exit code 2; it printed last:.*--model M is neither"
    ):
        before.measure(side, ["--model", "M", "--data", "rows.jsonl"])
    with pytest.raises(InputError, match="git knows no commit 'ffffffff'"):
        before.check_out("ffffffff", tmp_path / "before")
