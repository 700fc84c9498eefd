"""Generation: decoding changes no weight and no training, batches equal single prompts, sampling is seeded."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qlora.generation
import qlora.kernels.gemv
import qlora.lora.dora as dora_module
from qlora.config.generate import Sampling
from qlora.config.lora import LoRAConfig
from qlora.generation import SeededDraw, fast_decoding, generate, generate_samples, stream_answer
from qlora.kernels.compile import compile_c
from qlora.kernels.gemv import SOURCE
from qlora.lora.adapter import activate, active_adapter, create_adapter, inject_lora, lora_layers
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.decode import decode_copy, decode_in_place
from qlora.quant.layers import Linear4bit, Linear16bit, dense_weight
from qlora.quant.library import has_avx512bf16
from qlora.quant.weight import QuantConfig, quantize_weight
from qlora.system.errors import InputError
from tests.models import save_tiny_llama
from tests.reference import dequantize, relative_error
from tests.tiny import tiny_tokenizer

PROMPTS = ["Hi", "What is the capital of France?", "a b c d e f g", "Tell me more about it"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=tiny_tokenizer()))


@pytest.fixture
def model(tiny: str) -> Any:
    model = load_base_model(tiny, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(rank=4, dropout=0.5), seed=1)
    freeze_base(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.weights.lora_B, std=0.1)
    return model


def chats(texts: list[str]) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def greedy_reference(model: Any, tokenizer: Any, text: str, count: int) -> str:
    """Slow and obvious: run the whole sequence again for every token, no cache, no batch."""
    from qlora.data.encode import encode_prompt

    prompt = encode_prompt(chats([text])[0], tokenizer)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_greedy_equals_recomputing_everything(model: Any, tiny: str) -> None:
    """Batched, left-padded and cached decoding gives the tokens of the plain loop."""
    tokenizer = load_tokenizer(tiny)
    model.eval()
    expected = [greedy_reference(model, tokenizer, text, 12) for text in PROMPTS]
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, chats(PROMPTS), Sampling(12), batch_size=4) == expected
    assert generate(model, tokenizer, chats(PROMPTS), Sampling(12), batch_size=1) == expected


def test_raw_continues_the_text(model: Any, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No template and no role; the rest of each text with its white space, alone, in a batch and streamed."""
    tokenizer, texts, rest = load_tokenizer(tiny), ["The future of AI is", "a b c", "Hi"], []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])
        before = len(ids)
        with torch.no_grad():
            while len(ids) < before + 12 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rest.append(tokenizer.decode(ids[before:], skip_special_tokens=True))
    assert generate(model, tokenizer, texts, Sampling(12), raw=True) == rest
    assert rest[0] != generate(model, tokenizer, chats(texts[:1]), Sampling(12))[0], "a question is not a text"
    capsys.readouterr()
    assert stream_answer(model, tokenizer, texts[0], Sampling(12), raw=True) == rest[0]
    assert capsys.readouterr().out.strip() == (texts[0] + rest[0]).strip()
    half = rest[0][: len(rest[0]) // 2 + 1]
    assert generate(model, tokenizer, texts[:1], Sampling(12, stop_texts=[half[-1]]), raw=True) == [
        rest[0][: rest[0].index(half[-1])]
    ]
    for wrong in (chats(["Hi"]), [""]):
        with pytest.raises(InputError, match="raw continues texts"):
            generate(model, tokenizer, wrong, raw=True)


def test_raw_keeps_the_first_space_of_sentencepiece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded alone, LLaMA's "▁is" is "is"."""

    class Tokenizer:
        words = ("<s>", "▁AI", "▁is", "▁here")

        def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
            return ["".join(self.words[i] for i in row if i).replace("▁", " ").lstrip() for row in rows]

    monkeypatch.setattr(qlora.generation, "encode_prompt", lambda turns, tokenizer: [0, 1])
    monkeypatch.setattr(qlora.generation, "continue_ids", lambda *args, **options: [[[2, 3]]])
    assert generate(None, Tokenizer(), ["AI"], raw=True) == [" is here"]


@pytest.mark.parametrize("chat_template", [True, False])
def test_a_base_without_a_template_says_what_it_does(
    chat_template: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora.cli.commands.generate import main

    tiny = save_tiny_llama(tmp_path / "tiny", tokenizer=tiny_tokenizer(chat_template=chat_template))
    command = [
        "--model",
        str(tiny),
        "--prompt",
        "The future",
        "--max-new-tokens",
        "4",
        "--compute-dtype",
        "float32",
    ]
    notes = []
    for flags in ([], ["--raw"]):
        capsys.readouterr()
        main([*command, *flags])
        printed = capsys.readouterr()
        assert printed.out.startswith("The future") == bool(flags)
        notes.append([line for line in printed.err.splitlines() if line.startswith("note")])
    if chat_template:
        assert notes == [[], []]
    else:
        assert notes == [
            ["note: the model has no chat template and answers in a plain one; --raw continues the text"],
            ["note: the model has no chat template and continues the prompt as plain text"],
        ]


def test_sampling_is_seeded_and_leaves_the_global_generator(model: Any, tiny: str) -> None:
    tokenizer = load_tokenizer(tiny)
    torch.manual_seed(5)
    expected_draw = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        generate(model, tokenizer, chats(PROMPTS), Sampling(12, 1.5, 0.95, seed)) for seed in (1, 1, 2)
    )
    assert first == again and first != other
    assert torch.equal(torch.rand(3), expected_draw)


def sampled_reference(model: Any, tokenizer: Any, text: str, seed: tuple[int, ...], count: int) -> str:
    """Slow and obvious: run the whole sequence again for every token, and draw by the same random numbers."""
    from qlora.data.encode import encode_prompt

    prompt = encode_prompt(chats([text])[0], tokenizer)
    ids, generator = list(prompt), np.random.default_rng(seed)
    with torch.no_grad():
        for _ in range(count):
            logits = model(torch.tensor([ids])).logits[0, -1].double() / 1.5
            probabilities = logits.softmax(dim=0).numpy()
            falling = np.argsort(-probabilities)
            before = probabilities[falling].cumsum() - probabilities[falling]
            probabilities[falling[before >= 0.95]] = 0  # without these, the rest still has 0.95
            token = int((probabilities / generator.standard_exponential(len(probabilities), np.float32)).argmax())
            ids.append(token)
            if token == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


def test_samples_equal_recomputing_everything(model: Any, tiny: str) -> None:
    """Whatever is decoded beside a sample, and although its prompt is computed once for all samples."""
    tokenizer = load_tokenizer(tiny)
    model.eval()
    expected = [
        [sampled_reference(model, tokenizer, text, (7, i, s), 12) for s in range(3)]
        for i, text in enumerate(PROMPTS)
    ]
    assert len({text for texts in expected for text in texts}) == 12
    sampling = Sampling(12, 1.5, 0.95, seed=7)
    for batch_size in (1, 2, 16):
        assert generate_samples(model, tokenizer, chats(PROMPTS), 3, sampling, batch_size) == expected
    first = [texts[0] for texts in expected]
    assert generate(model, tokenizer, chats(PROMPTS), sampling) == first
    share = generate_samples(model, tokenizer, chats(PROMPTS[2:]), 3, sampling, numbers=[2, 3])
    assert share == expected[2:]


def test_the_prompt_is_computed_once(model: Any, tiny: str) -> None:
    """The rows that the first layer sees, beside one token for each sample: each prompt's once."""
    rows: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, Linear4bit))
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][..., 0].numel()))
    generate_samples(model, load_tokenizer(tiny), chats(["Hi there"] * 2), 8, Sampling(2, 1.0))
    handle.remove()
    assert rows[0] > 16 and rows[0] % 2 == 0 and rows[1:] == [16, 16]


def test_draws_follow_the_probabilities() -> None:
    """5,000 draws of 6 tokens: counts within 4 standard deviations; the tail beyond top_p never."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01])
    scores = probabilities.log().expand(5_000, -1) * 2
    drawn = SeededDraw(2.0, 1.0, [(1, i) for i in range(5_000)])(torch.zeros(5_000, 1), scores).argmax(dim=1)
    counts = torch.bincount(drawn, minlength=6)
    deviation = (5_000 * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - 5_000 * probabilities).abs() < 4 * deviation).all()
    drawn = SeededDraw(2.0, 0.8, [(1, i) for i in range(5_000)])(torch.zeros(5_000, 1), scores).argmax(dim=1)
    assert set(drawn.tolist()) == {0, 1, 2}


def test_generating_between_steps_leaves_training_untouched(model: Any, tiny: str) -> None:
    ids = torch.arange(5, 45)[None]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        for parameter in lora_parameters(model):
            parameter.grad = None
        model(ids).logits.square().mean().backward()
        return [parameter.grad.clone() for parameter in lora_parameters(model)]

    model.train()
    before = gradients()
    weights = {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    generate(model, load_tokenizer(tiny), chats(PROMPTS), Sampling(4))
    assert model.training and weights
    assert all(torch.equal(weights[n], model.get_submodule(n).weight.data) for n in weights)
    assert all(m.decode is None for m in model.modules() if isinstance(m, Linear4bit))
    after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and before[0].abs().max() > 0


def train(model: Any, tokenizer: Any, generates: bool) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and adapters of four steps with dropout, its random numbers drawn from one run of the generator."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for step in range(4):
        loss = model(torch.arange(5, 45)[None]).logits.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if generates and step % 2 == 0:
            generate(model, tokenizer, chats(PROMPTS), Sampling(3, float(step)))
    return losses, [parameter.detach().clone() for parameter in lora_parameters(model)]


@pytest.mark.parametrize("compiler", [True, False])
def test_a_run_that_generates_is_the_run_that_does_not(
    tiny: str, compiler: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, greedy and sampled, by the kernel and by copies; and no copy outlives its generation."""
    if not compiler:
        monkeypatch.setattr(qlora.kernels.gemv, "compile_c", lambda source: None)
    copies: list[weakref.ref[Any]] = []

    def recorded(*arguments: Any) -> Any:
        copies.append(weakref.ref(function := decode_copy(*arguments)))
        return function

    monkeypatch.setattr(qlora.generation, "decode_copy", recorded)
    runs = []
    for generates in (False, True):
        model = load_base_model(tiny, compute_dtype="float32", cache=False)
        inject_lora(model, LoRAConfig(rank=4, dropout=0.5, adapter_dtype="float32"), seed=1)
        freeze_base(model)
        runs.append(train(model, load_tokenizer(tiny), generates))
    assert runs[0][0] == runs[1][0] and len(set(runs[0][0])) == 4
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))
    gc.collect()
    assert copies and all(copy() is None for copy in copies)
    assert all(m.decode is None for m in model.modules() if isinstance(m, (Linear4bit, Linear16bit)))


def test_without_a_compiler_the_answers_are_the_same(
    model: Any, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(tiny)
    expected = generate(model, tokenizer, chats(PROMPTS), Sampling(12))
    monkeypatch.setattr(qlora.kernels.gemv, "compile_c", lambda source: None)
    assert generate(model, tokenizer, chats(PROMPTS), Sampling(12)) == expected


def test_the_copies_are_dropped_when_decoding_fails(model: Any) -> None:
    with pytest.raises(KeyError), fast_decoding(model):
        assert any(m.decode is not None for m in model.modules() if isinstance(m, Linear4bit))
        raise KeyError
    assert all(m.decode is None for m in model.modules() if isinstance(m, Linear4bit))


# ---- decoding from the stored weight ----------------------------------------------------------------------


@pytest.fixture
def compiler() -> None:
    if compile_c(SOURCE) is None:
        pytest.skip("no C compiler")


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 9])  # of x: tiles of 4, 2 and 1
@pytest.mark.parametrize(
    ("rows", "columns", "quant"),
    [
        (6, 128, QuantConfig()),  # a tile of 4 rows of W, and two by themselves
        (520, 128, QuantConfig("fp4")),  # 1040 blocks: five 8-bit groups of scales
        (8, 256, QuantConfig("nf4", double_quant=False, block_size=128)),
    ],
)
def test_a_4bit_weight_decodes_where_it_lies(
    rows: int, columns: int, quant: QuantConfig, num_rows: int, dtype: torch.dtype
) -> None:
    """The training path's weights to the last bit, so only the order of fp32 sums differs, by a few of their ulps.

    In bf16 such a sum may round the other way: an ulp of bf16, 2^-8, in a few of the outputs.
    """
    torch.manual_seed(0)
    layer = Linear4bit(quantize_weight(torch.randn(rows, columns), quant), torch.randn(rows))
    stored = layer.weight.data.clone()
    x = torch.randn(num_rows, 1, columns, dtype=dtype)
    decode = decode_in_place(layer, dtype)
    assert decode is not None
    actual = decode(x)
    assert actual.dtype == dtype and actual.shape == (num_rows, 1, rows)
    weight = dequantize(layer.weight).to(dtype).double()  # an ulp of fp32 from bitsandbytes' at most
    expected = x.double() @ weight.T + layer.bias.double()
    assert relative_error(actual, expected) < (1e-6 if dtype == torch.float32 else 2**-8)
    with torch.no_grad():
        assert relative_error(actual, layer(x)) < (1e-6 if dtype == torch.float32 else 1e-3)
    assert torch.equal(layer.weight.data, stored)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_16bit_weight_decodes_where_it_lies(dtype: torch.dtype) -> None:
    """As above, and by the values that the weight has when it is called."""
    torch.manual_seed(0)
    layer = Linear16bit(torch.randn(33, 80, dtype=torch.bfloat16), None)
    x = torch.randn(7, 80, dtype=dtype)
    decode = decode_in_place(layer, dtype)
    assert decode is not None
    for _ in range(2):
        expected = x.double() @ layer.weight.double().T
        assert relative_error(decode(x), expected) < (1e-6 if dtype == torch.float32 else 2**-8)
        layer.weight.data = layer.weight.data.flip(0)


def test_what_no_kernel_fits_is_left_to_copies() -> None:
    """Rows that are no whole number of blocks or vectors, and weights in fp32."""
    ragged = Linear4bit(quantize_weight(torch.randn(32, 96), QuantConfig()), None)
    assert decode_in_place(ragged, torch.float32) is None
    for weight in (torch.randn(8, 24, dtype=torch.bfloat16), torch.randn(8, 32)):
        assert decode_in_place(Linear16bit(weight, None), torch.float32) is None


# ---- copies -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_copy_gives_the_training_numbers(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer = Linear4bit(quantize_weight(torch.randn(96, 128), QuantConfig()), torch.randn(96) if bias else None)
    x, one = torch.randn(3, 128, dtype=dtype), torch.eye(128, dtype=dtype)
    decode = decode_copy(layer, dtype, dense=True)
    with torch.no_grad():
        assert torch.equal(decode(one), layer(one))  # the weights, to the last bit
        assert relative_error(decode(x), layer(x)) < (1e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.skipif(not has_avx512bf16(), reason="bitsandbytes' packed layout is for AVX512-BF16 CPUs")
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_packed_copy_is_close_and_leaves_the_weight(quant_type: str) -> None:
    """Scales and activations are rounded to bf16 (2^-9 each, relative), so about 0.4 % of the output's norm."""
    torch.manual_seed(0)
    layer = Linear4bit(quantize_weight(torch.randn(96, 128), QuantConfig(quant_type)), torch.randn(96))
    before = layer.weight.data.clone()
    x = torch.randn(3, 128)
    expected = x @ dense_weight(layer, torch.float32).T + layer.bias
    actual = decode_copy(layer, torch.float32, dense=False)(x)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() / expected.norm() < 6e-3
    assert torch.equal(layer.weight.data, before) and layer.weight.quant_state.nested


def test_a_shape_the_packed_layout_cannot_hold_still_decodes() -> None:
    """bitsandbytes asserts out_features % 32 and cuts scales by whole blocks: 40 rows, 48 columns fit neither."""
    layer = Linear4bit(quantize_weight(torch.randn(40, 48), QuantConfig()), None)
    x = torch.randn(2, 48)
    with torch.no_grad():
        assert torch.equal(decode_copy(layer, torch.float32, dense=False)(x), layer(x))


def test_streaming_prints_the_answer(model: Any, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = stream_answer(model, load_tokenizer(tiny), "Hi", Sampling(8))
    assert answer and capsys.readouterr().out.strip() == answer


@pytest.mark.gpu
def test_cuda_decoding_is_close_to_training_layout(tiny: str) -> None:
    layer = Linear4bit(quantize_weight(torch.randn(96, 128, device="cuda"), QuantConfig()), None)
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        actual = decode_copy(layer, torch.bfloat16, dense=False)(x)
    assert (actual - expected).float().norm() / expected.float().norm() < 1e-2


# ---- DoRA -------------------------------------------------------------------------------------------------


@pytest.fixture
def dora(tiny: str) -> Any:
    model = load_base_model(tiny, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(rank=4, use_dora=True), seed=1)
    freeze_base(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.weights.lora_B, std=0.1)
        layer.weights.magnitude.data *= 1.3
    return model


def test_doras_scale_is_computed_once(dora: Any, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every token: it takes the whole weight."""
    tokenizer = load_tokenizer(tiny)
    expected = [greedy_reference(dora.eval(), tokenizer, text, 12) for text in PROMPTS]
    calls: list[Any] = []
    norms = dora_module.weight_norm
    monkeypatch.setattr(
        dora_module, "weight_norm", lambda layer, dtype: calls.append(layer) or norms(layer, dtype)
    )
    assert generate(dora, tokenizer, chats(PROMPTS), Sampling(12)) == expected
    assert len(calls) == len(set(calls)) == len(lora_layers(dora)) == 4


def test_the_fixed_scale_ends_with_the_block(dora: Any, tiny: str) -> None:
    """Training after it, and another adapter within it, compute with their own scale."""
    layers = list(lora_layers(dora).values())
    ids = torch.arange(5, 45)[None]
    dora.train()
    before = dora(ids).logits
    with pytest.raises(KeyError), fast_decoding(dora):
        assert all(layer.fixed_scale is not None for layer in layers)
        raise KeyError
    assert all(layer.fixed_scale is None for layer in layers)
    generate(dora, load_tokenizer(tiny), chats(PROMPTS), Sampling(2))
    after = dora(ids).logits
    assert torch.equal(after, before)
    after.square().mean().backward()  # of norms that were made in inference mode
    assert all(layer.weights.magnitude.grad.abs().max() > 0 for layer in layers)
    other = create_adapter(dora, LoRAConfig(rank=2, use_dora=True))
    with torch.no_grad():
        mine = active_adapter(dora)
        activate(dora, other)
        expected = dora.eval()(ids).logits
        activate(dora, mine)
        with fast_decoding(dora):
            activate(dora, other)
            torch.testing.assert_close(dora(ids).logits, expected, rtol=1e-4, atol=1e-4)
