"""The loop: token normalization, evaluation without a trace, exact resume, and stopping with a reason."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora.config.lora import LoRAConfig
from qlora.data import batches as packing
from qlora.data.batches import make_batches
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.order import WindowOrder
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.optimizer import build_optimizer
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.block import decoder_layers
from qlora.model.load import load_base_model
from qlora.model.loss import CHUNK_SIZE
from qlora.system.errors import StoppedOnRequest, TrainingStopped
from qlora.training import held_out as held_out_module
from qlora.training import loop as trainer
from qlora.training import recompute
from qlora.training import step as step_module
from qlora.training.held_out import HeldOut, evaluate
from qlora.training.loop import Limits, Trainer, TrainingData
from qlora.training.observer import Observer, Stop
from qlora.training.progress import Progress
from qlora.training.recompute import choose_recomputed_layers
from qlora.training.samples import Samples
from qlora.training.saver import Saver
from qlora.training.schedule import build_schedule
from qlora.training.step import train_step
from tests.models import save_tiny_llama
from tests.shortcuts import plan_memory

FP32 = "float32"
TIMING = ("tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def make_examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Random rows of 4 to 40 tokens whose first third is masked."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        length = int(torch.randint(4, 41, (), generator=generator))
        ids = torch.randint(5, 300, (length + 1,), generator=generator)
        targets = ids[1:].clone()
        targets[: length // 3] = IGNORE_INDEX
        examples.append(Example(ids[:-1], targets))
    return examples


def adapted(tiny: str, dtype: str = "float32", dropout: float = 0.0, compute: str = FP32) -> Any:
    model = load_base_model(tiny, compute_dtype=compute, cache=False)
    inject_lora(model, LoRAConfig(rank=4, dropout=dropout, adapter_dtype=dtype), seed=1)  # type: ignore[arg-type]
    freeze_base(model)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():  # a B of zeros would leave A without a real gradient
        layer.weights.lora_B.data.copy_(torch.randn(layer.weights.lora_B.shape, generator=generator) * 0.05)
    return model.train()


class Log(Observer):
    """Gives each line of metrics to a function."""

    def __init__(self, take: Callable[[dict[str, Any]], object]) -> None:
        self.take = take

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.take(line)

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.take(line)


def run(model: Any, examples: list[Example], steps: int, **options: Any) -> list[dict[str, Any]]:
    """Train `steps` steps, watched as a run is, and return the lines of metrics; options go to their namesakes."""
    lines: list[dict[str, Any]] = []
    take, o = options.pop, options
    optimizer = take("optimizer", None) or build_optimizer(lora_parameters(model), "adamw")
    schedule = build_schedule("cosine", 1e-2, 2, take("schedule_steps", take("total_steps", steps)))
    progress, stop = take("progress", None) or Progress(), take("stop", lambda: None)
    names = ("batch_size", "grad_accum", "max_length", "packing", "seed")
    of_data = {"batch_size": 4, "grad_accum": 1, "max_length": 64, "seed": 3} | {
        n: take(n) for n in names if n in o
    }
    data = TrainingData(examples, held_out=take("eval_examples", ()), **of_data)
    limits = Limits(steps, take("max_grad_norm", 1.0), take("max_skipped", 0), take("skipped_dir", None))
    judged = {name: take(name) for name in ("score", "patience", "min_delta") if name in o}
    observers: list[Observer] = [HeldOut(take("eval_every", 0), **judged, stop=stop), Stop(stop)]
    if "sample" in o:
        observers.append(Samples(take("sample"), take("sample_every", 0)))
    if "save" in o:
        observers.append(Saver(take("save"), progress, take("save_every", 0), take("keep_best", False)))
    observers.append(Log(take("log", lines.append)))
    trainer = Trainer(model, optimizer, schedule, data, Accelerator(), limits, observers, take("say", print))
    assert not options, options
    trainer.fit(progress)
    return lines


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def test_a_trained_model_takes_any_optimizer(tiny: str) -> None:
    """After a run, gradients are again what torch's AdamW expects of a bf16 parameter."""
    model = adapted(tiny, "bfloat16")
    run(model, make_examples(4), 1)
    assert {p.dtype for p in lora_parameters(model)} == {torch.bfloat16}
    model(make_examples(1)[0].input_ids[None]).logits.sum().backward()
    before = [p.detach().clone() for p in lora_parameters(model)]
    torch.optim.AdamW(lora_parameters(model), lr=0.1).step()
    assert not any(torch.equal(p, b) for p, b in zip(lora_parameters(model), before, strict=True))


@pytest.mark.parametrize(("batch_size", "max_length"), [(8, 41), (4, 41), (2, 41), (1, 41)])
def test_the_gradient_does_not_depend_on_how_a_window_is_cut(tiny: str, batch_size: int, max_length: int) -> None:
    """1 x 8 = 2 x 4 = 8 x 1: equal to a plain mean over all target tokens of unpacked rows, to fp32 rounding."""
    examples = make_examples(8)
    model = adapted(tiny)
    total, count = torch.zeros(()), 0
    for example in examples:  # the slow reference: one row at a time, full logits
        logits = model(example.input_ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, example.targets, reduction="sum")
        total, count = total + loss, count + int((example.targets != IGNORE_INDEX).sum())
    (total / count).backward()
    expected = [p.grad.clone() for p in lora_parameters(model)]
    assert all(g.abs().max() > 0 for g in expected)

    model = adapted(tiny)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    batches = make_batches(examples, batch_size, max_length, packing=True)
    assert len(batches) > 1 or batch_size == 8
    result = train_step(model, optimizer, batches, Accelerator(), 0.0)
    assert result.loss == pytest.approx((total / count).item(), rel=1e-5)
    assert result.num_targets == count and result.largest_micro_batch is None
    assert result.grad_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in expected)), rel=1e-4)
    for parameter, gradient in zip(lora_parameters(model), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_packing_off_gives_the_same_losses(tiny: str) -> None:
    packed = losses(run(adapted(tiny), make_examples(), 4))
    padded = losses(run(adapted(tiny), make_examples(), 4, packing=False))
    assert packed == pytest.approx(padded, rel=1e-4)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_evaluation_leaves_training_as_it_was(tiny: str, compute: str) -> None:
    """TRAPS 1: bitsandbytes repacks weights when a layer evaluates; here losses agree to the last digit."""
    examples, held_out = make_examples(), make_examples(5, seed=9)
    plain = run(adapted(tiny, dropout=0.1, compute=compute), examples, 6)
    evaluated = run(adapted(tiny, dropout=0.1, compute=compute), examples, 6, eval_examples=held_out, eval_every=2)
    assert losses(evaluated) == losses(plain) and len(losses(plain)) == 6
    seen = [line["eval_loss"] for line in evaluated if "eval_loss" in line]
    assert (
        len(seen) == 4 and len(set(seen)) == 4
    )  # before, and after steps 2, 4 and 6: it learns, it is not frozen


def test_evaluate_is_the_mean_over_target_tokens(tiny: str) -> None:
    model, examples = adapted(tiny), make_examples(5)
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logits = model(example.input_ids[None]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, example.targets, reduction="sum"))
            count += example.num_targets
    assert evaluate(model, examples, Accelerator(), budget=64) == pytest.approx(total / count, rel=1e-5)
    assert model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_equals_one_never_stopped(tiny: str, dtype: str) -> None:
    """Across an epoch's end (12 examples, windows of 4), with dropout: bit for bit."""
    examples = make_examples()
    whole = adapted(tiny, dtype, dropout=0.2)
    expected = losses(run(whole, examples, 7))

    first = adapted(tiny, dtype, dropout=0.2)
    optimizer = build_optimizer(lora_parameters(first), "adamw")
    before = losses(run(first, examples, 4, optimizer=optimizer, schedule_steps=7))
    stored = {k: v.clone() for k, v in optimizer.state_tensors().items()}
    adapter = {k: v.clone() for k, v in lora_state_dict(first).items()}

    second = adapted(tiny, dtype, dropout=0.2)
    for key, tensor in lora_state_dict(second).items():
        tensor.copy_(adapter[key])
    optimizer = build_optimizer(lora_parameters(second), "adamw")
    optimizer.load_state_tensors(stored)
    torch.rand(100)  # whatever happened to the global generator in between
    after = losses(run(second, examples, 7, optimizer=optimizer, progress=Progress(step=4)))
    assert before + after == expected
    for key, tensor in lora_state_dict(whole).items():
        assert torch.equal(tensor, lora_state_dict(second)[key])


@pytest.mark.parametrize("recomputed", [1, 2])
def test_checkpointing_changes_no_number(tiny: str, recomputed: int) -> None:
    """All layers or the lowest alone; those that are recomputed are counted by the calls of their gate_proj."""
    plain = losses(run(adapted(tiny, dropout=0.1), make_examples(), 4))
    model, calls = adapted(tiny, dropout=0.1), [0, 0]
    budget = plan_memory(model, 256, torch.float32, recomputed, CHUNK_SIZE).total
    mode = "on" if recomputed == 2 else "auto"
    assert choose_recomputed_layers(model, mode, 256, budget, say=lambda line: None)[0] == recomputed / 2
    for number, layer in enumerate(decoder_layers(model)):
        assert layer.gradient_checkpointing == (number < recomputed)
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _m, _a, n=number: calls.__setitem__(n, calls[n] + 1))
    assert losses(run(model, make_examples(), 4)) == pytest.approx(plain, rel=1e-5)
    assert calls == [8 if number < recomputed else 4 for number in range(2)]


@pytest.mark.parametrize("others_free", [2**40, 0])
def test_processes_agree_on_what_to_recompute(
    tiny: str, others_free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plenty of memory here, shared by two on a CPU; the process that has least decides for all."""
    asked: list[int] = []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        asked.append(int(mine))
        return torch.cat([mine, torch.tensor([others_free])])

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(recompute, "available_memory", lambda device: 2**40)
    two: Any = SimpleNamespace(process_index=0, num_processes=2, device=torch.device("cpu"), gather=gather)
    share, _ = choose_recomputed_layers(adapted(tiny), "auto", 256, accelerator=two, say=lambda line: None)
    assert share == (0 if others_free else 1) and asked == [2**39]


def test_the_memory_is_that_of_the_device_that_computes(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --cpu-offload the base is in main memory, which was asked for its free bytes in the GPU's place."""
    asked: list[torch.device] = []

    def available_memory(device: torch.device) -> int:
        asked.append(device)
        return 2**40

    monkeypatch.setattr(recompute, "available_memory", available_memory)
    one: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda"))
    choose_recomputed_layers(adapted(tiny), "auto", 256, accelerator=one, say=lambda line: None)
    assert asked == [torch.device("cuda")]


def test_what_is_said_of_the_memory(tiny: str) -> None:
    model, said = adapted(tiny), []
    plans = [plan_memory(model, 256, torch.float32, number, CHUNK_SIZE) for number in range(3)]
    choose_recomputed_layers(model, "auto", 256, plans[1].total, say=said.append)
    assert "1 of 2 layers are recomputed in the backward pass (keeping all would take" in said[0]
    assert said[0].endswith("--memory-budget)") and said[1] == f"{plans[1]} at 256 tokens a micro-batch"
    choose_recomputed_layers(adapted(tiny), "auto", 256, 1, say=said.append)
    assert "2 of 2 layers" in said[2] and said[3].endswith("; more than that, so it may not fit")
    choose_recomputed_layers(adapted(tiny), "off", 256, 1, say=said.append)
    assert said[4] == (
        "computing in float32; 0 of 2 layers are recomputed in the backward pass (--gradient-checkpointing off)"
    )
    assert said[5] == f"{plans[0]} at 256 tokens a micro-batch"


def test_a_cpu_cuts_a_window_into_short_micro_batches(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the tokens ask for, in training and in evaluation; no loss changes but by rounding."""
    sizes: list[int] = []
    whole_loss = step_module.causal_lm_loss

    def causal_lm_loss(model: Any, batch: Any) -> Any:
        sizes.append(batch.num_tokens)
        return whole_loss(model, batch)

    options: dict[str, Any] = dict(eval_examples=make_examples(5, seed=9), eval_every=4)
    expected = run(adapted(tiny), make_examples(), 4, **options)
    for module in (step_module, held_out_module):
        monkeypatch.setattr(module, "causal_lm_loss", causal_lm_loss)
    monkeypatch.setattr(packing, "CPU_TOKENS", 32)
    lines = run(adapted(tiny), make_examples(), 4, **options)
    assert losses(lines) == pytest.approx(losses(expected), rel=1e-5)
    held_out = [[line["eval_loss"] for line in side if "eval_loss" in line] for side in (lines, expected)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-5) and len(held_out[0]) == 2
    tokens = [line["num_tokens"] for line in lines if "loss" in line]
    held = sum(len(e) for e in make_examples(5, seed=9))
    assert len(sizes) == sum(-(-count // 32) for count in (*tokens, held, held)) > 6


def test_the_last_partial_window_counts(tiny: str) -> None:
    """10 examples in windows of 4 are 3 steps an epoch; the third sees 2 examples."""
    examples = make_examples(10)
    lines = run(adapted(tiny), examples, 3)
    assert sum(line["num_tokens"] for line in lines) == sum(len(e) for e in examples)
    assert sum(line["target_tokens"] for line in lines) == sum(e.num_targets for e in examples)


def test_clipping_bounds_the_update(tiny: str) -> None:
    model, examples = adapted(tiny), make_examples(4)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    batches = make_batches(examples, 4, 64, packing=True)
    norm = train_step(model, optimizer, batches, Accelerator(), 1e-3, max_grad_norm=0.01).grad_norm
    clipped = math.sqrt(sum(float(p.grad.square().sum()) for p in lora_parameters(model)))
    assert norm > 0.02 and clipped == pytest.approx(0.01, rel=1e-4)


def test_a_step_that_learns_lowers_the_loss(tiny: str) -> None:
    lines = run(adapted(tiny), make_examples(4), 12)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    fields = "step loss grad_norm learning_rate num_tokens target_tokens tokens_per_second peak_memory_gib"
    assert list(lines[0]) == fields.split()


def test_a_non_finite_loss_stops_and_saves_the_state_before(tiny: str, tmp_path: Path) -> None:
    """The weights are poisoned after step 2: step 3 must stop, name itself, and change nothing."""
    model, saved = adapted(tiny), []
    good: dict[str, torch.Tensor] = {}

    def poison(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            good.update({k: v.clone() for k, v in lora_state_dict(model).items()})
            model.model.norm.weight.data.fill_(float("nan"))

    with pytest.raises(TrainingStopped, match=r"step 3: loss nan.*micro-batch 1 of 1.*kept/step-000003") as caught:
        run(
            model, make_examples(), 6, log=poison, save=lambda progress: saved.append(progress.step),
            skipped_dir=tmp_path / "kept",
        )  # fmt: skip
    assert saved == [2]
    assert "the state before it is saved" in str(caught.value)
    assert all(torch.equal(good[k], v) for k, v in lora_state_dict(model).items())


def test_an_adapter_without_gradient_stops_the_run(tiny: str) -> None:
    model = adapted(tiny)
    lost = model.model.layers[1].self_attn.v_proj
    lost.register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(TrainingStopped, match=r"no gradient: model\.layers\.1\.self_attn\.v_proj;"):
        run(model, make_examples(), 2)


def test_training_while_merged_is_an_error(tiny: str) -> None:
    model = adapted(tiny)
    for layer in lora_layers(model).values():
        layer.merge()
    with pytest.raises(RuntimeError, match="unmerge first"):
        run(model, make_examples(), 1)


# ---- what may go wrong in a step --------------------------------------------------------------------------


def poisoned_examples() -> tuple[list[Example], Any, int]:
    """Twelve rows, one of which holds token 299; what makes that token's embedding NaN; and the row's number."""
    examples, number = make_examples(), 6
    for example in examples:
        example.input_ids[example.input_ids == 299] = 298
    examples[number].input_ids[0] = 299

    def poison(model: Any) -> Any:
        with torch.no_grad():
            model.get_input_embeddings().weight[299] = float("nan")
        return model

    return examples, poison, number


def test_a_non_finite_step_is_skipped_and_its_batch_kept(tiny: str, tmp_path: Path) -> None:
    """The other steps go on as in a loop, written out here, that leaves the poisoned window out."""
    examples, poison, number = poisoned_examples()
    order = WindowOrder(12, 4, seed=3)
    bad = [step for step in range(6) if number in order.window(step)]
    assert len(bad) == 2  # once an epoch

    expected = poison(adapted(tiny))
    optimizer = build_optimizer(lora_parameters(expected), "adamw")
    for parameter in lora_parameters(expected):
        parameter.grad_dtype = torch.float32
    schedule = build_schedule("cosine", 1e-2, 2, 6)
    for step in range(6):
        if step not in bad:
            batches = make_batches([examples[i] for i in order.window(step)], 4, 64, packing=True)
            optimizer.zero_grad()
            train_step(expected, optimizer, batches, Accelerator(), schedule(step), max_grad_norm=1.0)

    model, said, progress = poison(adapted(tiny)), [], Progress()
    lines = run(
        model, examples, 6, max_skipped=2, progress=progress, say=said.append, skipped_dir=tmp_path / "there"
    )
    kept = {
        path.name: [json.loads(row)["input_ids"] for row in path.read_text().splitlines()]
        for path in (tmp_path / "there").iterdir()
    }
    assert kept == {
        f"step-{step + 1:06d}.jsonl": [examples[i].input_ids.tolist() for i in order.window(step)] for step in bad
    }
    assert progress == Progress(step=6, skipped=2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] - 1 for line in lines if line["loss"] is None] == bad
    assert "skipped (1 of at most 2): loss nan" in said[0] and f"{tmp_path}/there/step-" in said[0]
    for key, tensor in lora_state_dict(expected).items():
        assert torch.equal(tensor, lora_state_dict(model)[key])


def test_one_non_finite_step_too_many_stops_the_run(tiny: str) -> None:
    examples, poison, _ = poisoned_examples()
    saved: list[Progress] = []
    with pytest.raises(TrainingStopped, match=r"loss nan.*1 such steps were skipped before"):
        run(
            poison(adapted(tiny)), examples, 6, max_skipped=1, say=lambda line: None,
            save=lambda progress: saved.append(Progress(**vars(progress))),
        )  # fmt: skip
    assert len(saved) == 1 and saved[0].skipped == 1


def test_a_held_out_loss_that_is_no_number_stops_the_run(tiny: str) -> None:
    examples, poison, number = poisoned_examples()
    saved: list[Progress] = []
    with pytest.raises(TrainingStopped, match="step 3: the held-out loss is nan; look at the held-out data"):
        run(
            poison(adapted(tiny)), [e for e in examples if e is not examples[number]], 4, eval_every=2,
            eval_examples=[examples[number]], progress=Progress(1), save=lambda p: saved.append(Progress(p.step)),
        )  # fmt: skip
    assert saved == [Progress(2)]


def limit_memory(monkeypatch: pytest.MonkeyPatch, limit: int, error: Exception) -> list[int]:
    """Micro-batches of more than `limit` tokens fail in the backward pass as if memory ran out."""
    refused: list[int] = []
    whole_loss = step_module.causal_lm_loss

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
            return loss.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            raise error

    def causal_lm_loss(model: Any, batch: Any) -> Any:
        loss, count = whole_loss(model, batch)
        if batch.input_ids.numel() <= limit:
            return loss, count
        refused.append(batch.input_ids.numel())
        if not loss.requires_grad:
            raise error
        return Fails.apply(loss), count

    for module in (step_module, held_out_module):
        monkeypatch.setattr(module, "causal_lm_loss", causal_lm_loss)
    return refused


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 512 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_repeats_the_step_in_smaller_micro_batches(
    tiny: str, monkeypatch: pytest.MonkeyPatch, packing: bool, error: Exception
) -> None:
    """Two micro-batches a step, the second too large: the first one's gradient must not count twice."""
    examples, held_out = make_examples(), make_examples(7, seed=9)
    options: dict[str, Any] = dict(
        packing=packing, eval_examples=held_out, eval_every=3, grad_accum=2, batch_size=2
    )
    expected_model, model, said = adapted(tiny), adapted(tiny), []
    expected = run(expected_model, examples, 6, **options)
    refused = limit_memory(monkeypatch, 45, error)
    lines = run(model, examples, 6, say=said.append, **options)
    assert 1 <= len(said) < 6 and "the step is repeated as" in said[0]
    assert len(refused) >= 2
    assert losses(lines) == pytest.approx(losses(expected), rel=1e-4) and len(losses(lines)) == 6
    assert [x["eval_loss"] for x in lines if "eval_loss" in x] == pytest.approx(
        [x["eval_loss"] for x in expected if "eval_loss" in x], rel=1e-4
    )
    for key, tensor in lora_state_dict(expected_model).items():
        torch.testing.assert_close(lora_state_dict(model)[key], tensor, rtol=1e-3, atol=1e-3)
    count = len(refused)
    again = run(adapted(tiny), examples, 2, say=said.append, **(options | {"eval_every": 0}))
    assert len(again) == 2 and len(refused) - count <= 2  # what does not fit is not tried at every step


def test_an_example_that_does_not_fit_alone_stops_the_run(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 10, MemoryError())
    saved: list[int] = []
    with pytest.raises(TrainingStopped, match="one example does not fit in memory; lower --max-length"):
        run(adapted(tiny), make_examples(), 6, say=lambda line: None, save=lambda p: saved.append(p.step))
    with pytest.raises(TrainingStopped, match="held-out example does not fit"):
        run(adapted(tiny), make_examples(), 6, eval_examples=make_examples(3, seed=9), eval_every=1)


def test_another_error_in_a_step_is_raised_as_it_is(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_memory(monkeypatch, 10, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run(adapted(tiny), make_examples(), 6)


# ---- stopping on request ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked_after", range(1, 16))
def test_a_run_stopped_on_request_goes_on_where_it_was(tiny: str, asked_after: int) -> None:
    """The request comes at the n-th time of asking, in evaluations or between steps: no line is lost or twice."""
    examples, held_out = make_examples(), make_examples(7, seed=9)
    options: dict[str, Any] = dict(eval_examples=held_out, eval_every=2, batch_size=2, total_steps=5)
    whole = adapted(tiny, dropout=0.2)
    expected = run(whole, examples, 5, **{**options, "max_length": 41})

    model, asked, saved = adapted(tiny, dropout=0.2), [], []
    optimizer = build_optimizer(lora_parameters(model), "adamw")

    def stop() -> str | None:
        asked.append(1)
        return "SIGTERM" if len(asked) >= asked_after else None

    lines: list[dict[str, Any]] = []
    progress = Progress()
    common: dict[str, Any] = {**options, "max_length": 41, "optimizer": optimizer, "progress": progress}
    with pytest.raises(StoppedOnRequest, match="SIGTERM"):
        run(model, examples, 5, stop=stop, log=lines.append, save=lambda p: saved.append(p.step), **common)
    assert saved in ([progress.step], [])  # nothing to save before the first evaluation and step
    assert saved or progress == Progress()
    run(model, examples, 5, log=lines.append, **common)
    plain = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
    assert plain == [{k: v for k, v in line.items() if k not in TIMING} for line in expected]
    for key, tensor in lora_state_dict(whole).items():
        assert torch.equal(tensor, lora_state_dict(model)[key])


@pytest.mark.parametrize("asked_after", [1, 2, 3, 5, 8, 13])
def test_scores_and_samples_are_neither_lost_nor_doubled_by_a_request(tiny: str, asked_after: int) -> None:
    """The request comes at the n-th time of asking, between steps, in evaluations or while scoring."""
    examples, held_out = make_examples(), make_examples(7, seed=9)

    def train(model: Any, stop: Any, lines: list[Any], sampled: list[int], progress: Progress) -> None:
        def score(stop: Any) -> float | None:
            return None if stop() else 0.5

        run(
            model, examples, 5, eval_examples=held_out, eval_every=2, sample=sampled.append, sample_every=3,
            score=score, patience=9, stop=stop, log=lines.append, progress=progress, optimizer=optimizers[model],
        )  # fmt: skip

    whole, model, expected, expected_samples = adapted(tiny), adapted(tiny), [], []
    optimizers = {m: build_optimizer(lora_parameters(m), "adamw") for m in (whole, model)}
    train(whole, lambda: None, expected, expected_samples, Progress())
    assert expected_samples == [0, 3, 5]
    assert [x["step"] for x in expected if "eval_loss" in x] == [0, 2, 4, 5]

    asked, lines, sampled, progress = [], [], [], Progress()

    def stop() -> str | None:
        asked.append(1)
        return "SIGTERM" if len(asked) >= asked_after else None

    with pytest.raises(StoppedOnRequest):
        train(model, stop, lines, sampled, progress)
    train(model, lambda: None, lines, sampled, progress)
    assert sampled == expected_samples
    plain, wanted = ([{k: v for k, v in x.items() if k not in TIMING} for x in side] for side in (lines, expected))
    assert plain == wanted


def test_a_request_after_the_last_step_changes_nothing(tiny: str) -> None:
    lines: list[dict[str, Any]] = []
    run(adapted(tiny), make_examples(), 2, log=lines.append, stop=lambda: "SIGTERM" if len(lines) == 2 else None)
    assert len(lines) == 2


def test_what_is_saved_and_when(tiny: str) -> None:
    """Every 3 steps, after an evaluation better than all before it, and at the end; each state once."""
    saved: list[tuple[int, float | None]] = []
    lines = run(
        adapted(tiny), make_examples(), 8, save_every=3, eval_every=2, eval_examples=make_examples(5, seed=9),
        save=lambda p: saved.append((p.step, p.eval_loss)),
    )  # fmt: skip
    evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = [s for s in evaluations if s and evaluations[s] < min(v for k, v in evaluations.items() if k < s)]
    assert best
    assert saved == [(s, evaluations.get(s)) for s in sorted({3, 6, 8, *best})]


def test_a_state_that_is_saved_already_is_not_saved_again(tiny: str) -> None:
    saved: list[Progress] = []
    with pytest.raises(StoppedOnRequest):
        run(adapted(tiny), make_examples(), 8, progress=Progress(4), save=saved.append, stop=lambda: "SIGINT")
    assert saved == []


# ---- evaluations that judge -------------------------------------------------------------------------------


def evaluated(monkeypatch: pytest.MonkeyPatch, results: dict[int, float], steps: list[int]) -> None:
    """Evaluations find these held-out losses; `steps` receives when."""

    def evaluate(*arguments: Any) -> float:
        steps.append(len(steps))
        return results[len(steps) - 1]

    monkeypatch.setattr(trainer, "evaluate", evaluate)


def judged(
    tiny: str, total: int = 8, progress: Progress | None = None, **options: Any
) -> tuple[list[Any], list[str]]:
    """Lines and words of a run that evaluates after each step."""
    said: list[str] = []
    lines = run(
        adapted(tiny), make_examples(), total, eval_every=1, eval_examples=make_examples(2), say=said.append,
        progress=progress, **options,
    )  # fmt: skip
    return lines, said


@pytest.mark.parametrize(
    ("patience", "min_delta", "last"), [(2, 0.0, 5), (3, 0.0, 8), (1, 0.0, 2), (2, 0.25, 3), (0, 9.0, 8)]
)
def test_early_stopping_ends_the_run_as_if_it_were_done(
    tiny: str, monkeypatch: pytest.MonkeyPatch, patience: int, min_delta: float, last: int
) -> None:
    """Against counting by hand. The last state is saved, said and in the metrics; with 0 it never comes."""
    values = [3.0, 2.0, 2.125, 1.875, 1.875, 2.0, 1.5, 1.5, 1.4]  # of steps 0 to 8; all exact in binary
    evaluated(monkeypatch, dict(enumerate(values)), [])
    saved: list[Progress] = []
    progress = Progress()
    lines, said = judged(
        tiny, patience=patience, min_delta=min_delta, progress=progress, save=lambda p: saved.append(replace(p))
    )
    best, stale, ended = math.inf, 0, 8
    for step, value in enumerate(values):  # the slow reference
        best, stale = (value, 0) if value < best - min_delta else (best, stale + 1)
        if 0 < patience <= stale:
            ended = min(ended, step)
    assert ended == last == progress.step
    assert saved[-1] == progress and saved[-1].best_loss == min(values[: last + 1])
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == list(range(last + 1))
    is_early = last < 8
    assert [line.get("stopped_early", False) for line in evaluations] == [False] * last + [is_early]
    expected = f"stopped early after step {last} of 8; evaluations in a row that were no better: {patience}"
    assert [text.partition(" (--")[0] for text in said] == [expected] * is_early


def test_a_resumed_run_goes_on_counting_and_an_ended_one_ends_again(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluations were no better before the kill, so one more is enough."""
    steps: list[int] = []
    evaluated(monkeypatch, {0: 5.0}, steps)
    saved: list[Progress] = []
    progress = Progress(4, eval_loss=2.5, best_loss=2.0, reference=-2.0, stale=2)
    _, said = judged(tiny, patience=3, progress=progress, save=lambda p: saved.append(replace(p)))
    assert progress.step == 5 and progress.stale == 3 and len(said) == 1
    assert [p.step for p in saved] == [5]

    again, said = judged(tiny, patience=3, progress=replace(progress), save=saved.append)
    assert again == [] and len(saved) == 1 and said[0].startswith("stopped early after step 5 of 8")
    evaluated(monkeypatch, dict.fromkeys(range(9), 1.0), [])
    further, said = judged(tiny, patience=4, progress=replace(progress))
    assert [line["step"] for line in further if "loss" in line] == [6, 7, 8] and said == []


def test_patience_that_runs_out_at_the_last_step_is_an_ordinary_end(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(monkeypatch, dict.fromkeys(range(9), 1.0), [])
    lines, said = judged(tiny, total=3, patience=3)
    assert said == [] and not any("stopped_early" in line for line in lines)


@pytest.mark.parametrize(("keep_best", "expected"), [(True, [1, 2, 4, 6]), (False, [6])])
def test_the_best_state_is_saved_by_its_score(
    tiny: str, monkeypatch: pytest.MonkeyPatch, keep_best: bool, expected: list[int]
) -> None:
    """Higher scores first, lower losses between equal ones; between times of saving only if that is asked for."""
    evaluated(monkeypatch, dict(enumerate([9.0, 3.0, 4.0, 2.0, 1.0, 0.5, 0.5])), [])
    scores = [0.0, 0.5, 0.75, 0.5, 0.75, 0.25, 0.75]
    left, saved = iter(scores), []
    lines, _ = judged(
        tiny, total=6, keep_best=keep_best, score=lambda stop: next(left),
        save=lambda p: saved.append((p.step, p.score, p.best_loss)),
    )  # fmt: skip
    assert [step for step, _, _ in saved] == expected and saved[-1] == (6, 0.75, 0.5)
    assert [line["exact_match"] for line in lines if "eval_loss" in line] == scores


@pytest.mark.parametrize(
    ("every", "eval_every", "expected"),
    [(0, 0, []), (0, 3, [0, 3, 6, 7]), (2, 0, [2, 4, 6, 7]), (2, 3, [0, 2, 4, 6, 7]), (9, 0, [7]), (7, 0, [7])],
)
def test_when_samples_are_taken(tiny: str, every: int, eval_every: int, expected: list[int]) -> None:
    sampled: list[int] = []
    options: dict[str, Any] = dict(eval_every=eval_every, eval_examples=make_examples(2, seed=9))
    run(adapted(tiny), make_examples(), 7, sample=sampled.append, sample_every=every, **options)
    assert sampled == expected
