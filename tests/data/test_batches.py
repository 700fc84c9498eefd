"""data/batches.py: properties over seeded random cases, and packed against padded through a model."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.config.lora import LoRAConfig
from qlora.data import batches as packing
from qlora.data.batches import (
    CPU_TOKENS,
    Batch,
    balance_by_length,
    collate_packed,
    collate_padded,
    cut_evenly,
    largest_micro_batch,
    make_batches,
    pack_examples,
)
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.order import WindowOrder
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss
from tests.models import TINY, save_tiny_llama
from tests.reference import relative_error

MODEL_TOLERANCE = 1e-5  # two blocks, a few hundred fp32 roundings each, summed in another order


def random_lengths(rng: random.Random, longest: int) -> list[int]:
    return [rng.randint(1, longest) for _ in range(rng.randint(1, 60))]


def random_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    """Random tokens, token 0 (the padding) among them; about a third of the targets masked."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(0, TINY["vocab_size"], (length + 1,), generator=generator)
        ids[0] = 0
        masked = torch.rand(length, generator=generator) < 0.3
        examples.append(Example(ids[:-1], ids[1:].masked_fill(masked, IGNORE_INDEX)))
    return examples


# ---- bins -------------------------------------------------------------------------------------------------


def test_every_index_once_and_no_bin_over_budget() -> None:
    rng = random.Random(0)
    num_oversize = num_shared = 0
    for _ in range(300):
        budget = rng.randint(1, 120)
        lengths = random_lengths(rng, longest=150)
        bins = pack_examples(lengths, budget)
        assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
        for bin_ in bins:
            total = sum(lengths[index] for index in bin_)
            assert total <= budget or len(bin_) == 1, "only an oversize example exceeds, and alone"
            num_oversize += total > budget
            num_shared += len(bin_) > 1
        assert bins == pack_examples(list(lengths), budget)
        # First fit: at most one bin is half empty, or two would have been one.
        assert sum(2 * sum(lengths[i] for i in bin_) <= budget for bin_ in bins) <= 1
    assert num_oversize > 100 and num_shared > 100


def test_packing_of_a_known_case() -> None:
    assert pack_examples([3, 9, 4, 6, 1], budget=10) == [[1, 4], [3, 2], [0]]
    assert pack_examples([11, 10, 5, 5], budget=10) == [[0], [1], [2, 3]]
    assert pack_examples([], budget=10) == []


def test_dealing_is_balanced() -> None:
    """Longest first to the emptiest: loads differ by at most one example's length."""
    rng = random.Random(1)
    for _ in range(300):
        lengths, devices = random_lengths(rng, longest=100), rng.randint(1, 8)
        hands = balance_by_length(lengths, devices)
        assert len(hands) == devices
        assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
        loads = [sum(lengths[index] for index in hand) for hand in hands]
        assert max(loads) - min(loads) <= max(lengths)
        assert hands == balance_by_length(list(lengths), devices)
    assert balance_by_length([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert balance_by_length([5], 3) == [[0], [], []]


def test_parts_of_a_cpu_are_near_equal_and_as_many_as_the_tokens_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every index once, no part over the budget or `largest_micro_batch` says, none larger than it need be."""
    rng = random.Random(5)
    num_dealt = num_bound = 0
    monkeypatch.setattr(packing, "CPU_TOKENS", 64)
    for _ in range(500):
        lengths = random_lengths(rng, longest=rng.choice([20, 150]))
        batch_size, max_length = rng.randint(1, 9), max(lengths) + rng.randint(0, 20)
        budget = batch_size * max_length
        parts = cut_evenly(lengths, budget)
        assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
        loads = [sum(lengths[index] for index in part) for part in parts]
        assert max(loads) <= largest_micro_batch(batch_size, max_length, max(lengths), packing=True) <= budget
        assert parts == cut_evenly(list(lengths), budget)
        wanted = min(len(lengths), -(-sum(lengths) // 64))
        assert len(parts) >= wanted
        if max(loads) - min(loads) <= max(lengths):  # dealt, rather than filled up to a narrow budget
            num_dealt += len(parts) > 1
        num_bound += len(parts) > wanted
    assert num_dealt > 300 and num_bound > 30


def test_parts_of_a_known_case() -> None:
    assert cut_evenly([900, 800, 700, 500, 500], budget=8192) == [[0], [1, 4], [2, 3]]
    assert cut_evenly([600, 500, 400, 300, 200], budget=8192) == [[0, 3, 4], [1, 2]]
    assert cut_evenly([6, 4, 4, 3, 3], budget=10) == [[0, 1], [2, 3, 4]]  # dealt evenly, one would hold 11
    assert cut_evenly([3000, 200], budget=8192) == [[0], [1]]
    assert cut_evenly([500, 500], budget=8192) == [[0, 1]]
    assert cut_evenly([], budget=10) == []


def test_a_gpu_s_rows_are_as_full_as_they_get() -> None:
    examples = random_examples([600, 500, 400, 300, 200])
    sizes = {kind: [b.num_tokens for b in make_batches(examples, 2, 1024, True, kind)] for kind in ("cpu", "cuda")}
    assert sizes == {"cpu": [1100, 900], "cuda": [2000]}
    assert (
        largest_micro_batch(2, 1024, 600, True, "cuda") == 2048
        and largest_micro_batch(2, 1024, 600, False, "cuda") == 1200
    )
    assert (
        largest_micro_batch(8, 1024, 600, True) == CPU_TOKENS + 600
        and largest_micro_batch(8, 4096, 4000, True) == 4000
    )


# ---- tensors ----------------------------------------------------------------------------------------------


def test_collate_packed() -> None:
    batch = collate_packed(
        [Example(torch.tensor([5, 6, 7]), torch.tensor([-100, 7, 2])), *random_examples([1, 2])]
    )
    assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (1, 6)
    assert batch.input_ids[0, :3].tolist() == [5, 6, 7] and batch.targets[0, :3].tolist() == [-100, 7, 2]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (batch.max_length, batch.num_tokens) == (3, 6)
    assert batch.num_targets == int((batch.targets != IGNORE_INDEX).sum()) > 0


def test_collate_padded() -> None:
    examples = random_examples([4, 1, 3])
    batch = collate_padded(examples)
    assert batch.cu_seqlens is None
    assert batch.input_ids.shape == batch.targets.shape == batch.position_ids.shape == (3, 4)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert (batch.max_length, batch.num_tokens) == (4, 8)
    assert batch.num_targets == int((batch.targets != IGNORE_INDEX).sum()) > 0
    for row, example in enumerate(examples):
        length = len(example)
        assert torch.equal(batch.input_ids[row, :length], example.input_ids)
        assert torch.equal(batch.targets[row, :length], example.targets)
        assert (batch.targets[row, length:] == IGNORE_INDEX).all()
        assert batch.position_ids[row].tolist() == [0, 1, 2, 3]


def test_batch_moves_whole() -> None:
    for batch in (collate_packed(random_examples([2, 3])), collate_padded(random_examples([2, 3]))):
        moved = batch.to(torch.device("meta"))
        assert vars(moved).keys() == vars(batch).keys()
        for name, value in vars(batch).items():
            if isinstance(value, Tensor):
                assert getattr(moved, name).device.type == "meta" and value.device.type == "cpu"
            else:
                assert getattr(moved, name) == value


@pytest.mark.parametrize("packing", [True, False])
def test_make_batches_covers_a_share_within_budget(packing: bool) -> None:
    rng = random.Random(2)
    for _ in range(50):
        batch_size, max_length = rng.randint(1, 5), rng.randint(4, 40)
        examples = random_examples(random_lengths(rng, max_length), seed=rng.randint(0, 999))
        batches = make_batches(examples, batch_size, max_length, packing)
        assert sum(batch.num_tokens for batch in batches) == sum(len(e) for e in examples)
        assert sum(batch.num_targets for batch in batches) == sum(e.num_targets for e in examples)
        rows: list[list[int]] = []
        for batch in batches:
            assert batch.input_ids.numel() <= batch_size * max_length
            assert (batch.cu_seqlens is not None) == packing
            if batch.cu_seqlens is None:
                assert len(batch.input_ids) <= batch_size
                rows += [ids.tolist() for ids in batch.input_ids]
            else:
                bounds = batch.cu_seqlens.tolist()
                assert batch.max_length == max(b - a for a, b in pairwise(bounds))
                rows += [batch.input_ids[0, a:b].tolist() for a, b in pairwise(bounds)]
        expected = [e.input_ids.tolist() for e in examples]
        for row in (*rows, *expected):
            row += [0] * (max_length - len(row))
        assert sorted(rows) == sorted(expected)
        assert len(make_batches([], batch_size, max_length, packing)) == 0


# ---- order ------------------------------------------------------------------------------------------------


def test_each_epoch_covers_every_example_once() -> None:
    rng = random.Random(3)
    num_partial = 0
    for _ in range(100):
        count, size, seed = rng.randint(1, 50), rng.randint(1, 12), rng.randint(0, 10**6)
        order = WindowOrder(count, size, seed)
        assert order.steps_per_epoch == -(-count // size)
        for epoch in range(3):
            first = epoch * order.steps_per_epoch
            windows = [order.window(first + step) for step in range(order.steps_per_epoch)]
            assert sorted(index for window in windows for index in window) == list(range(count))
            assert all(len(window) == size for window in windows[:-1]) and 0 < len(windows[-1]) <= size
            num_partial += len(windows[-1]) < size
    assert num_partial > 50


def test_epochs_and_seeds_differ() -> None:
    order, other = WindowOrder(100, 100, seed=1), WindowOrder(100, 100, seed=2)
    shuffles = [
        order.window(0),
        order.window(1),
        order.window(2),
        other.window(0),
        other.window(1),
        list(range(100)),
    ]
    assert len({tuple(shuffle) for shuffle in shuffles}) == len(shuffles)


def test_step_alone_decides_the_window() -> None:
    """Resuming: a fresh object, asked in any order, gives the same; torch's global RNG has no say."""
    order = WindowOrder(23, 4, seed=5)
    expected = [order.window(step) for step in range(30)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    steps = random.Random(4).choices(range(30), k=60)
    again = WindowOrder(23, 4, seed=5)
    assert [again.window(step) for step in steps] == [expected[step] for step in steps]
    assert WindowOrder(23, 4, seed=5).window(17) == expected[17]
    assert torch.equal(torch.get_rng_state(), state)


def unweighted_window(count: int, size: int, seed: int, step: int) -> list[int]:
    """The order as it was before there were weights."""
    epoch, position = divmod(step, -(-count // size))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
    return order[position * size : (position + 1) * size]


def test_weights_of_one_change_nothing() -> None:
    for sources in (17, [(17, 1.0)], [(5, 1.0), (11, 1.0), (1, 1.0)]):
        order = WindowOrder(sources, 4, seed=3)
        assert [order.window(step) for step in range(12)] == [unweighted_window(17, 4, 3, s) for s in range(12)]


def test_weights_say_how_often_a_row_is_seen() -> None:
    """Rows 0-9 twice and three of them once more, 10-29 a sample of 6, 30 at least once: in every epoch, anew."""
    sources = [(10, 2.3), (20, 0.3), (1, 0.01)]
    order = WindowOrder(sources, 8, seed=1)
    assert order.num_examples == 23 + 6 + 1 and order.steps_per_epoch == 4
    samples = set()
    for epoch in range(40):
        windows = [order.window(4 * epoch + step) for step in range(4)]
        assert [len(window) for window in windows] == [8, 8, 8, 6]
        counts = Counter(row for window in windows for row in window)
        assert sorted(counts[row] for row in range(10)) == [2] * 7 + [3] * 3
        sample = tuple(row for row in range(10, 30) if counts[row])
        assert len(sample) == 6 and all(counts[row] == 1 for row in sample) and counts[30] == 1
        samples.add(sample)
    assert len(samples) > 30 and set().union(*samples) == set(range(10, 30))
    again = WindowOrder(sources, 8, seed=1)
    assert [again.window(step) for step in (77, 5, 6)] == [order.window(step) for step in (77, 5, 6)]
    assert WindowOrder(sources, 8, seed=2).window(0) != order.window(0)


# ---- packed against padded --------------------------------------------------------------------------------


def loss_and_gradients(model: Any, batches: list[Batch]) -> tuple[Tensor, int, list[Tensor]]:
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for batch in batches:
        loss, targets = causal_lm_loss(model, batch)
        loss.backward()
        total, count = total + loss.detach(), count + targets
    return total, count, [p.grad.clone() for p in lora_parameters(model) if p.grad is not None]


def test_packed_and_padded_batches_are_worth_the_same(tmp_path: Any) -> None:
    """Loss sum, count and adapter gradients, whatever the packing and the size of the micro-batches."""
    model = load_base_model(str(save_tiny_llama(tmp_path / "llama")), compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(target_modules="all-linear", adapter_dtype="float32"))
    freeze_base(model)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.train()
    examples = random_examples([9, 1, 16, 4, 12, 3, 16, 1])
    splits = {
        (packing, batch_size): make_batches(examples, batch_size, 16, packing)
        for packing in (True, False)
        for batch_size in (1, 3, 8)
    }
    assert len({len(batches) for batches in splits.values()}) > 2, "the splits differ"
    expected_loss, expected_count, expected = loss_and_gradients(model, splits.pop((False, 1)))
    assert len(expected) == 28 and expected_count == sum(e.num_targets for e in examples)
    for batches in splits.values():
        loss, count, gradients = loss_and_gradients(model, batches)
        assert count == expected_count
        assert relative_error(loss, expected_loss) < MODEL_TOLERANCE
        for ours, theirs in zip(gradients, expected, strict=True):
            assert relative_error(ours, theirs) < MODEL_TOLERANCE
