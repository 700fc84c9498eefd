"""Ten steps of TRL's trainers and of ours: same start, same pairs; skipped where TRL is not installed.

TRL is no requirement of this project. With `pip install trl==1.16.0` beside it these tests run, with `-m full` on
SmolLM2-135M-Instruct too; the formulas are compared with full logits in tests/model/test_preference_loss.py in any
case.
"""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora.config.lora import LoRAConfig
from qlora.config.preferences import PreferenceConfig
from qlora.data.batches import collate_packed
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.preferences import join_pair
from qlora.lora.adapter import inject_lora, lora_layers
from qlora.lora.optimizer import build_optimizer
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.preference_loss import PreferenceLoss
from qlora.model.tokenizer import load_tokenizer
from qlora.training.preferences import Preferences
from qlora.training.step import train_step
from tests.models import save_tiny_llama, smollm2_path
from tests.tiny import tiny_tokenizer

pytest.importorskip("trl", reason="TRL is not installed")

STEPS, RANK, TOLERANCE = 10, 4, 1e-4
# Adam's first steps have the size of the rate even where a gradient is rounding alone.
RATES = {"tiny": 1e-3, "smollm2": 1e-4}
WORDS = "a bee can do every fine good hat in just kind low".split()


def texts(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(2, 8)))


def make_rows(objective: str) -> list[dict[str, Any]]:
    """Rows as TRL reads them. Its ORPO also learns the prompt, so that is the BOS token alone."""
    generator = random.Random(0)
    prompt = (lambda: "") if objective == "orpo" else (lambda: texts(generator))
    if objective == "kto":
        return [
            {"prompt": prompt(), "completion": texts(generator), "label": bool(n % 2)} for n in range(2 * STEPS)
        ]
    return [
        {"prompt": prompt(), "chosen": texts(generator), "rejected": texts(generator)} for _ in range(2 * STEPS)
    ]


def rows_of(objective: str, inputs: dict[str, Any]) -> list[Example]:
    """The rows of one of TRL's batches, as ours."""

    def part(ids: Any, length: Any, trained: Any) -> Example:
        ids, trained = ids[:length], trained[:length].bool()
        targets = torch.where(trained[1:], ids[1:], IGNORE_INDEX)
        return Example(ids[:-1].clone(), targets)

    def side(name: str, mask: str, start: str = "") -> list[Example]:
        lengths = inputs[f"{start}attention_mask"].sum(dim=1).tolist()
        return [part(*row) for row in zip(inputs[name], lengths, inputs[mask], strict=True)]

    if objective == "kto":
        pairs = zip(
            side("input_ids", "completion_mask"), side("KL_input_ids", "KL_completion_mask", "KL_"), strict=True
        )
        wanted = [bool(label) for label in inputs["label"]]
        return [join_pair(one, other, good) for (one, other), good in zip(pairs, wanted, strict=True)]
    if objective in ("dpo", "ipo"):
        both = side("input_ids", "completion_mask")
        half = len(both) // 2
        return [join_pair(*pair) for pair in zip(both[:half], both[half:], strict=True)]
    sides = []
    for name in ("chosen", "rejected"):
        masks = inputs[f"{name}_labels"] != IGNORE_INDEX
        lengths = inputs[f"{name}_attention_mask"].sum(dim=1).tolist()
        sides.append([part(*row) for row in zip(inputs[f"{name}_input_ids"], lengths, masks, strict=True)])
    return [join_pair(*pair) for pair in zip(*sides, strict=True)]


def trainer_of(
    objective: str, model: Any, tokenizer: Any, rows: list[dict[str, Any]], rate: float, out: Path
) -> Any:
    from datasets import Dataset

    own: dict[str, Any] = {"beta": PreferenceConfig(objective=objective).strength}  # type: ignore[arg-type]
    if objective in ("dpo", "ipo"):
        from trl import DPOConfig as Config
        from trl import DPOTrainer as Kind

        own["loss_type"] = "ipo" if objective == "ipo" else "sigmoid"
    elif objective == "kto":
        from trl import KTOConfig as Config
        from trl import KTOTrainer as Kind
    elif objective == "orpo":
        from trl.experimental.orpo import ORPOConfig as Config
        from trl.experimental.orpo import ORPOTrainer as Kind
    else:
        from trl.experimental.cpo import CPOConfig as Config
        from trl.experimental.cpo import CPOTrainer as Kind

        own |= {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.0}
    settings = Config(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=rate, max_grad_norm=0.0,
        lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True, optim="adamw_torch", bf16=False,
        gradient_checkpointing=False, save_strategy="no", max_length=200, **own,
    )  # fmt: skip
    return Kind(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)


def dense_model(which: str, path: Path) -> Any:
    """Save a model whose weights are bf16 values, as a base that is not quantized is held; its tokenizer."""
    from transformers import AutoModelForCausalLM, GgufConfig

    if which == "tiny":
        tokenizer, source, where = tiny_tokenizer(), save_tiny_llama(path, tokenizer=tiny_tokenizer()), {}
    else:
        tokenizer, file = load_tokenizer(str(smollm2_path())), smollm2_path()
        source, where = file.parent, {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **where)
    model.bfloat16().float().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


@pytest.mark.parametrize("which", ["tiny", pytest.param("smollm2", marks=pytest.mark.full)])
@pytest.mark.parametrize("objective", ["dpo", "ipo", "orpo", "simpo", "kto"])
def test_ten_steps_are_trl_s(objective: str, which: str, tmp_path: Path) -> None:
    """Losses, rewards and gradients within 1e-4 (relative above 1), in fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, TrainerCallback

    warnings.simplefilter("ignore")
    path = str(tmp_path / which)
    tokenizer = dense_model(which, Path(path))
    ours = load_base_model(path, use_4bit=False, compute_dtype="float32", cache=False).float()
    inject_lora(
        ours, LoRAConfig(rank=RANK, alpha=16, target_modules=["q_proj", "v_proj"], adapter_dtype="float32")
    )
    freeze_base(ours)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    )
    names = list(lora_layers(ours))
    for name in names:
        own, other = lora_layers(ours)[name].weights, theirs.get_submodule(f"base_model.model.{name}")
        other.lora_A["default"].weight.data.copy_(own.lora_A.data.view(RANK, -1))

    trainer = trainer_of(objective, theirs, tokenizer, make_rows(objective), RATES[which], tmp_path / "trl")
    batches: list[dict[str, Any]] = []
    losses: list[float] = []
    rewards: list[dict[str, float]] = []
    gradients: list[list[torch.Tensor]] = []
    compute = trainer.compute_loss

    def watched(model: Any, inputs: Any, *more: Any, **options: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        loss = compute(model, inputs, *more, **options)
        losses.append(float(loss.detach()))
        kept = trainer._stored_metrics["train"] if objective in ("orpo", "simpo") else trainer._metrics["train"]
        rewards.append(
            {side: kept[f"rewards/{side}"][-1] for side in ("chosen", "rejected") if kept[f"rewards/{side}"]}
        )
        return loss

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *arguments: Any, **options: Any) -> None:
            layers = [theirs.get_submodule(f"base_model.model.{name}") for name in names]
            gradients.append(
                [
                    getattr(layer, part)["default"].weight.grad.clone()
                    for layer in layers
                    for part in ("lora_A", "lora_B")
                ]
            )

    trainer.compute_loss = watched
    trainer.add_callback(Watch())
    trainer.train()
    assert len(losses) == len(gradients) == STEPS

    config = PreferenceConfig(objective=objective)  # type: ignore[arg-type]
    maths = PreferenceLoss(objective, **config.constants())
    preferences = Preferences(maths, reference_each_step=maths.needs_reference)
    optimizer = build_optimizer(lora_parameters(ours.train()), "adamw")
    gaps = {"loss": 0.0, "reward": 0.0, "gradient": 0.0}  # the largest, relative above 1
    for number, inputs in enumerate(batches):
        rows = rows_of(objective, inputs)
        assert len(rows) == 2
        result = train_step(
            ours, optimizer, [collate_packed(rows)], Accelerator(cpu=True), RATES[which], window_loss=preferences
        )
        pairs = {"loss": [(result.loss, losses[number])]}
        pairs["reward"] = [(result.measures[f"reward_{side}"], r) for side, r in rewards[number].items()]
        weights = [layer.weights for layer in lora_layers(ours).values()]
        found = [parameter.grad for own in weights for parameter in (own.lora_A, own.lora_B)]
        largest = max(gradient.abs().max().item() for gradient in gradients[number])
        assert largest > 1e-3 and len(found) == len(gradients[number])
        for gradient, other in zip(found, gradients[number], strict=True):
            assert gradient is not None
            gap = (gradient.view_as(other) - other).abs().max().item() / max(1.0, largest)
            gaps["gradient"] = max(gaps["gradient"], gap)
        for kind, values in pairs.items():
            gaps[kind] = max([gaps[kind], *(abs(a - b) / max(1.0, abs(b)) for a, b in values)])
    print(f"{objective}, {which}: {gaps}")
    assert max(gaps.values()) < TOLERANCE, gaps
