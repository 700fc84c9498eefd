"""What must hold whatever the input: hypothesis looks for a counterexample.

QLORA_FUZZ=N tries N cases of each property (N / 50 of the slow ones); the default keeps the file short. The cases
are a fixed list for a given N, so CI cannot fail by luck.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora.adapters.peft_files import snapshot_adapter
from qlora.config.lora import LoRAConfig
from qlora.data.batches import (
    Batch,
    balance_by_length,
    collate_packed,
    collate_padded,
    make_batches,
    pack_examples,
)
from qlora.data.encode import encode_prompt
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.order import WindowOrder
from qlora.lora.adapter import inject_lora
from qlora.lora.optimizer import MasterOptimizer, build_optimizer
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.system.errors import StoppedOnRequest
from qlora.training.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from qlora.training.held_out import HeldOut
from qlora.training.lines import LinesFile, Metrics
from qlora.training.loop import Limits, Trainer, TrainingData
from qlora.training.observer import Observer, Stop
from qlora.training.progress import Progress
from qlora.training.saver import Saver
from qlora.training.schedule import build_schedule
from tests.models import save_tiny_llama
from tests.shortcuts import encode_example
from tests.tiny import SPECIAL_TOKENS, tiny_tokenizer

CASES = int(os.environ.get("QLORA_FUZZ", "60"))
fuzz = settings(max_examples=CASES, deadline=None, derandomize=True, database=None)
fuzz_slow = settings(fuzz, max_examples=max(10, CASES // 50))


# ---- packing ----------------------------------------------------------------------------------------------


@st.composite
def example_lists(draw: st.DrawFn, longest: int = 20, min_size: int = 1) -> list[Example]:
    """Examples whose first token (from 1 on) is their own; 0, the padding, is a real token further on."""
    masks = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=longest), min_size=min_size, max_size=24))
    examples = []
    for number, is_target in enumerate(masks, start=1):
        ids = torch.arange(len(is_target) + 1) % 7
        ids[0] = number
        examples.append(Example(ids[:-1], ids[1:].masked_fill(~torch.tensor(is_target), IGNORE_INDEX)))
    return examples


def content(example: Example) -> tuple[list[int], list[int]]:
    return example.input_ids.tolist(), example.targets.tolist()


def sequences(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(input ids, targets) of every sequence of a batch; what lies around and between them is checked here."""
    assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape
    if batch.cu_seqlens is not None:
        assert len(batch.input_ids) == 1 and batch.cu_seqlens.dtype == torch.int32
        bounds = batch.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == batch.input_ids.shape[1]
        spans = [(0, a, b) for a, b in pairwise(bounds)]
    else:
        lengths = [len(row) for row in batch.position_ids]
        spans = [(row, 0, length) for row, length in enumerate(lengths)]
    found = []
    for row, start, end in spans:
        assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
        found.append((batch.input_ids[row, start:end].tolist(), batch.targets[row, start:end].tolist()))
    return found


def check_holds(batches: list[Batch], examples: list[Example]) -> None:
    """The batches hold these examples, each once, with nothing but masked padding besides."""
    by_first_token = {int(e.input_ids[0]): content(e) for e in examples}
    for batch in batches:
        held = []
        for ids, targets in sequences(batch):
            expected_ids, expected_targets = by_first_token.pop(ids[0])
            padding = len(ids) - len(expected_ids)
            assert padding == 0 or batch.cu_seqlens is None
            assert ids == expected_ids + [0] * padding
            assert targets == expected_targets + [IGNORE_INDEX] * padding
            held.append((len(expected_ids), sum(t != IGNORE_INDEX for t in expected_targets)))
        assert batch.max_length == max(length for length, _ in held)
        assert (batch.num_tokens, batch.num_targets) == tuple(map(sum, zip(*held, strict=True)))
    assert not by_first_token, "examples were lost"


lengths_lists = st.lists(st.integers(1, 90), max_size=50)


@fuzz
@given(lengths=lengths_lists, budget=st.integers(1, 100))
def test_bins_hold_every_index_once_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = pack_examples(lengths, budget)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(len(bin_) == 1 or sum(lengths[i] for i in bin_) <= budget for bin_ in bins)
    assert pack_examples(tuple(lengths), budget) == bins


@fuzz
@given(lengths=lengths_lists, devices=st.integers(1, 9))
def test_hands_are_a_balanced_partition(lengths: list[int], devices: int) -> None:
    hands = balance_by_length(lengths, devices)
    assert len(hands) == devices
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    assert balance_by_length(tuple(lengths), devices) == hands


@fuzz
@given(examples=example_lists())
def test_collating_loses_nothing_and_lets_nothing_cross(examples: list[Example]) -> None:
    packed, padded = collate_packed(examples), collate_padded(examples)
    assert packed.cu_seqlens is not None and padded.cu_seqlens is None
    check_holds([packed], examples)
    check_holds([padded], examples)
    assert packed.input_ids.numel() == packed.num_tokens == padded.num_tokens
    assert sequences(packed) == [content(e) for e in examples]  # in their order, too


@fuzz
@given(
    examples=example_lists(min_size=0),
    batch_size=st.integers(1, 6),
    spare=st.integers(0, 30),
    packing=st.booleans(),
)
def test_micro_batches_hold_every_example_within_the_budget(
    examples: list[Example], batch_size: int, spare: int, packing: bool
) -> None:
    max_length = max((len(e) for e in examples), default=1) + spare
    batches = make_batches(examples, batch_size, max_length, packing)
    check_holds(batches, examples)
    assert all(b.input_ids.numel() <= batch_size * max_length for b in batches)
    assert all((b.cu_seqlens is not None) == packing for b in batches)
    if not packing:
        assert len(batches) == -(-len(examples) // batch_size)


# ---- data order -------------------------------------------------------------------------------------------


@fuzz
@given(count=st.integers(1, 70), size=st.integers(1, 20), seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
@example(count=10, size=4, seed=0, epoch=1)
def test_an_epoch_is_a_permutation_and_its_rest_a_window(count: int, size: int, seed: int, epoch: int) -> None:
    order = WindowOrder(count, size, seed)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    windows = [order.window(step) for step in steps]
    assert sorted(index for window in windows for index in window) == list(range(count))
    assert [len(window) for window in windows[:-1]] == [size] * (len(windows) - 1)
    assert len(windows[-1]) == (count % size or size)


@fuzz
@given(
    count=st.integers(1, 50),
    size=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    steps=st.lists(st.integers(0, 60), min_size=1, max_size=20),
)
def test_the_step_alone_decides_the_window(count: int, size: int, seed: int, steps: list[int]) -> None:
    """Asked in any order, of an object that was asked before or of a new one; the global generator has no say."""
    asked_before = WindowOrder(count, size, seed)
    expected = {step: asked_before.window(step) for step in range(61)}
    torch.manual_seed(steps[0])
    state = torch.get_rng_state()
    assert [asked_before.window(step) for step in steps] == [expected[step] for step in steps]
    assert [WindowOrder(count, size, seed).window(step) for step in steps] == [expected[step] for step in steps]
    assert torch.equal(torch.get_rng_state(), state)


@fuzz
@given(
    examples=example_lists(),
    per_device=st.integers(1, 3),
    seed=st.integers(0, 99),
    step=st.integers(0, 30),
    packing=st.booleans(),
)
def test_a_window_does_not_depend_on_how_it_is_split(
    examples: list[Example], per_device: int, seed: int, step: int, packing: bool
) -> None:
    """4n examples a step: 4n x 1, 2n x 2 or n x 4 (micro-batch x accumulation) on 1, 2 or 4 devices."""
    window_size, max_length = 4 * per_device, max(len(e) for e in examples)
    chosen = WindowOrder(len(examples), window_size, seed).window(step)
    window = [examples[i] for i in chosen]
    for devices in (1, 2, 4):
        for grad_accum in (1, 2, 4):
            batch_size = max(1, window_size // (devices * grad_accum))
            hands = balance_by_length([len(e) for e in window], devices)
            batches = [
                batch
                for hand in hands
                for batch in make_batches([window[i] for i in hand], batch_size, max_length, packing)
            ]
            check_holds(batches, window)


@fuzz
@given(count=st.integers(12, 80), seeds=st.lists(st.integers(0, 10**6), min_size=2, max_size=3, unique=True))
def test_seeds_and_epochs_differ(count: int, seeds: list[int]) -> None:
    """12! is 5e8: an equal pair among the few dozen compared here is no luck."""
    orders = [WindowOrder(count, count, seed).window(epoch) for seed in seeds for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert list(range(count)) not in orders


# ---- schedule ---------------------------------------------------------------------------------------------


@fuzz
@given(
    name=st.sampled_from(["cosine", "linear", "constant"]),
    peak=st.floats(1e-7, 1.0),
    warmup_steps=st.integers(0, 40),
    decay_steps=st.integers(1, 400),
    steps=st.lists(st.integers(0, 440), max_size=20),
)
def test_the_schedule_rises_to_its_peak_and_falls_to_zero(
    name: str, peak: float, warmup_steps: int, decay_steps: int, steps: list[int]
) -> None:
    total_steps = warmup_steps + decay_steps
    schedule = build_schedule(name, peak, warmup_steps, total_steps)
    rates = [schedule(step) for step in range(total_steps)]
    assert all(0 < rate <= peak for rate in rates)  # from the first step on, and in the last one too
    rising, falling = rates[: warmup_steps + 1], rates[warmup_steps:]
    assert rising[-1] == peak
    assert all(a < b for a, b in pairwise(rising))
    if name == "constant":
        assert set(falling) == {peak}
    else:
        assert all(a > b for a, b in pairwise(falling))
        assert rates[-1] <= peak / decay_steps * (1 + 1e-9)  # linear's last step; the cosine is below it
        assert schedule(total_steps) == schedule(total_steps + 7) <= peak * 1e-16
    fresh = build_schedule(name, peak, warmup_steps, total_steps)
    assert [fresh(step) for step in steps] == [schedule(step) for step in steps]


@fuzz
@given(warmup_steps=st.integers(1, 50), name=st.sampled_from(["cosine", "linear", "constant"]), data=st.data())
def test_a_warm_up_longer_than_the_run_only_rises(warmup_steps: int, name: str, data: st.DataObject) -> None:
    total_steps = data.draw(st.integers(1, warmup_steps))
    schedule = build_schedule(name, 1.0, warmup_steps, total_steps)
    rates = [0.0, *(schedule(step) for step in range(total_steps)), 1.0]
    assert all(a < b for a, b in pairwise(rates))


# ---- tokenizing -------------------------------------------------------------------------------------------

END_OF_TURN = "<|im_end|>"
# What has gone wrong at boundaries before: blanks and newlines at either end, joined emoji, marks that combine.
PIECES = [
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r\n",
    "\xa0",
    "\u2028",
    "the",
    " in",
    "0",
    "12",
    "🙂",
    "👩‍👩‍👧",
    "e\u0301",
    "日本",
    "{{ x }}",
]


def join(pieces: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(pieces, max_size=5).map("".join)


any_text = join(st.sampled_from(PIECES) | st.text(max_size=4))
# Control tokens, parts of them, and the private-use characters that stand in for them inside qlora/data/encode.py.
control_text = join(st.sampled_from([*SPECIAL_TOKENS, "im_end|>", "<", "\n", "a", "\ue000", "\ue001\U000f0000"]))
# SmolLM2's vocabulary lacks five control characters and the byte that begins U+40000 to U+BFFFF, all unassigned.
smollm2_characters = st.characters(
    max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8"
)
smollm2_text = join(st.sampled_from(PIECES) | st.text(smollm2_characters, max_size=4))


@st.composite
def conversations(draw: st.DrawFn, content: st.SearchStrategy[str]) -> list[dict[str, Any]]:
    """Perhaps a system message, then one to four questions and answers; some answers have weight 0, not all."""
    messages: list[dict[str, Any]] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(content)})
    muted = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    assume(not all(muted))
    for is_muted in muted:
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)} | ({"weight": 0} if is_muted else {}))
    return messages


def render(messages: list[dict[str, Any]], chat_template: bool, add_bos: bool) -> str:
    """ChatML, or the headings of a model without a template, written out without jinja."""
    if chat_template:
        return "".join(f"<|im_start|>{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in messages)
    forms = {
        "system": "{}\n\n",
        "user": "### Instruction:\n{}\n\n",
        "assistant": "### Response:\n{}" + END_OF_TURN + "\n\n",
    }
    return ("<s>" if add_bos else "") + "".join(forms[m["role"]].format(m["content"]) for m in messages)


def without_end(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers that end in the token that the template writes after them have it once."""
    return [
        m | {"content": m["content"].rstrip().removesuffix(END_OF_TURN)}
        if m["role"] == "assistant" and m["content"].rstrip().endswith(END_OF_TURN)
        else m
        for m in messages
    ]


def check_tokenized(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    rendered: str,
    rendered_empty: str,
    cut: int,
    parse_special: bool,
) -> None:
    """The row against its text, its prompts, its control tokens and its truncation.

    Args:
        rendered: the whole conversation; rendered_empty: the same with empty messages, so the template's share.
    """

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    row, everything = (
        encode_example(messages, tokenizer, 10**6, train_on, parse_special=parse_special)
        for train_on in ("completion", "all")
    )
    ids = [*everything.input_ids.tolist(), int(everything.targets[-1])]
    assert row.input_ids.tolist() == ids[:-1] and everything.targets.tolist() == ids[1:]
    assert decode(ids) == rendered
    for token in tokenizer.all_special_tokens:
        wanted = rendered if parse_special else rendered_empty  # otherwise text that spells a token is text
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == wanted.count(token)

    end_of_turn, trained = tokenizer.convert_tokens_to_ids(END_OF_TURN), []
    is_target = [target != IGNORE_INDEX for target in row.targets.tolist()]
    assert all(t in (i, IGNORE_INDEX) for i, t in zip(ids[1:], row.targets.tolist(), strict=True))
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:index], tokenizer, parse_special)
            assert ids[: len(prompt)] == prompt
            end = len(prompt) - 1  # the position that predicts the answer's first token
            if message.get("weight") != 0:
                while end < len(is_target) and is_target[end]:
                    end += 1
                trained += ids[len(prompt) : end + 1]
                assert ids[end] == end_of_turn, "the model learns to stop"
                answer = without_end([message])[0]["content"] if parse_special else message["content"]
                assert decode(ids[len(prompt) : end + 1]) == answer + END_OF_TURN
            assert end == len(is_target) or not is_target[end]
    assert trained == [t for t in row.targets.tolist() if t != IGNORE_INDEX], "only answers are trained"

    short = encode_example(messages, tokenizer, cut, parse_special=parse_special)
    assert short.input_ids.tolist() == row.input_ids.tolist()[:cut]
    assert short.targets.tolist() == row.targets.tolist()[:cut]


TINY_TOKENIZERS = {
    (chat_template, add_bos, pad_is_eos): tiny_tokenizer(chat_template, add_bos, pad_is_eos)
    for chat_template in (True, False)
    for add_bos in (True, False)
    for pad_is_eos in (True, False)
}


def empty(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message | {"content": ""} for message in messages]


@fuzz
@given(
    messages=conversations(any_text) | conversations(control_text),
    kind=st.sampled_from(sorted(TINY_TOKENIZERS)),
    cut=st.integers(1, 200),
    parse_special=st.booleans(),
)
def test_a_row_is_its_text_and_begins_with_its_prompts(
    messages: list[dict[str, Any]], kind: tuple[bool, bool, bool], cut: int, parse_special: bool
) -> None:
    written = without_end(messages) if parse_special else messages
    rendered, rendered_empty = (render(m, kind[0], kind[1]) for m in (written, empty(messages)))
    check_tokenized(messages, TINY_TOKENIZERS[kind], rendered, rendered_empty, cut, parse_special)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(smollm2).parent, gguf_file=Path(smollm2).name)


@fuzz_slow
@given(
    messages=conversations(smollm2_text) | conversations(control_text),
    cut=st.integers(1, 200),
    parse_special=st.booleans(),
)
def test_a_row_of_smollm2_is_its_text_and_begins_with_its_prompts(
    smollm2_tokenizer: Any, messages: list[dict[str, Any]], cut: int, parse_special: bool
) -> None:
    default = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}
    written = without_end(messages) if parse_special else messages
    told = written if messages[0]["role"] == "system" else [default, *written]
    rendered, rendered_empty = (render(m, chat_template=True, add_bos=False) for m in (told, empty(told)))
    check_tokenized(messages, smollm2_tokenizer, rendered, rendered_empty, cut, parse_special)


@fuzz
@given(text=any_text, kind=st.sampled_from(sorted(TINY_TOKENIZERS)), cut=st.integers(1, 40))
def test_a_document_is_its_text_and_an_end(text: str, kind: tuple[bool, bool, bool], cut: int) -> None:
    tokenizer = TINY_TOKENIZERS[kind]
    document = [{"role": "document", "content": text}]
    row = encode_example(document, tokenizer, 10**6)
    prompt = encode_prompt(document, tokenizer)
    assert row.input_ids.tolist() == prompt
    assert tokenizer.decode(prompt, clean_up_tokenization_spaces=False) == ("<s>" if kind[1] else "") + text
    ends = [*prompt[1:], tokenizer.eos_token_id][: len(prompt)]  # an empty row has no target
    assert row.targets.tolist() == (ends if text.strip() else [IGNORE_INDEX] * len(prompt))
    short = encode_example(document, tokenizer, cut)
    assert (short.input_ids.tolist(), short.targets.tolist()) == tuple(part[:cut] for part in content(row))


# ---- resuming ---------------------------------------------------------------------------------------------

VOLATILE = ("tokens_per_second", "peak_memory_gib")


class Killed(BaseException):
    """The process is gone: nobody catches it, nothing is saved."""


@dataclass
class Plan:
    """A run, and its interruptions: (n, True) kills it after n lines, (n, False) stops it at the n-th question."""

    num_examples: int
    batch_size: int
    grad_accum: int
    total_steps: int
    eval_every: int
    save_every: int
    keep_last: int
    dropout: float
    packing: bool
    adapter_dtype: str
    schedule: str
    seed: int
    poisoned: set[int]  # steps whose loss is not a number
    interruptions: list[tuple[int, bool]]


plans = st.builds(
    Plan,
    num_examples=st.integers(1, 12),
    batch_size=st.integers(1, 3),
    grad_accum=st.integers(1, 2),
    total_steps=st.integers(2, 9),
    eval_every=st.integers(0, 4),
    save_every=st.integers(0, 3),
    keep_last=st.integers(0, 2),
    dropout=st.sampled_from([0.0, 0.3]),
    packing=st.booleans(),
    adapter_dtype=st.sampled_from(["bfloat16", "float32"]),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    seed=st.integers(0, 10**6),
    poisoned=st.sets(st.integers(0, 4), max_size=2),
    interruptions=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=4),
)


def random_rows(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, 64, (int(length) + 1,), generator=generator) for length in torch.arange(count) % 9 + 3
    ]
    return [Example(ids[:-1], torch.where(ids[1:] < 40, ids[1:], IGNORE_INDEX)) for ids in rows]


def train_piece(base: str, directory: Path, plan: Plan, interruption: tuple[int, bool] | None) -> Progress:
    """What one process does: from the newest checkpoint in `directory` to the end or to the interruption."""
    model = load_base_model(base, compute_dtype="float32", cache=False)
    config = LoRAConfig(rank=2, dropout=plan.dropout, adapter_dtype=plan.adapter_dtype)  # type: ignore[arg-type]
    inject_lora(model, config, plan.seed)
    freeze_base(model)

    def make_optimizer() -> MasterOptimizer:
        return build_optimizer(lora_parameters(model), "adamw", weight_decay=0.01)

    checkpoint = find_checkpoint("auto", directory)
    if checkpoint is None:
        progress, optimizer = Progress(), make_optimizer()
    else:
        progress, optimizer = load_checkpoint(checkpoint, model, make_optimizer, {})
    begun_at = progress.step
    metrics = LinesFile(directory / "metrics.jsonl", progress)
    limit, is_killed = interruption or (10**6, True)
    lines = questions = 0

    class Killer(Observer):
        """Ends the run after so many lines of metrics."""

        def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
            nonlocal lines
            lines += 1
            if is_killed and lines == limit:
                raise Killed

        def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
            self.after_step(trainer, line)

    schedule = build_schedule(plan.schedule, 1e-2, 2, plan.total_steps)
    is_poisoned = False

    def learning_rate(step: int) -> float:  # asked right before the step
        nonlocal is_poisoned
        is_poisoned = step in plan.poisoned
        return schedule(step)

    model.get_input_embeddings().register_forward_hook(
        lambda module, _args, output: output * float("nan") if is_poisoned and module.training else output
    )

    def stop() -> str | None:
        nonlocal questions
        questions += 1
        return "asked to" if not is_killed and questions >= limit else None

    def save(state: Progress) -> None:
        snapshot = snapshot_adapter(model, config)
        moments = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
        save_checkpoint(checkpoint_path(directory, state.step), state, snapshot, moments, {})
        prune_checkpoints(directory, plan.keep_last)

    torch.rand(begun_at + 1)  # the global generator is not where it would be had the run not stopped
    try:
        rows, held_out = random_rows(plan.num_examples, plan.seed), random_rows(3, plan.seed + 1)
        observers = [
            HeldOut(plan.eval_every, stop=stop),
            Stop(stop),
            Saver(save, progress, plan.save_every),
            Metrics(metrics),
            Killer(),
        ]
        Trainer(
            model,
            optimizer,
            learning_rate,
            TrainingData(rows, plan.batch_size, plan.grad_accum, 12, plan.packing, plan.seed, held_out),
            Accelerator(),
            Limits(plan.total_steps, 1.0, len(plan.poisoned)),
            observers,
            say=lambda line: None,
        ).fit(progress)
    finally:
        metrics.close()
    return progress


def stored(directory: Path) -> tuple[list[str], dict[str, bytes], list[dict[str, Any]]]:
    """All that a finished run leaves: names of checkpoints, bytes of the last one's tensors, lines of metrics."""
    paths = list_checkpoints(directory)
    tensors = {
        f"{file} {name}": repr(tensor.dtype).encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for file in ("adapter_model.safetensors", "optimizer.safetensors")
        for name, tensor in load_file(paths[-1] / file).items()
    }
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return (
        [path.name for path in paths],
        tensors,
        [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines],
    )


def test_an_interrupted_run_equals_one_left_alone(tmp_path: Path) -> None:
    """Killed or asked to stop, anywhere and repeatedly: the same adapter, moments and metrics, bit for bit."""
    base = str(save_tiny_llama(tmp_path / "model", num_hidden_layers=1, vocab_size=64))
    resumed_from = []

    @fuzz_slow
    @given(plan=plans)
    def check(plan: Plan) -> None:
        with TemporaryDirectory(dir=tmp_path) as work:
            alone, interrupted = Path(work, "alone"), Path(work, "interrupted")
            for directory in (alone, interrupted):
                directory.mkdir()
            final = train_piece(base, alone, plan, None)
            for interruption in plan.interruptions:
                checkpoint = find_checkpoint("auto", interrupted)
                resumed_from.append(read_state(checkpoint)["progress"].step if checkpoint else 0)
                with suppress(Killed, StoppedOnRequest):
                    train_piece(base, interrupted, plan, interruption)
            assert train_piece(base, interrupted, plan, None) == final
            (names, *rest), (names_alone, *rest_alone) = stored(interrupted), stored(alone)
            assert rest == rest_alone and names[-1] == names_alone[-1]
            if all(is_killed for _, is_killed in plan.interruptions):  # a stop on request saves once more
                assert names == names_alone

    check()
    assert any(step > 0 for step in resumed_from), "no run was resumed from a checkpoint"
