"""model/attention.py: a packed row against a dense block-diagonal mask, and against its sequences one by one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.config.lora import LoRAConfig
from qlora.data.batches import collate_packed
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.attention import ATTENTION_NAME, packed_arguments, packed_attention, register_attention
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss
from tests import reference
from tests.models import TINY, save_tiny_llama
from tests.reference import relative_error

LENGTHS = [7, 1, 12, 3, 1, 20]
FP32_TOLERANCE = 2e-6  # a softmax and two products of some 20 terms, each rounded to 2^-24
BF16_TOLERANCE = 2 * 2**-8  # scores and outputs rounded to 8 bits
MODEL_TOLERANCE = 1e-5  # two blocks, a few hundred fp32 roundings each, summed in another order


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def random_qkv(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, head_dim: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = [(1, number, sum(LENGTHS), head_dim) for number in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shape]


def run_packed(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
    output, weights = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=boundaries(LENGTHS).to(query.device),
        max_length_q=max(LENGTHS),
        **kwargs,
    )
    assert weights is None
    return output


def random_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Random tokens; about a third of the targets, and all of the second example's, are masked."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index, length in enumerate(lengths):
        ids = torch.randint(0, TINY["vocab_size"], (length + 1,), generator=generator)
        masked = torch.rand(length, generator=generator) < (1.0 if index == 1 else 0.3)
        examples.append(Example(ids[:-1], ids[1:].masked_fill(masked, IGNORE_INDEX)))
    return examples


def adapt(model: Any) -> Any:
    """All linear layers adapted, A and B away from their start, so that every gradient says something."""
    inject_lora(model, LoRAConfig(target_modules="all-linear", adapter_dtype="float32"))
    freeze_base(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("attention") / "llama"))


@pytest.fixture(scope="module")
def mistral_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Mistral that sees 5 tokens back."""
    from transformers import MistralConfig, MistralForCausalLM

    directory: Path = tmp_path_factory.mktemp("attention") / "mistral"
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=5, tie_word_embeddings=False))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(directory)
    return str(directory)


def load(path: str, **options: Any) -> Any:
    return load_base_model(path, cache=False, **{"compute_dtype": "float32", **options})


# ---- the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_equals_dense_block_diagonal_mask(
    heads: int, kv_heads: int, window: int | None, scaling: float | None, dtype: torch.dtype
) -> None:
    """Output and the gradients of q, k and v, against every score written out in fp64."""
    qkv = random_qkv(heads, kv_heads, dtype)
    output = run_packed(*qkv, scaling=scaling, sliding_window=window)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    mask = reference.block_diagonal_mask(LENGTHS, window)
    assert mask.any(dim=1).all() and mask.sum() < sum(LENGTHS) * (sum(LENGTHS) + 1) // 2
    expected = reference.attention(*exact, mask, scaling)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(gradient)
    expected.backward(gradient.double())
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert output.dtype == dtype and output.shape == (1, sum(LENGTHS), heads, 16)
    assert relative_error(output, expected) < tolerance
    for ours, theirs in zip(qkv, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if window == 1 and ours is not qkv[2]:  # a token that sees itself alone: its score does not matter
            assert ours.grad.abs().max() < tolerance and theirs.grad.abs().max() < 1e-12
        else:
            assert relative_error(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 5])
def test_softcap_equals_dense_block_diagonal_mask(window: int | None, dtype: torch.dtype) -> None:
    """Gemma 2's capped scores; scores near 1, so that a cap of 0.7 bites."""
    qkv = random_qkv(4, 2, dtype)
    output = run_packed(*qkv, sliding_window=window, softcap=0.7)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    mask = reference.block_diagonal_mask(LENGTHS, window)
    expected = reference.attention(*exact, mask, softcap=0.7)
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    output.backward(gradient)
    expected.backward(gradient.double())
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert output.dtype == dtype and relative_error(output, expected) < tolerance
    assert relative_error(reference.attention(*exact, mask), expected) > 0.05
    for ours, theirs in zip(qkv, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("new", [1, 3, 9])
def test_softcap_without_boundaries(new: int) -> None:
    """Generation: the last `new` of 9 tokens against all keys, with the mask left out or given."""
    query, key, value = (tensor[:, :, :9].detach() for tensor in random_qkv(4, 2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    expected = reference.attention(query, key, value, causal, softcap=0.7)[:, -new:]
    for mask in (None, causal[-new:][None, None]):
        output, _ = packed_attention(torch.nn.Module(), query[:, :, -new:], key, value, mask, softcap=0.7)
        assert relative_error(output, expected) < FP32_TOLERANCE


def test_sinks_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks"):
        run_packed(*random_qkv(4, 2), s_aux=torch.ones(4))


def test_registering_twice_is_harmless() -> None:
    from transformers import AttentionInterface

    register_attention()
    register_attention()
    assert AttentionInterface()[ATTENTION_NAME] is packed_attention


# ---- through a whole model --------------------------------------------------------------------------------


def loss_and_gradients(
    model: Any, batches: list[Any], num_gradients: int = 28
) -> tuple[Tensor, int, list[Tensor]]:
    """Loss sum, number of targets and adapter gradients of several batches together."""
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for batch in batches:
        loss, targets = causal_lm_loss(model, batch)
        loss.backward()
        total, count = total + loss.detach(), count + targets
    gradients = [p.grad.clone() for p in lora_parameters(model) if p.grad is not None]
    assert len(gradients) == num_gradients
    return total, count, gradients


@pytest.mark.parametrize("use_4bit", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_row_equals_separate_sequences(
    family: str, use_4bit: bool, tiny_path: str, mistral_path: str
) -> None:
    """Hidden states, loss and every adapter gradient; the separate runs use transformers' own attention."""
    model = adapt(load(tiny_path if family == "llama" else mistral_path, use_4bit=use_4bit))
    assert family == "llama" or model.config.sliding_window < max(LENGTHS)
    examples = random_examples(LENGTHS)
    packed = collate_packed(examples)
    with torch.no_grad():
        together = model.base_model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            use_cache=False,
            **packed_arguments(packed.cu_seqlens, packed.max_length),
        ).last_hidden_state[0]
        model.set_attn_implementation("sdpa")
        apart = [model.base_model(e.input_ids[None], use_cache=False).last_hidden_state[0] for e in examples]
        model.set_attn_implementation(ATTENTION_NAME)
    assert len(apart) > 1
    assert relative_error(together, torch.cat(apart)) < MODEL_TOLERANCE

    loss, count, gradients = loss_and_gradients(model, [packed])
    one_by_one = [collate_packed([example]) for example in examples]
    for batch in one_by_one:  # without cu_seqlens: ordinary attention
        batch.cu_seqlens = None
    expected_loss, expected_count, expected = loss_and_gradients(model, one_by_one)
    assert count == expected_count == packed.num_targets > 0
    assert relative_error(loss, expected_loss) < MODEL_TOLERANCE
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) < MODEL_TOLERANCE


def test_packed_row_equals_separate_with_absolute_positions(tmp_path: Path) -> None:
    """GPT-2 knows where a token stands by its position alone: rotary models cannot tell a missing restart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": TINY["vocab_size"]}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    network = GPT2LMHeadModel(GPT2Config(**sizes, **dropout))
    torch.nn.init.normal_(network.transformer.wpe.weight, std=1.0)
    network.save_pretrained(tmp_path)
    model = adapt(load(str(tmp_path), use_4bit=False))
    examples = random_examples(LENGTHS)
    one_by_one = [collate_packed([example]) for example in examples]
    for batch in one_by_one:
        batch.cu_seqlens = None
    loss, count, gradients = loss_and_gradients(model, [collate_packed(examples)], num_gradients=16)
    expected_loss, expected_count, expected = loss_and_gradients(model, one_by_one, num_gradients=16)
    assert count == expected_count > 0
    assert relative_error(loss, expected_loss) < MODEL_TOLERANCE
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) < MODEL_TOLERANCE


def test_packed_row_equals_dense_mask_model(tiny_path: str) -> None:
    """The same row through transformers' eager attention with the (N, N) mask written out."""
    model = adapt(load(tiny_path))
    packed = collate_packed(random_examples(LENGTHS))
    arguments = packed_arguments(packed.cu_seqlens, packed.max_length)
    common = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
    with torch.no_grad():
        ours = model(**common, **arguments).logits
        model.set_attn_implementation("eager")
        blocked = torch.zeros(sum(LENGTHS), sum(LENGTHS))
        blocked.masked_fill_(~reference.block_diagonal_mask(LENGTHS), torch.finfo(torch.float32).min)
        theirs = model(**common, attention_mask=blocked[None, None]).logits
    assert relative_error(ours, theirs) < MODEL_TOLERANCE


def test_no_dense_mask_is_built(tiny_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The (N, N) mask that transformers would build for a packed row costs more than the attention."""
    from transformers import AttentionInterface

    masks: list[Tensor | None] = []

    def watch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        masks.append(mask)
        return packed_attention(module, query, key, value, mask, **kwargs)

    model = adapt(load(tiny_path))
    monkeypatch.setattr(
        "qlora.kernels.fused.library", lambda dtype: None
    )  # the fused attention takes no mask at all
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION_NAME, watch)
    causal_lm_loss(model, collate_packed(random_examples(LENGTHS)))
    assert len(masks) == 2 and all(mask is None or mask.numel() == 0 for mask in masks)


def test_nothing_leaks_between_sequences(tiny_path: str) -> None:
    """Other tokens in one sequence: the other sequences' outputs keep every bit, its own change."""
    model = adapt(load(tiny_path))
    packed = collate_packed(random_examples(LENGTHS))
    bounds = packed.cu_seqlens.tolist()

    def hidden() -> Tensor:
        with torch.no_grad():
            return model.base_model(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                use_cache=False,
                **packed_arguments(packed.cu_seqlens, packed.max_length),
            ).last_hidden_state[0]

    before = hidden()
    for start, end in pairwise(bounds):
        original = packed.input_ids.clone()
        packed.input_ids[0, start:end] = (original[0, start:end] + 1) % TINY["vocab_size"]
        after = hidden()
        packed.input_ids = original
        outside = torch.ones(len(before), dtype=torch.bool)
        outside[start:end] = False
        assert torch.equal(after[outside], before[outside])
        assert (after[start:end] != before[start:end]).any(dim=1).all()


@pytest.mark.parametrize("left_padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_without_boundaries_it_is_sdpa(family: str, left_padded: bool, tiny_path: str, mistral_path: str) -> None:
    """Bit for bit transformers' own, with a padding mask on the left too, as generation uses it."""
    model = load(tiny_path if family == "llama" else mistral_path)
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if left_padded:
        mask[1, :7] = 0
    outputs = []
    for name in (ATTENTION_NAME, "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask).logits)
    assert torch.equal(*outputs)
    if left_padded:  # and the padding is invisible
        model.set_attn_implementation(ATTENTION_NAME)
        with torch.no_grad():
            alone = model(ids[1:, 7:]).logits
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            padded = model(ids, attention_mask=mask, position_ids=positions).logits[1:, 7:]
        assert relative_error(padded, alone) < MODEL_TOLERANCE


def test_generation_with_cache_equals_generation_without(tiny_path: str) -> None:
    model = load(tiny_path)
    ids = torch.randint(3, 300, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    outputs = [model.generate(ids, attention_mask=mask, use_cache=cache, **options) for cache in (True, False)]
    assert outputs[0].shape == (2, 14) and torch.equal(*outputs)


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_varlen_kernel_equals_separate_sequences(heads: int, kv_heads: int, window: int | None) -> None:
    """The variable-length flash kernel in bf16: output and gradients, against fp64 on the CPU."""
    qkv = random_qkv(heads, kv_heads, torch.bfloat16, head_dim=64)
    exact = [tensor.detach().double().requires_grad_() for tensor in qkv]
    expected = reference.attention(*exact, reference.block_diagonal_mask(LENGTHS, window))
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    expected.backward(gradient.double())
    on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in qkv]
    output = run_packed(*on_gpu, sliding_window=window)
    output.backward(gradient.cuda())
    assert relative_error(output.cpu(), expected) < BF16_TOLERANCE
    for ours, theirs in zip(on_gpu, exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert relative_error(ours.grad.cpu(), theirs.grad) < BF16_TOLERANCE


@pytest.mark.gpu
def test_packed_model_on_gpu_equals_separate(tiny_path: str) -> None:
    """bf16 on CUDA: two blocks of bf16 roundings, so a few units of 2^-8."""
    model = adapt(load(tiny_path, device="cuda", compute_dtype="bfloat16"))
    examples = random_examples(LENGTHS)
    loss, count, gradients = loss_and_gradients(model, [collate_packed(examples).to(torch.device("cuda"))])
    one_by_one = [collate_packed([example]).to(torch.device("cuda")) for example in examples]
    for batch in one_by_one:
        batch.cu_seqlens = None
    expected_loss, expected_count, expected = loss_and_gradients(model, one_by_one)
    assert count == expected_count
    assert relative_error(loss, expected_loss) < 2**-8
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) < 8 * 2**-8
