"""The whole job as a user runs it: on the real model, and on several processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from examples.orders import write_task
from qlora.cli.main import main as qlora_main
from qlora.system.errors import InputError
from tests import fork_server
from tests.models import save_tiny_llama
from tests.processes import launch
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]


def read_lines(output_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path) -> list[float]:
    return [line["loss"] for line in read_lines(output_dir) if "loss" in line]


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("orders"), num_train=16, num_test=4)[0]


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows of about 22 tokens: an empty system message keeps SmolLM2's template from writing its own."""
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    with file.open("w") as rows:
        for n in range(1, 17):
            texts = ("system", ""), ("user", f"{n} + {n * n}"), ("assistant", str(n + n * n))
            messages = [{"role": role, "content": text} for role, text in texts]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return file


@pytest.fixture(scope="module")
def real_run(smollm2: str, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Six steps on the real model with dropout, over an epoch's end (16 examples, windows of 4)."""
    output_dir = tmp_path_factory.mktemp("real") / "out"
    flags = ["--use-4bit", "--model", smollm2, "--data", str(sums), "--dropout", "0.05"]
    flags += ["--batch-size", "2", "--grad-accum", "2", "--max-length", "256", "--max-steps", "6"]
    flags += ["--learning-rate", "2e-3", "--warmup-steps", "1", "--save-every", "2"]
    train.main([*flags, "--output-dir", str(output_dir)])
    return output_dir, flags


@pytest.mark.slow
def test_training_learns_and_writes_everything(real_run: tuple[Path, list[str]]) -> None:
    output_dir, _ = real_run
    seen = losses(output_dir)
    assert len(seen) == 6 and seen[-1] < seen[0] - 0.2
    names = {path.name for path in output_dir.iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "loss.png", "report.html"}
    assert names == wanted | {"run.json", "checkpoints", ".lock"}
    assert sorted(p.name for p in (output_dir / "checkpoints").iterdir()) == [f"step-00000{n}" for n in (2, 4, 6)]
    state = load_file(output_dir / "adapter_model.safetensors")
    assert len(state) == 120 and all(t.dtype == torch.bfloat16 for t in state.values())
    assert all(t.abs().max() > 0 for t in state.values())


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_adapter(real_run: tuple[Path, list[str]], tmp_path: Path) -> None:
    """As if killed after step 5: metrics to there, checkpoints to step 4."""
    output_dir, flags = real_run
    (tmp_path / "checkpoints").mkdir()
    for step in (2, 4):
        shutil.copytree(output_dir / f"checkpoints/step-00000{step}", tmp_path / f"checkpoints/step-00000{step}")
    lines = (output_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:5]))
    train.main([*flags, "--output-dir", str(tmp_path), "--resume", "auto"])
    assert losses(tmp_path) == losses(output_dir)
    expected = load_file(output_dir / "adapter_model.safetensors")
    resumed = load_file(tmp_path / "adapter_model.safetensors")
    assert expected.keys() == resumed.keys() and all(torch.equal(expected[k], resumed[k]) for k in expected)


@pytest.mark.slow
def test_evaluating_changes_no_training_loss(real_run: tuple[Path, list[str]], tmp_path: Path, sums: Path) -> None:
    """Equal to the last digit, on any CPU (TRAPS 1: an AVX512-BF16 one repacks weights when it evaluates)."""
    output_dir, flags = real_run
    few = tmp_path / "held_out.jsonl"
    few.write_text("".join(sums.read_text().splitlines(keepends=True)[:2]))
    evaluate = ["--eval-every", "2", "--eval-data", str(few), "--num-samples", "1", "--sample-tokens", "4"]
    train.main([*flags, *evaluate, "--output-dir", str(tmp_path / "out")])
    assert losses(tmp_path / "out") == losses(output_dir)
    seen = [line["eval_loss"] for line in read_lines(tmp_path / "out") if "eval_loss" in line]
    assert len(seen) == 4 and seen[-1] < seen[0] - 0.2


@pytest.mark.slow
def test_merge_and_prompt(
    real_run: tuple[Path, list[str]], tmp_path: Path, smollm2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The merged directory is an ordinary model: transformers loads it and answers as the adapter model does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.adapters.load import load_adapter
    from qlora.export.drift import compare_logits
    from qlora.model.load import load_base_model

    output_dir, _ = real_run
    merged = tmp_path / "merged"
    qlora_main(["merge", "--adapter", str(output_dir), "--output-dir", str(merged), "--max-shard-gb", "0.1"])
    assert "Drift from base + adapter: KL " in capsys.readouterr().out
    assert len(list(merged.glob("model-*.safetensors"))) == 3

    question = "Write this order as JSON: Please send 2 red mugs to Anna in Oslo by Friday."
    flags = ["--prompt", question, "--max-new-tokens", "12"]
    train.main(["--use-4bit", "--model", smollm2, "--adapter", str(output_dir), *flags])
    answer = capsys.readouterr().out.strip()
    assert answer

    model = AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text and answer[0] == text[0]  # further on, greedy texts may part where two tokens are near equal

    adapted = load_base_model(smollm2, compute_dtype="float32")
    load_adapter(adapted, output_dir)
    with torch.no_grad():
        expected = adapted(**inputs).logits[0]
        drift = compare_logits([expected], [model.float()(**inputs).logits[0]])
    assert 0 < drift.mean_kl < 5e-3 and drift.greedy_agreement > 0.9


@pytest.mark.slow
def test_twenty_steps_equal_peft(smollm2: str, sums: Path, tmp_path: Path) -> None:
    """Same 4-bit base, initial adapter and batches, fp32: PEFT on bitsandbytes' own layers gives our losses.

    Both run AdamW in fp32 over 20 steps; what differs is the order of additions (packed against single rows,
    one fused function against composed operations), about 1e-6 per step.
    """
    import bitsandbytes as bnb
    import peft
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from qlora.adapters.peft_files import save_adapter
    from qlora.config.lora import LoRAConfig
    from qlora.data.batches import make_batches
    from qlora.lora.adapter import inject_lora
    from qlora.lora.optimizer import BETAS, EPS, build_optimizer
    from qlora.lora.trainable import freeze_base, lora_parameters
    from qlora.model.cache import cached_base
    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer
    from qlora.quant.weight import QuantConfig
    from qlora.training.step import train_step
    from tests.shortcuts import load_examples

    model = load_base_model(smollm2, compute_dtype="float32")
    config = LoRAConfig(adapter_dtype="float32")
    inject_lora(model, config, seed=3)
    freeze_base(model)
    start = tmp_path / "initial-adapter"
    save_adapter(model, start, config)
    model.train()
    examples, _ = load_examples(str(sums), load_tokenizer(smollm2), 128, say=lambda line: None)
    windows = [[examples[(2 * step) % 16], examples[(2 * step + 1) % 16]] for step in range(20)]

    optimizer, ours = build_optimizer(lora_parameters(model), "adamw"), []
    for window in windows:
        optimizer.zero_grad()
        ours.append(train_step(model, optimizer, make_batches(window, 2, 128, True), Accelerator(), 1e-3).loss)
    del model

    cached = cached_base(Path(smollm2), QuantConfig())
    base = AutoModelForCausalLM.from_pretrained(cached, dtype=torch.float32)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = torch.float32  # the checkpoint names bf16
    for parameter in base.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    theirs_model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    theirs_model.train()
    trainable = [p for p in theirs_model.parameters() if p.requires_grad]
    assert len(trainable) == 120 and all(p.dtype == torch.float32 for p in trainable)
    adamw, theirs = torch.optim.AdamW(trainable, lr=1e-3, betas=BETAS, eps=EPS, weight_decay=0.0), []
    for window in windows:
        count, total = sum(e.num_targets for e in window), 0.0
        for example in window:
            logits = theirs_model(input_ids=example.input_ids[None]).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, example.targets, reduction="sum") / count
            loss.backward()
            total += loss.item()
        adamw.step()
        adamw.zero_grad()
        theirs.append(total)
    assert ours[-1] < ours[0] - 0.3  # both have learned, so the comparison is of more than a start
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_evaluating_needs_held_out_data(orders: Path, tmp_path: Path) -> None:
    """A split drawn only when evaluating would make the two runs train on different data."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    common = ["--model", str(model), "--data", str(orders), "--max-steps", "4", "--max-length", "512"]
    with pytest.raises(InputError, match="pass --eval-data FILE, or --eval-split"):
        train.main([*common, "--eval-every", "2", "--output-dir", str(tmp_path / "none")])
    split = ["--eval-split", "0.1"]
    train.main([*common, *split, "--output-dir", str(tmp_path / "plain")])
    train.main([*common, *split, "--eval-every", "2", "--output-dir", str(tmp_path / "evaluated")])
    assert losses(tmp_path / "plain") == losses(tmp_path / "evaluated") and len(losses(tmp_path / "plain")) == 4


def test_prompt_mode_prints_the_answer_and_nothing_else(tmp_path: Path) -> None:
    """No library's log or warning that a user could not act on, on either stream."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    command = [sys.executable, "train.py", "--model", str(model), "--prompt", "Hi", "--max-new-tokens", "4"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.strip()) > 0


def launch_by_accelerate(processes: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *fork_server.LAUNCHER, "-m", "accelerate.commands.launch"]
    command += ["--multi_gpu", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "train.py", *arguments]
    return fork_server.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_two_processes_sample_score_and_stop_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing waits for ever, each line is written once; one process resumes the ended run, and it ends again."""
    model, out = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer()), tmp_path / "out"
    data = write_task(tmp_path / "orders", num_train=20, num_test=2)[0]
    flags = ["--model", str(model), "--data", str(data), "--max-length", "512", "--compute-dtype", "float32"]
    flags += ["--eval-split", "0.2", "--eval-every", "1", "--num-samples", "2", "--sample-tokens", "4"]
    flags += [
        "--best-metric",
        "exact_match",
        "--score-match",
        "json",
        "--max-new-tokens",
        "4",
        "--max-steps",
        "50",
    ]
    flags += ["--early-stopping-patience", "2", "--report-to", "tensorboard", "--output-dir", str(out)]
    result = launch(2, "train.py", *flags, "--batch-size", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped early after step 2 of 50") == 1
    evaluations = [line for line in read_lines(out) if "eval_loss" in line]
    assert [(line["step"], line["exact_match"], line["stale_evaluations"]) for line in evaluations] == [
        (0, 0.0, 0), (1, 0.0, 1), (2, 0.0, 2),
    ]  # fmt: skip
    assert [line.get("stopped_early", False) for line in evaluations] == [False, False, True]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 1, 1, 2, 2]
    assert all(json.loads(sample["expected"]) for sample in samples)
    assert len(list((out / "logs" / "qlora").glob("events*"))) == 1
    assert json.loads((out / "run.json").read_text())["facts"]["num_processes"] == 2

    before = [
        (out / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors")
    ]
    capsys.readouterr()
    train.main([*flags, "--batch-size", "4", "--resume", "auto"])
    assert "stopped early after step 2 of 50" in capsys.readouterr().out
    after = [(out / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "adapter_model.safetensors")]
    assert after == before


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """2 ranks x 4 examples = 1 x 8 (and 1 x 4 accumulated twice), to fp32 rounding; one writer."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    data = write_task(tmp_path / "orders", num_train=20, num_test=2)[0]
    common = ["--model", str(model), "--data", str(data), "--max-length", "512", "--compute-dtype", "float32"]
    common += ["--adapter-dtype", "float32", "--epochs", "2", "--learning-rate", "1e-2", "--warmup-steps", "1"]
    for name, flags in (
        ("one", ["--batch-size", "8"]),
        ("accumulated", ["--batch-size", "4", "--grad-accum", "2"]),
    ):
        train.main([*common, *flags, "--output-dir", str(tmp_path / name)])
    result = launch_by_accelerate(2, [*common, "--batch-size", "4", "--output-dir", str(tmp_path / "two")])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trainable of") == 1
    one, accumulated, two = (read_lines(tmp_path / name) for name in ("one", "accumulated", "two"))
    assert len(one) == len(two) == 6  # 20 examples in windows of 8: the last one of each epoch holds 4
    for a, b, c in zip(one, two, accumulated, strict=True):
        for field in ("num_tokens", "target_tokens", "learning_rate", "step"):
            assert a[field] == b[field] == c[field]
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5) and math.isclose(
            a["loss"], c["loss"], rel_tol=1e-5
        )
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-3)
    assert abs(one[0]["loss"] - one[-1]["loss"]) > 0.05


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path: Path) -> None:
    """2 steps on one process, 3 on two that share the base, 3 on one again: data and losses of 8 on one."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    data = write_task(tmp_path / "orders", num_train=20, num_test=4)[0]
    common = ["--model", str(model), "--data", str(data), "--max-length", "512", "--compute-dtype", "float32"]
    common += ["--adapter-dtype", "float32", "--learning-rate", "1e-2", "--schedule", "constant"]
    common += ["--eval-split", "0.1", "--eval-every", "2", "--save-every", "1"]
    one, mixed = str(tmp_path / "one"), str(tmp_path / "mixed")
    train.main([*common, "--batch-size", "8", "--output-dir", one, "--max-steps", "8"])
    train.main([*common, "--batch-size", "8", "--output-dir", mixed, "--max-steps", "2"])
    resume = [*common, "--output-dir", mixed, "--resume", "auto"]
    result = launch(2, "train.py", *resume, "--batch-size", "8", "--max-steps", "5")
    assert result.returncode != 0 and "examples_per_step was 8, is 16" in result.stderr
    result = launch(2, "train.py", *resume, "--batch-size", "4", "--max-steps", "5", "--shard", "fsdp")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("resumed from") == 1
    train.main([*resume, "--batch-size", "8", "--max-steps", "8"])
    expected, lines = read_lines(Path(one)), read_lines(Path(mixed))
    # the shorter runs evaluated at their own ends, too
    lines = [line for line in lines if not ("eval_loss" in line and line["step"] == 5)]
    assert len(expected) == len(lines) == 8 + 5
    for a, b in zip(expected, lines, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        for field in ("num_tokens", "target_tokens", "learning_rate"):
            assert a.get(field) == b.get(field)
        for field in ("loss", "eval_loss"):
            assert field not in a or math.isclose(a[field], b[field], rel_tol=1e-5)
    assert abs(lines[1]["loss"] - lines[-2]["loss"]) > 0.05
