"""LoRA on the output head: values, gradients, PEFT, files and merges; tied and untied."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import save_adapter
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.data.example import IGNORE_INDEX, Example
from qlora.export.merge import merge_adapter
from qlora.lora.adapter import activate, active_adapter, inject_lora
from qlora.lora.targets import match_targets
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model, plan_base_model
from qlora.model.loss import causal_lm_loss, output_head, target_log_likelihoods
from qlora.planning.memory import plan_recomputing
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks
from tests.lora.test_full_parameters import (
    FP32_TOLERANCE,
    NUM_TOKENS,
    adapted,
    base,
    batch_of,
    dense_twin,
    logits,
    peft_load,
    plain_loss,
    rows,
)
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

KINDS = pytest.mark.parametrize("kind", ["untied", "tied"])
HEAD = {"target_modules": "q_proj,lm_head"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    settings = {"untied": {}, "tied": {"tie_word_embeddings": True}, "padded": {"vocab_size": NUM_TOKENS + 3}}
    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "intermediate_size": 128, "vocab_size": NUM_TOKENS}
    return {name: save_tiny_llama(folder / name, **{**common, **own}) for name, own in settings.items()}


@KINDS
def test_all_linear_leaves_the_head_out(bases: dict[str, Path], kind: str) -> None:
    model = base(bases[kind])
    assert "lm_head" not in match_targets(model, ["all-linear"])
    assert list(match_targets(model, ["lm_head"])) == ["lm_head"]
    with pytest.raises(InputError, match=r"\['lm_head'\] are outside of the decoder layers"):
        match_targets(model, ["q_proj", "lm_head"], numbers=[0])


@KINDS
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_adalora": True}], ids=str)
def test_loss_and_gradients_equal_autograd_s(bases: dict[str, Path], kind: str, settings: dict[str, Any]) -> None:
    """In chunks of positions, against autograd over the full logits of the same network."""
    model = adapted(bases[kind], **HEAD, **settings).train()
    parameters = lora_parameters(model)
    examples = [Example(e.input_ids.clone(), e.targets) for e in rows()]
    for example in examples:
        example.targets[:3] = IGNORE_INDEX
    expected = plain_loss(model, examples)
    expected.backward()
    wanted = [p.grad.clone() for p in parameters]  # type: ignore[union-attr]
    for parameter in parameters:
        parameter.grad = None
    loss, num_targets = causal_lm_loss(model, batch_of(examples), chunk_size=5)
    (2 * loss).backward()
    assert num_targets == 4 * 9
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert gradient.norm() > 0 and relative_error(parameter.grad, 2 * gradient) < 5 * FP32_TOLERANCE  # type: ignore[arg-type]


def test_composed_head(bases: dict[str, Path]) -> None:
    """The logits are (W + s B A) h, the loss their cross-entropy, and the gradients those of A and B in it."""
    model = adapted(bases["tied"], target_modules="lm_head").train()
    own = active_adapter(model).layers["lm_head"]  # type: ignore[union-attr]
    (example,) = rows(count=1)
    with torch.no_grad():
        hidden = model.base_model(example.input_ids[None]).last_hidden_state[0]
        weight = model.lm_head.base_layer.weight.float()
    A, B = (p.detach().clone().requires_grad_() for p in (own.lora_A, own.lora_B))
    plain = nn.functional.cross_entropy(
        hidden @ (weight + own.scaling * B @ A).T, example.targets, reduction="sum"
    )
    plain.backward()
    loss, _ = causal_lm_loss(model, batch_of([example]), chunk_size=5)
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert relative_error(own.lora_A.grad, A.grad) < FP32_TOLERANCE  # type: ignore[arg-type]
    assert relative_error(own.lora_B.grad, B.grad) < FP32_TOLERANCE  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.get_input_embeddings().parameters()), "a tied embedding stays frozen"
    with torch.no_grad():
        log_p, _ = target_log_likelihoods(hidden, output_head(model), example.targets, chunk_size=5)
    assert -log_p.sum().item() == pytest.approx(plain.item(), rel=1e-5)


def test_a_fully_masked_batch_keeps_its_graph(bases: dict[str, Path]) -> None:
    model = adapted(bases["untied"], **HEAD).train()
    ids = torch.arange(12)
    loss, num_targets = causal_lm_loss(model, batch_of([Example(ids, torch.full((12,), IGNORE_INDEX))]))
    loss.backward()
    assert num_targets == 0 and loss.item() == 0
    assert any(p.grad is not None for p in lora_parameters(model))


@KINDS
def test_peft_loads_ours(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    model = adapted(bases[kind], **HEAD)
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    expected = logits(model)
    again = base(bases[kind])
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    activate(model, None)
    theirs = peft_load(dense_twin(model), tmp_path)
    assert relative_error(logits(theirs), expected) < FP32_TOLERANCE


@KINDS
def test_ours_loads_peft_s(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """PEFT saves the head's own weight with it (lm_head.base_layer.weight), which must be this base's."""
    import peft

    model = base(bases[kind])
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(dense_twin(model), config).eval()
        theirs.save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs)) < FP32_TOLERANCE
    assert not active_adapter(model).trained  # type: ignore[union-attr]
    other = base(bases["padded"])
    with pytest.raises(InputError, match=r"its base has lm_head.weight of \(269, 64\), this one of \(272, 64\)"):
        load_adapter(other, tmp_path)
    changed = base(bases[kind])
    changed.lm_head.weight.data.neg_()
    with pytest.raises(InputError, match=r"other values of lm_head.weight \(relative difference 2\)"):
        load_adapter(changed, tmp_path)


@KINDS
@pytest.mark.parametrize("save_4bit", [False, True])
def test_merged(bases: dict[str, Path], tmp_path: Path, kind: str, save_4bit: bool) -> None:
    """transformers reads the merged model; a tied head is untied in weights and config."""
    from transformers import AutoModelForCausalLM

    model = adapted(bases[kind], **HEAD)
    save_adapter(model, tmp_path / "adapter", active_adapter(model).config, str(bases[kind]))  # type: ignore[union-attr]
    options = MergeOptions(drift=not save_4bit, save_4bit=save_4bit)
    drift = merge_adapter(str(bases[kind]), str(tmp_path / "adapter"), str(tmp_path / "merged"), options)
    assert save_4bit or (drift is not None and drift.mean_kl < 1e-3)
    with torch.no_grad():
        head = model.lm_head.base_layer.weight.float() + model.lm_head.weights.delta_weight()
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert relative_error(tensors["lm_head.weight"].float(), head) < 4e-3  # rounded to bf16, once or twice
    embedding = model.get_input_embeddings().weight
    assert relative_error(tensors["model.embed_tokens.weight"].float(), embedding.float()) < 4e-3
    if not save_4bit:
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert not merged.config.tie_word_embeddings
        assert relative_error(logits(merged), logits(model)) < 2e-2  # weights rounded to bf16


@KINDS
def test_two_adapters_merge_on_the_head(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for name, settings in {"a": HEAD, "b": {"target_modules": "v_proj"}}.items():
        model = adapted(bases[kind], **settings)
        save_adapter(model, tmp_path / name, active_adapter(model).config, str(bases[kind]))  # type: ignore[union-attr]
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    drift = merge_adapter(str(bases[kind]), both, str(tmp_path / "merged"), MergeOptions(weights=[1.0, 1.0]))
    assert drift is not None and drift.mean_kl < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": "lm_head"}, "modules_to_save and target_modules both name lm_head"),
        ({"modules_to_save": "embed_tokens"}, "lm_head would train whole and with LoRA"),
    ],
    ids=str,
)
def test_a_head_does_not_train_twice(bases: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        inject_lora(base(bases["tied"]), LoRAConfig(**HEAD, **settings))


@KINDS
def test_gguf_adapter(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """llama.cpp takes a tied head from the embedding, and has no matrix to adapt there."""
    from gguf import GGUFReader

    from qlora.export.gguf import export_adapter

    model = adapted(bases[kind], **HEAD)
    save_adapter(model, tmp_path / "adapter", active_adapter(model).config)  # type: ignore[union-attr]
    arguments = str(bases[kind]), str(tmp_path / "adapter"), str(tmp_path / "adapter.gguf")
    if kind == "tied":
        with pytest.raises(InputError, match="tied"):
            export_adapter(*arguments)
    else:
        export_adapter(*arguments)
        names = [tensor.name for tensor in GGUFReader(arguments[2]).tensors]
        assert "output.weight.lora_a" in names and len(names) == 6


def test_pissa_leaves_the_head_alone(bases: dict[str, Path]) -> None:
    from qlora.adapters.model import LoRAModel

    with pytest.raises(InputError, match="leave lm_head out of the targets"):
        LoRAModel(base(bases["tied"]), LoRAConfig(**HEAD, init="pissa"))


def test_a_split_base_refuses_the_head(bases: dict[str, Path]) -> None:
    from dataclasses import replace

    from qlora.config.parallel import ParallelConfig
    from qlora.config.run import RunConfig

    model = base(bases["untied"])
    model.base_info = replace(model.base_info, ranks=Ranks(), weight_samples={})
    with pytest.raises(InputError, match="lm_head cannot be adapted on a base that processes split"):
        inject_lora(model, LoRAConfig(**HEAD))
    config = RunConfig(lora=LoRAConfig(**HEAD), parallel=ParallelConfig(shard="fsdp"))
    with pytest.raises(InputError, match="--target-modules lm_head needs the whole base"):
        config.check_split()


@KINDS
def test_planned_memory_holds_the_head_s_adapter(bases: dict[str, Path], kind: str) -> None:
    """The loaded and the planned model give one plan; DoRA's product of the head is not kept for every token."""
    plans = []
    for load in (load_base_model, plan_base_model):
        model = load(str(bases[kind]), compute_dtype="float32")
        inject_lora(model, LoRAConfig(**HEAD, use_dora=True))
        freeze_base(model)
        plans.append(plan_recomputing(model, 64, torch.float32)[0])
    head = 8 * (64 + 269) + 269
    without = load_base_model(str(bases[kind]), compute_dtype="float32")
    inject_lora(without, LoRAConfig(target_modules="q_proj", use_dora=True))
    freeze_base(without)
    plan = plan_recomputing(without, 64, torch.float32)[0]
    assert plans[0] == plans[1]
    assert plans[0].gradients - plan.gradients == 4 * head and plans[0].activations == plan.activations
