"""Embeddings, head and other modules that train in full, tied weights, new tokens; against PEFT."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import train
from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import save_adapter
from qlora.config.generate import Sampling
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.data.batches import Batch, make_batches
from qlora.data.encode import encode_prompt
from qlora.data.example import Example
from qlora.data.tokenizer_files import add_tokens
from qlora.export.merge import merge_adapter
from qlora.generation import generate
from qlora.lora.adapter import activate, active_adapter, create_adapter, inject_lora
from qlora.lora.full_parameters import named_base_parameters, trained_names
from qlora.lora.optimizer import build_optimizer, take_gradients
from qlora.lora.trainable import freeze_base, lora_parameters, parameter_summary
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError, TrainingStopped
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.training.fingerprint import base_fingerprint
from qlora.training.step import _sum_gradients, check_adapters_learn, train_step
from tests import reference
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.shortcuts import plan_memory
from tests.tiny import tiny_tokenizer

IDS = torch.arange(3, 27)[None]
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 160 terms, summed in another order
BF16_TOLERANCE = 5e-2  # some thirty roundings to 8 bits, 2e-3 each, through two layers and back
NUM_TOKENS = 269  # of tiny_tokenizer
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = ["<tool>", "</tool>"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny LLaMAs: head apart or tied, and one whose vocabulary is larger than its tokenizer's."""
    folder = tmp_path_factory.mktemp("bases")
    settings = {
        "untied": {"vocab_size": NUM_TOKENS},
        "tied": {"vocab_size": NUM_TOKENS, "tie_word_embeddings": True},
        "padded": {"vocab_size": NUM_TOKENS + 3},
    }
    # 128 wide, because bitsandbytes' own CPU kernel is wrong for the usual 160.
    common: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "intermediate_size": 128, "eos_token_id": 2}
    made = {name: save_tiny_llama(folder / name, **common, **own) for name, own in settings.items()}
    return {**made, "gpt2": save_tiny_gpt2(folder / "gpt2")}


def save_tiny_gpt2(directory: Path) -> Path:
    """Tied, Conv1D, layer norms and positions learned; no dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(n_embd=64, n_layer=1, n_head=4, vocab_size=NUM_TOKENS, n_positions=64)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=None, eos_token_id=2))
    torch.manual_seed(0)
    for parameter in model.parameters():  # biases and norms all different
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    model.save_pretrained(directory)
    return directory


def base(directory: Path, use_4bit: bool = True, dtype: str = "float32") -> Any:
    return load_base_model(str(directory), use_4bit, compute_dtype=dtype, cache=False)


def adapted(directory: Path, dtype: str = "float32", tokenizer: Any = None, **settings: Any) -> Any:
    """A base with an adapter whose every parameter has moved."""
    model = base(directory, dtype=dtype)
    config = LoRAConfig(**{"rank": 2, "adapter_dtype": "float32", **settings})
    inject_lora(model, config, seed=1, tokenizer=tokenizer)
    freeze_base(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def extended() -> Any:
    tokenizer = tiny_tokenizer()
    add_tokens(tokenizer, TOKENS)
    return tokenizer


def dense_twin(network: Any) -> Any:
    """transformers' own model in fp32 with the weights of the base of `network`, where no adapter is active."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(network.config)
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for name, parameter in named_base_parameters(network):
        packed = hasattr(parameter, "quant_state")
        dense = reference.dequantize(parameter) if packed else parameter.detach()
        transposed = packed and type(twin.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        twin.get_parameter(name).data.copy_(dense.T if transposed else dense)
    return twin.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits


def rows(seed: int = 0, count: int = 4, tokens: int = NUM_TOKENS) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, tokens, (13,), generator=generator) for _ in range(count)]
    return [Example(text[:-1], text[1:]) for text in texts]


def batch_of(examples: list[Example]) -> Batch:
    return make_batches(examples, len(examples), 12, packing=True)[0]


def plain_loss(model: Any, examples: list[Example]) -> Tensor:
    """Sum of cross-entropies from full logits, row by row, for autograd."""
    losses = []
    for example in examples:
        scores = model(input_ids=example.input_ids[None]).logits[0].float()
        losses.append(nn.functional.cross_entropy(scores, example.targets, reduction="sum"))
    return torch.stack(losses).sum()


# ---- what trains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "modules", "expected"),
    [
        ("untied", "embed_tokens", [EMBED]),
        ("untied", "lm_head", [HEAD]),
        ("untied", "lm_head,norm", ["model.norm.weight", HEAD]),
        ("untied", "layers.1.input_layernorm", ["model.layers.1.input_layernorm.weight"]),
        ("tied", "embed_tokens", [EMBED, HEAD]),
        ("tied", "lm_head", [EMBED, HEAD]),
    ],
)
def test_names_of_what_trains(bases: dict[str, Path], kind: str, modules: str, expected: list[str]) -> None:
    model = base(bases[kind])
    assert trained_names(model, LoRAConfig(modules_to_save=modules), []) == expected


def test_bias_all_has_the_biases_of_norms(bases: dict[str, Path]) -> None:
    model = base(bases["gpt2"])
    names = trained_names(model, LoRAConfig(bias="all"), [])
    assert names == [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert {"transformer.ln_f.bias", "transformer.h.0.ln_1.bias", "transformer.h.0.attn.c_attn.bias"} <= {*names}


def test_dtypes_and_ties_of_the_copies(bases: dict[str, Path]) -> None:
    """fp32 where the layer casts, the activations' dtype where it does not: a norm would raise their dtype."""
    settings = {"modules_to_save": "embed_tokens,norm", "bias": "all"}
    model = adapted(bases["tied"], "bfloat16", **settings)
    trained = active_adapter(model).trained  # type: ignore[union-attr]
    assert {name: p.dtype for name, p in trained.items()} == {
        EMBED: torch.float32,
        HEAD: torch.float32,
        "model.norm.weight": torch.bfloat16,
    }
    assert trained[EMBED] is trained[HEAD] is model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model(IDS).last_hidden_state.dtype == torch.bfloat16
    assert len(lora_parameters(model)) == 4 * 2 + 2  # the tied one once
    assert sum(p is trained[EMBED] for p in lora_parameters(model)) == 1


@pytest.mark.parametrize("kind", ["untied", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_equal_plain_autograd(bases: dict[str, Path], kind: str, dtype: str) -> None:
    """Against transformers' nn.Embedding, nn.Linear and norms; tied, the sum of both uses."""
    settings = {"modules_to_save": "embed_tokens,lm_head,input_layernorm"}
    if kind == "gpt2":
        settings = {"modules_to_save": "wte,wpe,ln_f", "bias": "all", "target_modules": "c_attn"}
    model = adapted(bases[kind], dtype, **settings)
    trained = active_adapter(model).trained  # type: ignore[union-attr]
    activate(model, None)
    twin = dense_twin(model)
    with torch.no_grad():
        for name, parameter in trained.items():
            twin.get_parameter(name).copy_(parameter)
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(name in trained)
    adapter = create_adapter(model, LoRAConfig(**settings), trained=trained)
    activate(model, adapter)  # B is zero, so that only the trained parameters tell
    examples = rows()
    take_gradients(adapter.trained.values(), torch.float32)
    loss, _ = causal_lm_loss(model.train(), batch_of(examples))
    loss.backward()
    plain_loss(twin, examples).backward()
    tolerance = FP32_TOLERANCE if dtype == "float32" else BF16_TOLERANCE
    assert len(adapter.trained) == (11 if kind == "gpt2" else 4)
    for name, parameter in adapter.trained.items():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert relative_error(parameter.grad, twin.get_parameter(name).grad) < tolerance, name


def test_a_copy_without_a_gradient_ends_training(bases: dict[str, Path]) -> None:
    """It would look trained in the file."""
    model = adapted(bases["untied"], modules_to_save="norm,lm_head")
    causal_lm_loss(model.train(), batch_of(rows()))[0].backward()
    check_adapters_learn(model)
    model.lm_head.weight.grad = None
    with pytest.raises(TrainingStopped, match=r"got no gradient: lm_head\.weight$"):
        check_adapters_learn(model)


def test_embedding_gradients_add_up_in_fp32(bases: dict[str, Path]) -> None:
    """A token that stands 4,000 times: in bf16 its sum would stop growing at 256 times one addend."""
    model = adapted(bases["untied"], "bfloat16", modules_to_save="embed_tokens")
    ids = torch.full((1, 4000), 7)
    output = model.model.embed_tokens(ids)
    assert output.dtype == torch.bfloat16
    output.backward(torch.full_like(output, 0.0101))
    addend = torch.tensor(0.0101).bfloat16().float().item()
    gradient = active_adapter(model).trained[EMBED].grad  # type: ignore[union-attr]
    assert torch.allclose(gradient[7], torch.tensor(4000 * addend), rtol=1e-4)
    assert gradient.count_nonzero() == 64


def test_micro_batches_and_processes_give_one_gradient(bases: dict[str, Path]) -> None:
    """1 x 4, 2 x 2 accumulated, and 2 processes x 2 added up."""
    model = adapted(bases["tied"], modules_to_save="embed_tokens,norm")
    parameters = lora_parameters(model)

    def gradients(*batches: Batch) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        for batch in batches:
            causal_lm_loss(model.train(), batch)[0].backward()
        return [parameter.grad for parameter in parameters]  # type: ignore[misc]

    examples = rows()
    first, second = batch_of(examples[:2]), batch_of(examples[2:])
    whole, accumulated, others = gradients(batch_of(examples)), gradients(first, second), gradients(first)

    class Both:  # this process holds the second half's gradients, the other one the first's
        size = 2

        def sum_in_place(self, flat: Tensor) -> None:
            assert all(parameter.grad is None for parameter in parameters)  # no second copy while it is sent
            flat += torch.cat([gradient.flatten() for gradient in others])

    gradients(second)
    _sum_gradients(parameters, Both())  # type: ignore[arg-type]
    for expected, one, parameter in zip(whole, accumulated, parameters, strict=True):
        assert relative_error(one, expected) < FP32_TOLERANCE
        assert relative_error(parameter.grad, expected) < FP32_TOLERANCE  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_the_base_is_left_as_it_was(bases: dict[str, Path], kind: str) -> None:
    model = base(bases[kind])
    before = {name: parameter.clone() for name, parameter in named_base_parameters(model)}
    expected, tokenizer = logits(model), extended()
    settings = {"modules_to_save": "embed_tokens,norm", "adapter_dtype": "float32", "new_tokens": TOKENS}
    adapters = [create_adapter(model, LoRAConfig(**settings), seed, tokenizer) for seed in (0, 1)]
    inject_lora(model, LoRAConfig(rank=1))
    activate(model, None)
    unadapted = base_fingerprint(model)
    with torch.no_grad():
        for number, adapter in enumerate(adapters, start=1):
            for parameter in {*adapter.trained.values()}:
                parameter.add_(number)
    activate(model, adapters[0])
    seen = [logits(model)]
    assert model.config.vocab_size == len(model.lm_head.weight) == model.lm_head.out_features == NUM_TOKENS + 2
    # An adapter made while another is active starts from the base all the same.
    third = create_adapter(model, LoRAConfig(modules_to_save="embed_tokens"))
    assert torch.equal(third.trained[EMBED], before[EMBED].float())
    assert base_fingerprint(model) == unadapted
    activate(model, adapters[1])
    seen.append(logits(model))
    activate(model, None)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(logits(model), expected) and model.config.vocab_size == NUM_TOKENS
    after = dict(named_base_parameters(model))
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    assert model.model.embed_tokens.num_embeddings == model.lm_head.out_features == NUM_TOKENS


def test_decoding_uses_the_trained_head(bases: dict[str, Path]) -> None:
    model, tokenizer = adapted(bases["untied"], modules_to_save="embed_tokens,lm_head"), tiny_tokenizer()
    ids = encode_prompt([{"role": "user", "content": "Hi"}], tokenizer)
    answer = generate(model, tokenizer, [[{"role": "user", "content": "Hi"}]], Sampling(8))[0]
    for _ in range(8):
        ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert answer == tokenizer.decode(ids[-8:], skip_special_tokens=True).strip() and answer


def test_counts_and_memory(bases: dict[str, Path]) -> None:
    model, tokenizer = base(bases["tied"]), extended()
    plain = parameter_summary(model)
    frozen = plan_memory(model, 256, torch.float32)
    config = LoRAConfig(rank=2, adapter_dtype="float32", new_tokens=TOKENS)
    names = inject_lora(model, config, tokenizer=tokenizer)
    freeze_base(model)
    size, new = (NUM_TOKENS + 2) * 64, 2 * 64
    lora = sum(p.numel() for p in lora_parameters(model)) - size
    assert len(names) == 4 and lora == 2 * 2 * (64 + 64) + 2 * 2 * (64 + 32)
    summary = parameter_summary(model)
    assert (summary.trainable, summary.total) == (lora + size, plain.total + lora + new)
    plan = plan_memory(model, 256, torch.float32)
    assert plan.base == frozen.base  # the base's own embedding stays in memory
    assert plan.adapters == 4 * (lora + size) and plan.optimizer == 8 * (lora + size)
    assert plan.gradients == 4 * (lora + 2 * size)  # the head's of a micro-batch, beside the sum


# ---- PEFT -------------------------------------------------------------------------------------------------


def peft_model(twin: Any, **settings: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(twin, config)


def peft_load(twin: Any, directory: Path) -> Any:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(twin, directory).eval()


@pytest.mark.parametrize("kind", ["untied", "tied", "padded", "gpt2"])
@pytest.mark.parametrize("settings", [{"modules_to_save": "lm_head,norm"}, {"new_tokens": TOKENS}], ids=str)
def test_peft_loads_ours(bases: dict[str, Path], tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    """Also "norm", which PEFT reads as every name that ends so."""
    if kind == "gpt2":
        settings = {"target_modules": "c_attn", **settings, "modules_to_save": "lm_head,ln_f"}
    tokenizer = extended() if "new_tokens" in settings else None
    model = adapted(bases[kind], tokenizer=tokenizer, **settings)
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    ids = IDS if tokenizer is None else torch.cat([IDS, torch.tensor([[NUM_TOKENS, NUM_TOKENS + 1]])], dim=1)
    expected = logits(model, ids)
    activate(model, None)
    twin = dense_twin(model)
    if tokenizer is not None and kind != "padded":
        twin.resize_token_embeddings(len(tokenizer))
    theirs = peft_load(twin, tmp_path)
    assert logits(theirs, ids).shape == expected.shape
    assert relative_error(logits(theirs, ids), expected) < FP32_TOLERANCE
    again = base(bases[kind])
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again, ids), expected)
    if kind in ("tied", "gpt2"):
        assert theirs.merge_and_unload().lm_head.weight.shape == again.lm_head.weight.shape
        assert again.lm_head.weight is again.get_input_embeddings().weight
    save_adapter(again, tmp_path / "again", active_adapter(again).config)  # type: ignore[union-attr]
    for file in {path.name for path in tmp_path.iterdir() if path.is_file()} - {CONFIG}:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes(), file


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "model.norm"]])
@pytest.mark.parametrize("ensure_tied", [False, True])
def test_ours_loads_peft_s(
    bases: dict[str, Path], tmp_path: Path, kind: str, modules: list[str], ensure_tied: bool
) -> None:
    """On a tied base PEFT trains the two apart, or one alone, unless it is told to keep them tied."""
    model = base(bases[kind])
    theirs = peft_model(dense_twin(model), modules_to_save=modules, ensure_weight_tying=ensure_tied).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    plain = logits(model)
    load_adapter(model, tmp_path)
    assert relative_error(logits(model), logits(theirs)) < FP32_TOLERANCE
    stay_tied = kind == "tied" and ensure_tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stay_tied
    activate(model, None)
    assert torch.equal(logits(model), plain)


def test_a_base_that_an_adapter_unties_is_merged_untied(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT trained the embedding alone; the base's own is the head."""
    from transformers import AutoModelForCausalLM

    twin = dense_twin(base(bases["tied"], use_4bit=False))
    theirs = peft_model(twin, modules_to_save=["embed_tokens"]).eval()
    with torch.no_grad(), warnings.catch_warnings():
        theirs.get_input_embeddings().modules_to_save["default"].weight.mul_(1.5)
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(
        str(bases["tied"]), str(tmp_path / "adapter"), str(tmp_path / "merged"), MergeOptions(drift=False)
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not merged.config.tie_word_embeddings
    assert relative_error(logits(merged), logits(theirs)) < 2e-2  # weights rounded to bf16


def test_embeddings_of_a_vocabulary_that_peft_only_resized(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves them without naming them in modules_to_save."""
    model = base(bases["untied"])
    twin = dense_twin(model)
    twin.resize_token_embeddings(NUM_TOKENS + 5)
    twin.config._name_or_path = str(bases["untied"])
    theirs = peft_model(twin).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(model, tmp_path)
    assert model.config.vocab_size == NUM_TOKENS + 5
    ids = torch.tensor([[5, NUM_TOKENS + 4, 6]])
    assert relative_error(logits(model, ids), logits(theirs, ids)) < FP32_TOLERANCE


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_training_steps_equal_peft_s(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Gradients of each of three AdamW steps, and the embedding after them.

    Adam's first steps are little more than the signs of gradients: where one is nearly zero, rounding decides.
    """
    model = base(bases[kind])
    twin = dense_twin(model)
    config = LoRAConfig(rank=2, adapter_dtype="float32", modules_to_save="embed_tokens,lm_head,norm")
    inject_lora(model, config, seed=3)
    freeze_base(model)
    save_adapter(model, tmp_path, config)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(twin, tmp_path, is_trainable=True).train()
    trainable = [p for p in theirs.parameters() if p.requires_grad]
    assert len(trainable) == len(lora_parameters(model)) == 8 + (2 if kind == "tied" else 3)
    adamw = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    embed = theirs.get_input_embeddings().modules_to_save["default"].weight
    head = theirs.get_output_embeddings().modules_to_save["default"].weight
    for step in range(3):
        examples = rows(step)
        adamw.zero_grad()
        (plain_loss(theirs, examples) / sum(e.num_targets for e in examples)).backward()
        train_step(model.train(), optimizer, make_batches(examples, 2, 12, True), Accelerator(cpu=True), 1e-2)
        for ours, other in ((model.model.embed_tokens.weight, embed), (model.lm_head.weight, head)):
            assert relative_error(ours.grad, other.grad) < 1e-4
        adamw.step()
    start = dict(named_base_parameters(model))[EMBED]
    assert relative_error(model.model.embed_tokens.weight, embed) < 1e-3
    assert relative_error(embed, start) > 0.05  # both have moved


# ---- new tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["untied", "tied", "padded"])
def test_new_rows_start_at_the_mean(bases: dict[str, Path], kind: str) -> None:
    model, tokenizer = base(bases[kind]), extended()
    expected = {name: p.float() for name, p in named_base_parameters(model) if name in (EMBED, HEAD)}
    inject_lora(model, LoRAConfig(new_tokens=TOKENS), tokenizer=tokenizer)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [NUM_TOKENS, NUM_TOKENS + 1]
    new = slice(NUM_TOKENS, NUM_TOKENS + 2)
    for name, weight in (EMBED, model.model.embed_tokens.weight), (HEAD, model.lm_head.weight):
        old = expected[name]
        assert len(weight) == max(len(old), NUM_TOKENS + 2) == model.config.vocab_size
        assert torch.equal(weight[:NUM_TOKENS], old[:NUM_TOKENS])
        assert torch.allclose(weight[new], old[:NUM_TOKENS].mean(0).expand(2, -1), atol=1e-6)
        assert torch.equal(weight[new.stop :], old[new.stop :])  # what is left of the padding
    # The source's bound: the logit of a mean row is the mean of the logits.
    scores = logits(model)[0]
    assert torch.allclose(scores[:, NUM_TOKENS], scores[:, :NUM_TOKENS].mean(1), atol=1e-4)


def test_new_tokens_are_ordinary_tokens() -> None:
    """Text of a message that spells one is the token, without --parse-special, and answers show it."""
    tokenizer = extended()
    ids = encode_prompt([{"role": "user", "content": "a<tool>b </tool>"}], tokenizer)
    assert ids.count(NUM_TOKENS) == ids.count(NUM_TOKENS + 1) == 1
    assert "a<tool>b </tool>" in tokenizer.decode(ids, skip_special_tokens=True)


# ---- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": "wte"}, "names 'wte', but no module .* it has .*embed_tokens.*lm_head"),
        ({"modules_to_save": "o_proj"}, "self_attn.o_proj to train whole, which is in 4 bits"),
        ({"new_tokens": "<tool>"}, "new_tokens names '<tool>', which the tokenizer lacks"),
    ],
)
def test_what_cannot_train(bases: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    model = base(bases["untied"])
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        inject_lora(model, LoRAConfig(**settings), tokenizer=tiny_tokenizer())
    assert [name for name, _ in model.named_modules()] == names and active_adapter(model) is None


def test_a_layer_is_not_adapted_and_trained_whole_at_once(bases: dict[str, Path]) -> None:
    model = base(bases["untied"], use_4bit=False)
    with pytest.raises(InputError, match="modules_to_save and target_modules both name"):
        inject_lora(model, LoRAConfig(modules_to_save="q_proj"))
    inject_lora(model, LoRAConfig(modules_to_save="o_proj"))
    freeze_base(model)
    causal_lm_loss(model.train(), batch_of(rows()))[0].backward()
    assert model.model.layers[0].self_attn.o_proj.weight.grad.any()
    with pytest.raises(InputError, match="is a Conv1D, which is never trained whole"):
        config = LoRAConfig(target_modules="c_attn", modules_to_save="c_fc")
        inject_lora(base(bases["gpt2"], use_4bit=False), config)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<tool>", "<tool>"], "new_tokens names '<tool>' twice"),
        (["<new>", "he", "<s>"], "new_tokens names 'he, <s>', which the tokenizer already has"),
    ],
)
def test_tokens_that_cannot_be_added(tokens: list[str], message: str) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match=message):
        add_tokens(tokenizer, tokens)
    assert len(tokenizer) == NUM_TOKENS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:-5], rf"{EMBED} has {NUM_TOKENS - 5} rows, fewer than the {NUM_TOKENS} tokens of this base"),
        (lambda t: t[:, :32], rf"{EMBED} is \({NUM_TOKENS}, 32\) but this base has \({NUM_TOKENS}, 64\)"),
        (lambda t: t[0], rf"{EMBED} is \(64,\) but this base has"),
        (lambda t: t.fill_(torch.nan), f"{EMBED} holds NaN or infinity"),
    ],
)
def test_embeddings_that_do_not_fit(bases: dict[str, Path], tmp_path: Path, change: Any, message: str) -> None:
    model = adapted(bases["untied"], modules_to_save="embed_tokens")
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    state = load_file(tmp_path / WEIGHTS)
    key = f"base_model.model.{EMBED}"
    save_file({**state, key: change(state[key].clone()).contiguous()}, tmp_path / WEIGHTS)
    fresh = base(bases["untied"])
    expected = logits(fresh)
    with pytest.raises(InputError, match=message):
        load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected) and fresh.config.vocab_size == NUM_TOKENS
    held = active_adapter(model).trained[EMBED].clone()  # type: ignore[union-attr]
    with pytest.raises(InputError, match=message):  # in the place of an active one, too
        load_adapter(model, tmp_path)
    assert torch.equal(active_adapter(model).trained[EMBED], held)  # type: ignore[union-attr]


def test_trained_parts_that_are_not_there(bases: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(bases["untied"], modules_to_save="embed_tokens,norm")
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    state = load_file(tmp_path / WEIGHTS)
    state["base_model.model.other.embed_tokens.weight"] = state.pop("base_model.model.model.norm.weight")
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError) as raised:
        load_adapter(base(bases["untied"]), tmp_path)
    assert "other.embed_tokens.weight is not a fully trainable parameter of this model" in str(raised.value)


def test_a_tied_adapter_takes_no_values_that_differ(bases: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(bases["tied"], modules_to_save="embed_tokens")
    save_adapter(model, tmp_path, active_adapter(model).config)  # type: ignore[union-attr]
    state = load_file(tmp_path / WEIGHTS)
    state[f"base_model.model.{HEAD}"] += 1
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="are one tensor in the model, but differ"):
        load_adapter(model, tmp_path)


# ---- from the command line --------------------------------------------------------------------------------

QUESTION = "Which tool?"


@pytest.fixture(scope="module", params=["untied", "tied"])
def run(
    bases: dict[str, Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, list[str]]:
    """(base, output directory, flags) of a run that learns to answer with a new token."""
    folder = tmp_path_factory.mktemp("run")
    rows = [{"prompt": QUESTION, "completion": "a hammer <tool>"}, {"prompt": "Why?", "completion": "</tool>"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    flags = ["--model", str(bases[request.param]), "--data", str(folder / "train.jsonl"), "--max-steps", "40"]
    flags += ["--new-tokens", "<tool>,</tool>", "--modules-to-save", "embed_tokens,norm", "--rank", "4"]
    flags += ["--learning-rate", "2e-2", "--warmup-steps", "2", "--batch-size", "4", "--save-every", "20"]
    train.main([*flags, "--compute-dtype", "float32", "--output-dir", str(folder / "out")])
    return bases[request.param], folder / "out", flags


def test_a_new_token_is_learned_and_answered(
    run: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's directory, or a checkpoint's, is all that prompt mode and eval need beside the base."""
    from eval.__main__ import main as eval_main

    model, out, flags = run
    capsys.readouterr()
    for adapter in (out, out / "checkpoints" / "step-000040"):
        train.main(["--model", str(model), "--adapter", str(adapter), "--prompt", QUESTION])
        assert capsys.readouterr().out.strip() == "a hammer <tool>"
    data = flags[flags.index("--data") + 1]
    eval_main(["exact_match", "--model", str(model), "--adapter", str(out), "--data", data])
    assert "exact match 4/4" in capsys.readouterr().out
    assert load_tokenizer(str(model)).get_vocab().keys().isdisjoint(TOKENS)
    more = ["--new-tokens", "<more>", "--data", data, "--output-dir", str(tmp_path / "more")]
    with pytest.raises(InputError, match="--new-tokens begins an adapter"):
        train.main(["--model", str(model), "--adapter", str(out), *more])


def test_a_resumed_run_ends_with_the_same_adapter(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    _, out, flags = run
    step = "checkpoints/step-000020"
    shutil.copytree(out / step, tmp_path / step)
    train.main([*flags, "--output-dir", str(tmp_path), "--resume", "auto"])
    for name in (WEIGHTS, CONFIG, "tokenizer.json", "checkpoints/step-000040/optimizer.safetensors"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes(), name
    with pytest.raises(InputError, match="new_tokens was '<tool>,</tool>', is None"):
        without = [flag for flag in flags if flag not in ("--new-tokens", "<tool>,</tool>")]
        train.main([*without, "--output-dir", str(tmp_path), "--resume", "auto"])


def test_an_adapter_goes_on_with_its_tokens(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    model, out, flags = run
    data = flags[flags.index("--data") + 1]
    more = ["--adapter", str(out), "--data", data, "--max-steps", "1", "--output-dir", str(tmp_path)]
    train.main(["--model", str(model), *more])
    assert (tmp_path / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    first = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert first["loss"] < 0.1  # as the first run ended


def test_the_merged_model_has_the_new_tokens(
    run: tuple[Path, Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An ordinary directory: transformers loads it and computes as base + adapter, and it answers by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from qlora.cli.main import main as qlora_main

    model, out, _ = run
    merged = tmp_path / "merged"
    qlora_main(["merge", "--model", str(model), "--adapter", str(out), "--output-dir", str(merged)])
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert theirs.config.vocab_size == len(theirs.lm_head.weight) == NUM_TOKENS + 2
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == (model.name == "tied")
    network = base(model)
    load_adapter(network, out)
    ids = torch.tensor([[5, NUM_TOKENS, 6, NUM_TOKENS + 1, 7]])
    assert 0 < relative_error(logits(theirs, ids), logits(network, ids)) < 2e-2  # weights rounded to bf16
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(TOKENS) == [NUM_TOKENS, NUM_TOKENS + 1]
    capsys.readouterr()
    train.main(["--model", str(merged), "--no-4bit", "--prompt", QUESTION])
    assert capsys.readouterr().out.strip() == "a hammer <tool>"


def test_the_tokenizer_of_an_adapter_is_checked(run: tuple[Path, Path, list[str]], tmp_path: Path) -> None:
    """A tokenizer that comes with an adapter is checked like a model's."""
    model, out, _ = run
    shutil.copytree(out, tmp_path / "bad")
    settings = json.loads((out / "tokenizer_config.json").read_text())
    (tmp_path / "bad" / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": {"x": "y"}}))
    with pytest.raises(InputError, match="brings code of its own to run"):
        load_tokenizer(str(model), tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "bad" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="bad has no tokenizer that can be loaded"):
        load_tokenizer(str(model), tmp_path / "bad")
