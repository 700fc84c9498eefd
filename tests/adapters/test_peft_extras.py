"""adapters/peft_extras.py and what load.py compares: PEFT's files as PEFT computes, and half adapters."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
from qlora.lora.adapter import active_adapter
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.training.run import TrainingRun
from tests.lora.test_full_parameters import FP32_TOLERANCE, IDS, NUM_TOKENS, adapted, base, dense_twin, logits
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer
from tests.training.test_run import config_of

KINDS = pytest.mark.parametrize("kind", ["untied", "tied"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "intermediate_size": 128, "vocab_size": NUM_TOKENS}
    ties = {"untied": False, "tied": True}
    return {
        name: save_tiny_llama(folder / name, tie_word_embeddings=tied, eos_token_id=2, **common)
        for name, tied in ties.items()
    }


def train_with_peft(twin: Any, directory: Path, save: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An adapter of PEFT whose parameters have all moved, saved; returns PEFT's model."""
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **settings})
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(twin, config).eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        theirs.save_pretrained(directory, **(save or {}))
    return theirs


@KINDS
@pytest.mark.parametrize("save_embeddings", [True, False])
def test_a_resized_vocabulary(bases: dict[str, Path], tmp_path: Path, kind: str, save_embeddings: bool) -> None:
    """The usual way to add tokens; PEFT 0.21 may write embedding and head three times over."""
    model = base(bases[kind])
    twin = dense_twin(model)
    twin.resize_token_embeddings(NUM_TOKENS + 3)
    theirs = train_with_peft(
        twin,
        tmp_path,
        {"save_embedding_layers": save_embeddings},
        modules_to_save=["embed_tokens", "lm_head"],
    )
    names = load_file(tmp_path / WEIGHTS)
    assert any(".original_module." in name for name in names) == save_embeddings
    load_adapter(model, tmp_path)
    ids = torch.cat([IDS, torch.tensor([[NUM_TOKENS, NUM_TOKENS + 2]])], dim=1)
    assert relative_error(logits(model, ids), logits(theirs, ids)) < FP32_TOLERANCE
    if save_embeddings:
        key = next(name for name in names if name.endswith("embed_tokens.weight"))
        save_file({**names, key: names[key] + 1}, tmp_path / WEIGHTS)
        with pytest.raises(InputError, match=r"two values of model\.embed_tokens\.weight"):
            read_adapter(tmp_path)


@KINDS
@pytest.mark.parametrize("how", ["list", "dict", "with the embedding"])
def test_trained_rows(bases: dict[str, Path], tmp_path: Path, kind: str, how: str) -> None:
    """trainable_token_indices: the file holds rows, not differences; a tied head has them, too."""
    from transformers import AutoModelForCausalLM

    model = base(bases[kind], use_4bit=False)
    ids = [3, 7, 11]
    theirs = train_with_peft(
        dense_twin(model),
        tmp_path / "adapter",
        {"save_embedding_layers": how == "with the embedding"},
        trainable_token_indices={"embed_tokens": ids} if how == "dict" else ids,
    )
    load_adapter(model, tmp_path / "adapter")
    assert relative_error(logits(model), logits(theirs)) < FP32_TOLERANCE
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    save_adapter(model, tmp_path / "again", active_adapter(model).config)  # type: ignore[union-attr]
    again = base(bases[kind], use_4bit=False)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    drift = merge_adapter(str(bases[kind]), str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert drift is not None and drift.mean_kl < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.tie_word_embeddings == (kind == "tied")
    assert relative_error(logits(merged), logits(theirs)) < 2e-2  # weights rounded to bf16


LORA = "base_model.model.model.embed_tokens.lora_embedding_"


def edit(directory: Path, change: Any) -> None:
    """Change the tensors (in place) and the settings (returned) of an adapter."""
    state, described = load_file(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())
    settings = change(state) or {}
    save_file(state, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps({**described, **settings}))


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no ids": (lambda s: {"trainable_token_indices": None}, "trainable_token_indices is None"),
    "other count": (
        lambda s: {"trainable_token_indices": [1]},
        r"of shape \(3, 64\), but trainable_token_indices",
    ),
    "twice": (lambda s: {"trainable_token_indices": [1, 1, 2]}, "trainable_token_indices is"),
    "text": (lambda s: {"trainable_token_indices": ["a", 1, 2]}, "trainable_token_indices is"),
    "no rows": (lambda s: s.pop(ROWS) is None or {}, "holds no rows for its trainable_token_indices"),
    "beyond": (lambda s: {"trainable_token_indices": [1, 2, 999]}, "has 269 rows, but token 999 was trained"),
    "wide": (lambda s: s.update({ROWS: torch.ones(3, 8)}), r"3 rows of .* are 8 wide, but this base has"),
    "nan": (lambda s: s.update({ROWS: torch.full((3, 64), torch.nan)}), "the 3 rows of .* hold NaN or infinity"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_do_not_fit(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = base(bases["untied"])
    train_with_peft(dense_twin(model), tmp_path, trainable_token_indices=[3, 7, 11])
    change, message = BAD_ROWS[name]
    edit(tmp_path, change)
    before = logits(model)
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_norm_means_every_name_that_ends_so(bases: dict[str, Path], tmp_path: Path) -> None:
    model = base(bases["untied"])
    theirs = train_with_peft(dense_twin(model), tmp_path, modules_to_save=["norm"])
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs)) < FP32_TOLERANCE
    assert len(active_adapter(model).trained) == 5  # type: ignore[union-attr]
    gone = "base_model.model.model.layers.1.input_layernorm.weight"
    edit(tmp_path, lambda state: state.pop(gone) is None or {})
    with pytest.raises(InputError, match=r"missing model\.layers\.1\.input_layernorm\.weight"):
        load_adapter(base(bases["untied"]), tmp_path)


@KINDS
@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_lora_on_an_embedding(
    bases: dict[str, Path], tmp_path: Path, kind: str, targets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Loaded, saved again, merged and inspected as PEFT computes it, with a tied head as in the base."""
    from transformers import AutoModelForCausalLM

    from qlora.cli.commands.inspect import main

    model, path = base(bases[kind], use_4bit=False), tmp_path / "adapter"
    patterns: dict[str, Any] = {"rank_pattern": {"embed_tokens": 3}, "alpha_pattern": {"embed_tokens": 9}}
    theirs = train_with_peft(dense_twin(model), path, target_modules=targets, use_rslora=True, **patterns)
    plain, expected = logits(model), logits(theirs)
    assert relative_error(plain, expected) > 0.1
    load_adapter(model, path)
    assert relative_error(logits(model), expected) < FP32_TOLERANCE
    adapter = active_adapter(model)
    assert adapter is not None
    assert adapter.config.target_modules == [target for target in targets if target != "embed_tokens"]
    save_adapter(model, tmp_path / "again", adapter.config)
    again = base(bases[kind], use_4bit=False)
    load_adapter(again, tmp_path / "again")
    assert torch.equal(logits(again), logits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = peft.PeftModel.from_pretrained(dense_twin(base(bases[kind], use_4bit=False)), tmp_path / "again")
    assert relative_error(logits(twin.eval()), expected) < FP32_TOLERANCE
    merge_adapter(str(bases[kind]), str(path), str(tmp_path / "merged"), MergeOptions(drift=False))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    assert relative_error(logits(merged), expected) < 2e-2  # weights rounded to bf16
    main([str(path)])
    assert "LoRA of rank 3 of model.embed_tokens.weight" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["embed_tokens"]])
def test_training_goes_on_from_lora_on_an_embedding(
    bases: dict[str, Path], tmp_path: Path, targets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the whole embedding, which the run says."""
    train_with_peft(dense_twin(base(bases["tied"])), tmp_path / "old", target_modules=targets)
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    job = f"--model {bases['tied']} --data {tmp_path / 'data.jsonl'} --compute-dtype float32 --num-samples 0"
    config = config_of(job.split(), tmp_path / "out", "--adapter", str(tmp_path / "old"), "--max-steps", "1")
    with TrainingRun.from_config(config) as run:
        run.train()
    assert "whole model.embed_tokens" in " ".join(capsys.readouterr().out.split())
    old, new = (read_adapter(tmp_path / name) for name in ("old", "out"))
    assert old.adapted_layers == new.adapted_layers and list(new.trained) == ["model.embed_tokens.weight"]


BAD_EMBEDDINGS: dict[str, tuple[Any, str]] = {
    "half": (lambda s: s.pop(f"{LORA}A") is None, r"embed_tokens'? with A and B of shape none, \(64, 2\)"),
    "other half": (lambda s: s.pop(f"{LORA}B") is None, r"with A and B of shape \(2, 269\), none"),
    "rank": (lambda s: {"r": 4}, "LoRA of rank 4 on the embedding"),
    "gone": (
        lambda s: [s.pop(f"{LORA}{part}") for part in "AB"] and {},
        "model.embed_tokens has no tensors, but adapter_config.json announces it",
    ),
    "vocabulary": (lambda s: s.update({f"{LORA}A": torch.ones(2, 9)}), "has 269 rows, but the LoRA on it has 9"),
    "wide": (lambda s: s.update({f"{LORA}B": torch.ones(8, 2)}), "are 8 wide, but this base has"),
    "nan": (lambda s: s.update({f"{LORA}B": torch.full((64, 2), torch.nan)}), "hold NaN or infinity"),
    "DoRA": (
        lambda s: s.update({LORA.replace("embedding_", "magnitude_vector"): torch.ones(64)}) or {"use_dora": True},
        "holds DoRA on the embedding",
    ),
}


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
def test_lora_on_an_embedding_that_does_not_fit(bases: dict[str, Path], tmp_path: Path, name: str) -> None:
    model = base(bases["untied"])
    train_with_peft(dense_twin(model), tmp_path, target_modules=["q_proj", "embed_tokens"])
    change, message = BAD_EMBEDDINGS[name]
    edit(tmp_path, change)
    with pytest.raises(InputError, match=message):
        load_adapter(model, tmp_path)


def test_lora_on_experts_parameters_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1, vocab_size=40,
        num_attention_heads=2, num_key_value_heads=1, num_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    theirs = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    train_with_peft(theirs, tmp_path, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(InputError, match="an adapter with target_parameters, which this version does not compute"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("target", "exclude"),
    [
        (["q_proj", "v_proj"], None),
        ("all-linear", None),
        (["q_proj", "v_proj"], ["1.self_attn.v_proj"]),
        (r"model\.layers\.\d+\.self_attn\.(q|v)_proj", r".*\.1\.self_attn\.v_proj"),
    ],
)
def test_half_an_adapter(bases: dict[str, Path], tmp_path: Path, target: Any, exclude: Any) -> None:
    """A file from which a layer is missing answered as if it were whole."""
    names = target if target == "all-linear" else ["q_proj"] if exclude else ["q_proj", "v_proj"]
    model = adapted(bases["untied"], target_modules=names, layers="1")
    config: LoRAConfig = active_adapter(model).config  # type: ignore[union-attr]
    save_adapter(model, tmp_path, config)
    load_adapter(base(bases["untied"]), tmp_path)  # the config says so
    edit(
        tmp_path,
        lambda state: {"layers_to_transform": None, "target_modules": target, "exclude_modules": exclude},
    )
    message = r"model\.layers\.0\.self_attn\.q_proj has no tensors, but adapter_config.json announces it"
    with pytest.raises(InputError, match=message):
        load_adapter(base(bases["untied"]), tmp_path)
    with pytest.raises(InputError, match=message):
        merge_adapter(str(bases["untied"]), str(tmp_path), str(tmp_path / "merged"), MergeOptions(drift=False))


def test_a_pattern_of_many_repeats_is_not_run(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from a file, and some take forever to fail; then the layers are those of the tensors."""
    model = adapted(bases["untied"], target_modules=["q_proj"])
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    edit(tmp_path, lambda state: {"target_modules": ".*a*b*c*d*q_proj"})
    run = re.fullmatch

    def watch(pattern: Any, *rest: Any) -> Any:
        assert pattern != ".*a*b*c*d*q_proj"
        return run(pattern, *rest)

    monkeypatch.setattr(re, "fullmatch", watch)
    load_adapter(base(bases["untied"]), tmp_path)


def test_inspect_names_the_gap(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from qlora.cli.commands.inspect import main

    draw = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {
        f"base_model.model.model.layers.{n}.self_attn.{name}.lora_{part}.weight": torch.randn(4, 4, generator=draw)
        for n in (0, 1, 4, 5) for name in ("q_proj", "v_proj") for part in "AB"
    }  # fmt: skip
    state.pop("base_model.model.model.layers.5.self_attn.v_proj.lora_A.weight")
    state.pop("base_model.model.model.layers.5.self_attn.v_proj.lora_B.weight")
    save_file(state, tmp_path / WEIGHTS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    main([str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "without tensors self_attn.q_proj in blocks 2,3, self_attn.v_proj in blocks 2,3,5" in printed
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "layers_to_transform": [0, 1, 4, 5]}))
    main([str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "self_attn.q_proj in" not in printed and "self_attn.v_proj in blocks 5" in printed
    assert "not checked" not in printed
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "target_modules": ["q_proj", "v_proj", "up_proj"]}))
    main([str(tmp_path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "blocks 2,3,5, up_proj" in printed
    assert "not checked whether the base has blocks after 5 that the file leaves out; pass --model" in printed
    for config in ({"num_hidden_layers": 8}, {"text_config": {"num_hidden_layers": 8}}, {"n_layer": 8}):
        (tmp_path / "base").mkdir(exist_ok=True)
        (tmp_path / "base" / "config.json").write_text(json.dumps(config))
        named = {**settings, "base_model_name_or_path": str(tmp_path / "base")}
        (tmp_path / CONFIG).write_text(json.dumps(named))
        main([str(tmp_path)])
        printed = " ".join(capsys.readouterr().out.split())
        assert "self_attn.q_proj in blocks 2,3,6,7" in printed and "not checked" not in printed
