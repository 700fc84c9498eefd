"""A run that learns preferences: windows, reference, evaluation, resume, against slow references."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException

from qlora.adapters.peft_files import save_adapter
from qlora.config.lora import LoRAConfig
from qlora.config.parse import parse_args
from qlora.config.preferences import PreferenceConfig
from qlora.config.run import RunConfig
from qlora.data.batches import balance_by_length, make_batches
from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import active_adapter, inject_lora, lora_layers
from qlora.lora.optimizer import build_optimizer
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.system.errors import InputError, StoppedOnRequest
from qlora.training import preferences as preferences_module
from qlora.training.checkpoint import list_checkpoints
from qlora.training.observer import Observer
from qlora.training.preferences import Preferences, score_alone, under
from qlora.training.reference import add_reference
from qlora.training.run import TrainingRun
from qlora.training.step import train_step
from tests.model.test_preference_loss import LOSSES, make_pairs
from tests.models import save_tiny_llama
from tests.processes import run_processes
from tests.shortcuts import new_cache
from tests.tiny import tiny_tokenizer
from tests.training.test_loop import TIMING
from tools.proof import DIVISIBLE

ACCELERATOR = Accelerator()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=tiny_tokenizer()))


def adapted(tiny: str) -> Any:
    model = load_base_model(tiny, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(rank=4, adapter_dtype="float32"), seed=1)
    freeze_base(model)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():
        layer.weights.lora_B.data.copy_(torch.randn(layer.weights.lora_B.shape, generator=generator) * 0.05)
    return model.train()


def plain_log_p(model: Any, part: Example) -> torch.Tensor:
    """log p of a sequence's targets, from full logits of the sequence alone."""
    kept = part.targets != IGNORE_INDEX
    log_p = model(part.input_ids[None]).logits[0].float().log_softmax(-1)
    return log_p[kept].gather(1, part.targets[kept, None]).sum()


def slow_step(model: Any, method: str, pairs: list[Example]) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """(loss, what is shown, gradients) of one window, from full logits and a reference with the adapter off."""
    own = active_adapter(model)
    model.eval()
    with torch.no_grad(), under(model, None):
        known = torch.stack([torch.stack([plain_log_p(model, p) for p in e.sequences]) for e in pairs])
    assert active_adapter(model) is own
    log_p = torch.stack([torch.stack([plain_log_p(model, p) for p in e.sequences]) for e in pairs])
    kl = max(0.0, (log_p - known)[:, 1].mean().item()) if method == "kto" else 0.0
    pairs = [replace(e, reference=tuple(row)) for e, row in zip(pairs, known.tolist(), strict=True)]
    answers = preferences_module.answers_of(pairs, log_p)
    rows_per_token = len(pairs) / answers.counts[:, 0].sum().item()
    loss = LOSSES[method].losses(answers, rows_per_token, kl).mean()
    loss.backward()
    maths = LOSSES[method]
    shown = preferences_module.averages(maths.names, maths.measure(answers, kl).detach())
    gradients = [p.grad.clone() for p in lora_parameters(model)]
    model.zero_grad()
    return loss.item(), shown, gradients


@pytest.mark.parametrize("method", LOSSES)
def test_a_step_does_not_depend_on_how_its_window_is_cut(tiny: str, method: str) -> None:
    """1 x 5 = 5 x 1, packed and padded: loss, gradients and what is shown are those of full logits."""
    model, pairs = adapted(tiny), make_pairs()
    loss, shown, wanted = slow_step(model, method, pairs)
    assert all(gradient.abs().max() > 0 for gradient in wanted)
    if method == "kto":
        assert shown["kl"] > 0  # else the estimate would have no part in this test
    for batch_size, packing in ((5, True), (1, True), (2, False)):
        model.train()
        optimizer = build_optimizer(lora_parameters(model), "adamw")
        batches = make_batches(pairs, batch_size, 30, packing, "cuda")
        assert len(batches) > 1 or batch_size == 5
        preferences = Preferences(LOSSES[method], reference_each_step=LOSSES[method].needs_reference)
        result = train_step(model, optimizer, batches, ACCELERATOR, 0.0, window_loss=preferences)
        assert result.loss == pytest.approx(loss, abs=1e-5)
        assert result.measures == pytest.approx(shown, abs=1e-4)
        for parameter, other in zip(lora_parameters(model), wanted, strict=True):
            assert parameter.grad is not None and (parameter.grad - other).abs().max() < 1e-5


@pytest.mark.parametrize("method", LOSSES)
def test_an_evaluation_is_that_of_full_logits(tiny: str, method: str) -> None:
    model, pairs = adapted(tiny), make_pairs()
    loss, shown, _ = slow_step(model, method, pairs)
    preferences = Preferences(LOSSES[method], reference_each_step=LOSSES[method].needs_reference)
    found = preferences.evaluate(model.train(), pairs, ACCELERATOR, budget=40)
    assert found is not None and model.training
    assert found.pop("eval_loss") == pytest.approx(loss, abs=1e-5)
    assert found == pytest.approx({f"eval_{name}": value for name, value in shown.items()}, abs=1e-4)
    assert preferences.evaluate(model, pairs, ACCELERATOR, 40, stop=lambda: "SIGTERM") is None


def test_memory_that_runs_out_does_not_change_a_step(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference and the mismatched answers of KTO are scored in halves where they do not fit whole."""
    model, pairs = adapted(tiny), make_pairs()
    loss, _, wanted = slow_step(model, "kto", pairs)
    compute, refused = preferences_module.sequence_log_likelihoods, []

    def small(model: Any, batch: Any) -> Any:
        if not torch.is_grad_enabled() and len(batch.examples) > 2:
            refused.append(1)
            raise torch.OutOfMemoryError("out of memory")
        return compute(model, batch)

    monkeypatch.setattr(preferences_module, "sequence_log_likelihoods", small)
    optimizer = build_optimizer(lora_parameters(model.train()), "adamw")
    preferences = Preferences(LOSSES["kto"], reference_each_step=True)
    result = train_step(
        model, optimizer, make_batches(pairs, 5, 500, True, "cuda"), ACCELERATOR, 0.0, window_loss=preferences
    )
    assert refused and result.loss == pytest.approx(loss, abs=1e-5)
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    assert all((g - w).abs().max() < 1e-5 for g, w in zip(gradients, wanted, strict=True))


# ---- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Flags of a run of four steps under an objective."""
    folder, generator = tmp_path_factory.mktemp("job"), random.Random(0)
    rows = [
        {"prompt": f"Say {n}", "chosen": "a" * generator.randint(1, 9), "rejected": "b" * generator.randint(1, 9)}
        for n in range(20)
    ]
    marked = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 2 else "rejected"], "label": bool(n % 2)}
        for n, row in enumerate(rows)
    ]
    for name, lines in (("pairs", rows), ("labels", marked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def flags(objective: str, *more: str) -> list[str]:
        data = folder / ("labels.jsonl" if objective == "kto" else "pairs.jsonl")
        text = (
            f"--model {tiny} --data {data} --objective {objective} --compute-dtype float32 --batch-size 2 "
            "--grad-accum 2 --max-steps 4 --eval-split 0.2 --eval-every 2 --save-every 2 --num-samples 0 "
            "--learning-rate 0.01 --warmup-steps 0 --dropout 0.1"
        )
        return [*text.split(), *more]

    return flags


def fit(flags: list[str], out: Path, *observers: Observer) -> list[dict[str, Any]]:
    config = parse_args(RunConfig, "test", [*flags, "--output-dir", str(out)])
    with TrainingRun.from_config(config, observers=observers) as run:
        run.train()
    return lines_of(out)


def lines_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def adapters_are_equal(one: Path, other: Path) -> bool:
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


class StopAt(Observer):
    def __init__(self, step: int) -> None:
        self.step = step

    def before_step(self, trainer: Any) -> str | None:
        return "enough" if trainer.progress.step == self.step else None


def test_a_stopped_run_resumes_bit_for_bit(job: Any, tmp_path: Path) -> None:
    flags, whole, parts = job("kto", "--best-metric", "accuracy"), tmp_path / "whole", tmp_path / "parts"
    expected = fit(flags, whole)
    with pytest.raises(StoppedOnRequest):
        fit(flags, parts, StopAt(2))
    assert fit([*flags, "--resume", "auto"], parts) == expected
    assert adapters_are_equal(whole, parts)
    steps = [line for line in expected if "loss" in line]
    held_out = [line for line in expected if "eval_loss" in line]
    assert len(steps) == 4 and len(held_out) == 3
    shown = {"accuracy", "margin", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected", "kl"}
    assert shown <= set().union(*steps) and {f"eval_{name}" for name in shown} <= set().union(*held_out)
    assert held_out[-1]["eval_loss"] < held_out[0]["eval_loss"]
    with pytest.raises(InputError, match="beta"):
        fit([*flags, "--beta", "0.7", "--resume", "auto"], parts)


class KillAt(Observer):
    """SIGKILL before a step, once the checkpoint of the one before is whole."""

    def __init__(self, step: int, out: Path) -> None:
        self.step, self.out = step, out

    def before_step(self, trainer: Any) -> str | None:
        if trainer.progress.step == self.step:
            while not list_checkpoints(self.out):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return None


@pytest.mark.parametrize("more", [(), ("--reference-each-step", "--no-packing")])
def test_a_killed_run_resumes_byte_for_byte(job: Any, tmp_path: Path, more: tuple[str, ...]) -> None:
    """SIGKILL between two checkpoints: a step is made again, and nothing differs from the run left alone."""
    flags, whole, parts = job("dpo", *more), tmp_path / "whole", tmp_path / "parts"
    expected = fit(flags, whole)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_processes(1, fit, flags, parts, KillAt(3, parts))
    assert [line["step"] for line in lines_of(parts) if "loss" in line] == [1, 2, 3]
    assert fit([*flags, "--resume", "auto"], parts) == expected
    files = [file.relative_to(whole) for file in sorted(whole.rglob("*.safetensors"))]
    assert len(files) >= 3  # the adapter, and a checkpoint's
    for file in files:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


def test_the_reference_of_each_step_is_that_of_the_cache_bit_for_bit(
    job: Any, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base before it has an adapter, and with the adapter off; read again, and where the file was damaged."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    source = job("kto")[job("kto").index("--data") + 1]
    examples, _ = load_examples(Sources([source]), Encoder(tiny_tokenizer(), 100, kind="labels"), lambda _: None)

    def judge() -> tuple[bool, list[Any]]:
        base = load_base_model(tiny, compute_dtype="float32", cache=False)
        was_there = add_reference(base, examples, ACCELERATOR, True, "")
        return was_there, [example.reference for example in examples]

    was_there, known = judge()
    assert not was_there and len(known) == 20 and judge() == (True, known)
    (file,) = tmp_path.rglob("log_p.bin")
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert judge() == (False, known) and file.read_bytes() == content
    file.write_bytes(content[:-8])
    assert judge() == (False, known) and judge() == (True, known)

    model, rows = adapted(tiny), list(examples)
    with under(model, None):
        found = score_alone(model, rows[7:], ACCELERATOR, True, lambda: None)
    assert found is not None and [tuple(found[id(row)]) for row in rows[7:]] == known[7:]


def test_an_adapter_is_the_reference(job: Any, tiny: str, tmp_path: Path) -> None:
    """A run that goes on from the reference starts where both agree; before training and in each step alike."""
    first = tmp_path / "first"
    save_adapter(adapted(tiny), first, LoRAConfig(rank=4, adapter_dtype="float32"), tiny)
    more = ["--adapter", str(first), "--reference-adapter", str(first), "--dropout", "0", "--max-steps", "2"]
    expected = fit(job("dpo", *more), tmp_path / "cached")
    assert expected[0]["eval_loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert abs(expected[0]["eval_kl"]) < 1e-4
    assert fit(job("dpo", *more, "--reference-each-step"), tmp_path / "each") == expected
    with pytest.raises(InputError, match="reference_adapter"):
        fit(job("dpo", "--adapter", str(first), "--dropout", "0", "--resume", "auto"), tmp_path / "cached")


def test_a_base_that_pissa_changes_is_judged_before(job: Any, tmp_path: Path) -> None:
    lines = fit(job("dpo", "--init", "pissa", "--max-steps", "2"), tmp_path / "out")
    assert abs(lines[0]["eval_margin"]) < 0.5 and len(lines) == 4
    with pytest.raises(InputError, match="--reference-each-step needs the base as it was"):
        fit(job("dpo", "--init", "pissa", "--reference-each-step"), tmp_path / "other")


def shares(tiny: str, out: Path) -> None:
    """One step and one evaluation of KTO on this process's share."""
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent process knew
    accelerator = Accelerator(cpu=True)
    model, pairs = adapted(tiny), make_pairs()
    rank, size = accelerator.process_index, accelerator.num_processes
    preferences = Preferences(LOSSES["kto"], reference_each_step=True)
    batches = make_batches([pairs[i] for i in balance_by_length(list(map(len, pairs)), size)[rank]], 2, 40, True)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    result = train_step(model, optimizer, batches, accelerator, 0.0, window_loss=preferences)
    found = preferences.evaluate(model, pairs, accelerator, budget=40)
    norms = [parameter.grad.norm().item() for parameter in lora_parameters(model) if parameter.grad is not None]
    shown = {"loss": result.loss, **result.measures, **(found or {})}
    (out / f"{rank}.json").write_text(json.dumps([list(shown.values()), norms]))


def test_two_processes_are_one(tiny: str, tmp_path: Path) -> None:
    """Loss, KL, measures, evaluation and gradients, to rounding: two processes sum in another order."""
    adapted(tiny)
    run_processes(2, shares, tiny, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    shares(tiny, tmp_path)
    for values, expected in zip(found[0], json.loads((tmp_path / "0.json").read_text()), strict=True):
        assert len(values) >= 8 and values == pytest.approx(expected, abs=1e-5, rel=1e-4)


def fit_among(out: Path, flags: list[str]) -> None:
    """`fit` in one of several processes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    fit(flags, out)


@pytest.mark.parametrize(
    ("objective", "how"),
    [("kto", "--grad-accum 1"), ("dpo", "--grad-accum 1 --shard fsdp"), ("dpo", "--tensor-parallel 2")],
)
def test_runs_of_two_processes_learn_as_one(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, how: str
) -> None:
    """Data parallel, sharded and tensor parallel: what is shown and the adapter are one process's, to rounding."""
    model = str(save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer(), **DIVISIBLE))
    flags = job(objective, "--model", model, "--adapter-dtype", "float32", "--dropout", "0")
    monkeypatch.setenv("QLORA_CACHE", new_cache(tmp_path / "cache"))
    run_processes(2, fit_among, tmp_path / "two", [*flags, *how.split()])
    monkeypatch.setenv("QLORA_CACHE", new_cache(tmp_path / "other"))
    found, expected = lines_of(tmp_path / "two"), fit(flags, tmp_path / "one")
    assert len(found) == len(expected) == 7
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        assert line == pytest.approx(other, abs=1e-4, rel=1e-3)
    tensors, others = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one"))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize(
    ("objective", "more", "words"),
    [
        ("sft", ["--beta", "0.2"], "--beta means nothing to --objective sft"),
        ("orpo", ["--reference-each-step"], "--reference-each-step means nothing to --objective orpo"),
        ("ipo", ["--label-smoothing", "0.1"], "--label-smoothing means nothing to --objective ipo"),
        ("dpo", ["--simpo-gamma", "2"], "leave it out, or pass --objective simpo"),
        ("dpo", ["--undesirable-weight", "2"], "--undesirable-weight means nothing"),
        ("dpo", ["--train-on", "last"], "--train-on means nothing to --objective dpo"),
        ("sft", ["--best-metric", "accuracy"], "--best-metric accuracy compares answers"),
        ("kto", ["--best-metric", "exact_match"], "needs right answers"),
        ("dpo", ["--reference-each-step", "--shard", "fsdp"], "needs the whole base on every device"),
        ("dpo", ["--new-tokens", "<x>"], "unknown to the reference of --objective dpo"),
        ("sft", [], "pass --objective dpo to learn from pairs"),
    ],
)
def test_what_means_nothing_is_refused(
    job: Any, tmp_path: Path, objective: str, more: list[str], words: str
) -> None:
    with pytest.raises(InputError) as error:
        fit(job(objective, *more), tmp_path / "out")
    assert words in str(error.value), error.value


def test_the_strength_is_above_zero() -> None:
    with pytest.raises(InputError, match="give --beta a number above 0"):
        PreferenceConfig(beta=0)
    assert [PreferenceConfig(objective=name).strength for name in ("dpo", "simpo")] == [0.1, 2.0]


def test_rows_are_scored_alone(tiny: str) -> None:
    """What shares the pass changes no bit of a reference."""
    model, pairs = adapted(tiny), make_pairs()
    whole = score_alone(model, pairs, ACCELERATOR, True, lambda: None)
    some = score_alone(model, pairs[3:], ACCELERATOR, True, lambda: None)
    assert whole is not None and some is not None
    assert [whole[id(pair)] for pair in pairs[3:]] == [some[id(pair)] for pair in pairs[3:]]
