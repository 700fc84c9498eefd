"""Log-likelihoods: packed and shared against one at a time; tokens and windows against lm-eval's own code."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import likelihood
from eval.likelihood import encode_pairs, log_likelihoods, rolling_windows, score_passages, text_ids
from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import save_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import lora_parameters
from qlora.model.load import load_base_model
from qlora.system.errors import InputError, TrainingStopped
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

Request = tuple[list[int], list[list[int]]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="module")
def adapter(directory: Path) -> Path:
    """An adapter whose B is not zero."""
    model = load_base_model(str(directory), compute_dtype="float32")
    config = LoRAConfig(target_modules="all-linear")
    inject_lora(model, config, seed=1)
    torch.manual_seed(2)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter.data, std=0.2)
    save_adapter(model, directory / "adapter", config)
    return directory / "adapter"


def some_requests(seed: int = 0) -> list[Request]:
    """Contexts of 1 to 39 tokens; continuations of one token each, of several, and both kinds."""
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(5, 260) for _ in range(count)]

    shapes = [(1, 1, 1, 1), (3, 1), (1, 8), (2, 5, 4, 7), (6,)]
    return [(ids(draw.randrange(1, 40)), [ids(n) for n in shapes[i % len(shapes)]]) for i in range(25)]


def one_at_a_time(model: Any, requests: list[Request], max_length: int) -> list[list[tuple[float, bool]]]:
    """The slow reference: a forward pass per continuation, unpacked, with all logits."""
    results = []
    for context, continuations in requests:
        found = []
        for ids in continuations:
            row = (context + ids)[-(max_length + 1) :]
            with torch.no_grad():
                log_p = model(torch.tensor([row[:-1]])).logits[0, -len(ids) :].float().log_softmax(-1)
            wanted = torch.tensor(ids)
            log_likelihood = log_p.gather(1, wanted[:, None]).sum().item()
            found.append((log_likelihood, bool((log_p.argmax(-1) == wanted).all())))
        results.append(found)
    return results


def assert_same(found: Any, expected: Any) -> None:
    assert [len(f) for f in found] == [len(e) for e in expected] and sum(map(len, found)) > 50
    pairs = [(f, e) for fs, es in zip(found, expected, strict=True) for f, e in zip(fs, es, strict=True)]
    assert [f[0] for f, _ in pairs] == pytest.approx([e[0] for _, e in pairs], abs=1e-4)  # fp32, sums of 8 tokens
    assert [f[1] for f, _ in pairs] == [e[1] for _, e in pairs]


@pytest.mark.parametrize("use_4bit", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_shared_and_packed_equal_one_at_a_time(
    directory: Path, adapter: Path, use_4bit: bool, adapted: bool
) -> None:
    model = load_base_model(str(directory), use_4bit, compute_dtype="float32")
    if adapted:
        load_adapter(model, adapter)
        model.eval()
    requests = some_requests()
    assert_same(log_likelihoods(model, requests, 512, 200), one_at_a_time(model, requests, 512))


def test_a_context_too_long_loses_its_beginning(directory: Path) -> None:
    model = load_base_model(str(directory), compute_dtype="float32")
    requests = some_requests(1)
    assert sum(len(context) > 12 for context, _ in requests) > 10
    assert_same(log_likelihoods(model, requests, 12, 200), one_at_a_time(model, requests, 12))
    with pytest.raises(InputError, match="A continuation has 8 tokens, more than --max-length 7"):
        log_likelihoods(model, requests, 7, 200)
    with pytest.raises(InputError, match="no token of its own"):
        log_likelihoods(model, [([5], [[]])], 7, 200)


def test_sliding_windows_are_kept(tmp_path: Path) -> None:
    """A mask of ours would replace the model's: there, branches take their trunk along."""
    from transformers import MistralConfig, MistralForCausalLM

    from tests.models import TINY

    torch.manual_seed(0)
    network = MistralForCausalLM(MistralConfig(**TINY, sliding_window=8, eos_token_id=2, bos_token_id=None))
    for parameter in network.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    network.save_pretrained(tmp_path / "mistral")
    model = load_base_model(str(tmp_path / "mistral"), compute_dtype="float32")
    requests = some_requests(2)
    assert_same(log_likelihoods(model, requests, 512, 200), one_at_a_time(model, requests, 512))


def test_a_context_is_computed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And single tokens add nothing to it."""
    model = load_base_model(str(directory), compute_dtype="float32")
    seen: list[int] = []
    forward = model.base_model.forward

    def count(**kwargs: Any) -> Any:
        seen.append(kwargs["input_ids"].numel())
        return forward(**kwargs)

    monkeypatch.setattr(model.base_model, "forward", count)
    log_likelihoods(model, [([5] * 30, [[6], [7], [8], [9]])], 512, 200)
    log_likelihoods(model, [([5] * 30, [[6, 7, 8], [7, 8], [9]])], 512, 200)
    assert seen == [30, 30 + 2 + 1]


def test_out_of_memory_halves_the_row(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base_model(str(directory), compute_dtype="float32")
    requests, forward = some_requests(3), model.base_model.forward
    expected = log_likelihoods(model, requests, 512, 300)
    limit, refused = 90, []

    def refuse(**kwargs: Any) -> Any:
        if kwargs["input_ids"].numel() > limit:
            refused.append(1)
            raise RuntimeError("CUDA out of memory")
        return forward(**kwargs)

    monkeypatch.setattr(model.base_model, "forward", refuse)
    assert_same(log_likelihoods(model, requests, 512, 300), expected)
    assert refused
    limit = 3
    with pytest.raises(TrainingStopped, match="lower --max-length"):
        log_likelihoods(model, requests, 512, 300)


@pytest.mark.parametrize(("stride", "length"), [(16, 1), (16, 16), (16, 17), (16, 50), (5, 50), (1, 23), (15, 64)])
def test_windows_are_lm_eval_s(stride: int, length: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 101 + length))
    windows = rolling_windows(ids, [True] * len(ids), 16, stride)
    theirs = utils.get_rolling_token_windows(ids[1:], ids[0], 16, 16 - stride + 1)
    expected = []
    for tokens, predicted in theirs:  # the last token of an input says where its first prediction stands
        expected.append((tokens, list(range(len(tokens) - len(predicted), len(tokens))), predicted))
    assert [(w.trunk, w.positions, w.tokens) for w in windows] == expected
    assert [token for window in windows for token in window.tokens] == ids[1:]


def test_windows_skip_what_is_not_scored() -> None:
    windows = rolling_windows(list(range(10)), [False] * 7 + [True, False, True], 3, 3)
    assert [(w.trunk, w.positions, w.tokens) for w in windows] == [([6, 7, 8], [0, 2], [7, 9])]


@pytest.mark.parametrize("add_bos", [False, True])
def test_pairs_are_encoded_as_by_lm_eval(tmp_path: Path, add_bos: bool) -> None:
    """Spaces at the cut, an empty context, a token across the cut (the two newlines), a BOS already there."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    model = huggingface.HFLM(pretrained=_network(), tokenizer=tokenizer, device="cpu", batch_size=1)
    contexts = ("Question:", "the  ", "a\n", "<s>the", " x")
    for context in contexts:
        for continuation in (" the answer", "\nand", "x", "  "):
            ours, (ids,) = encode_pairs(context, [continuation], tokenizer)
            assert (ours, ids) == model._encode_pair(context, continuation), (context, continuation)
            assert ours and text_ids(context, tokenizer) == model.tok_encode(context)
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert encode_pairs("", ["the", "<s>the"], tokenizer) == ([tokenizer.bos_token_id], [ids, ids])


def _network() -> Any:
    from transformers import LlamaForCausalLM

    from tests.models import tiny_llama_config

    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config())


def test_the_row_s_mask_sees_trunk_and_own_branch_alone() -> None:
    passages = [likelihood.Passage([1, 2], [[3], [4, 5]]), likelihood.Passage([6], [[7], [8]])]
    positions, mask = likelihood._tree_mask(passages)
    assert positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1]]
    sees = [[i for i, seen in enumerate(row) if seen] for row in mask[0, 0].tolist()]
    assert sees == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6], [5, 7]]


def test_nothing_asked_is_nothing_found(directory: Path) -> None:
    assert score_passages(load_base_model(str(directory), compute_dtype="float32"), [], 100) == []
