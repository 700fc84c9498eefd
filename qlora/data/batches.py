"""Turn examples into batches: split a window over devices, pack rows, build tensors.

One optimizer step consumes a *window* of batch size x gradient accumulation x devices examples. Windows are
slices of a seeded shuffle of each epoch, so the step number alone determines the next examples: resuming needs
no other state, and the number of devices does not change the order. A window is split over the devices by
length, and each share is packed into rows of at most `budget` tokens. On a CPU, where longer rows are not
faster, a share is split into rows of about `CPU_TOKENS`.

Letters: N tokens in a packed row, S sequences in it, B rows, T tokens in a padded row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora.data.example import IGNORE_INDEX, Example

# Target tokens per micro-batch on a CPU. More does not make a token faster, and memory grows in proportion
# (`python -m benchmarks.growth`); with far fewer, reading the 4-bit weights takes a visible share of the time.
CPU_TOKENS = 1536


@dataclass
class Batch:
    """The input of one forward pass.

    Packed:  input_ids, targets, position_ids (1, N), cu_seqlens (S + 1,) int32; positions restart per sequence.
    Padded:  input_ids, targets, position_ids (B, T), cu_seqlens None; padding is on the right, where causal
             attention never looks, and its targets are IGNORE_INDEX.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor | None
    max_length: int
    num_tokens: int  # without padding
    num_targets: int
    examples: tuple[Example, ...]  # its source

    @property
    def sequences(self) -> list[Example]:
        """The sequences in its rows, in order."""
        return [sequence for example in self.examples for sequence in example.sequences]

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Batch(**moved)


def pack_examples(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices into bins of at most `budget` tokens: first fit, longest first.

    An example longer than the budget gets a bin of its own. Deterministic; every index appears once.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for number, free in enumerate(room):
            if lengths[index] <= free:
                bins[number].append(index)
                room[number] -= lengths[index]
                break
        else:
            bins.append([index])
            room.append(budget - lengths[index])
    return bins


def balance_by_length(lengths: Sequence[int], num_devices: int) -> list[list[int]]:
    """Split indices over devices with nearly equal token counts: longest first, to the emptiest device."""
    shares: list[list[int]] = [[] for _ in range(num_devices)]
    emptiest = [(0, device) for device in range(num_devices)]  # a heap of (load, device)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, device = emptiest[0]
        shares[device].append(index)
        heapq.heapreplace(emptiest, (load + lengths[index], device))
    return shares


def cut_evenly(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split indices into parts of nearly equal token counts, about `CPU_TOKENS` each and at most `budget`.

    An example longer than the budget gets a part of its own. Deterministic; every index appears once.
    """
    bins = pack_examples(lengths, budget)
    num_parts = max(len(bins), -(-sum(lengths) // CPU_TOKENS))
    parts = balance_by_length(lengths, min(num_parts, len(lengths)))
    fits = all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts)
    return parts if fits else bins


def collate_packed(examples: Sequence[Example]) -> Batch:
    """Join examples in one row. Targets are already shifted, so nothing leaks across a boundary."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    bounds = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    return Batch(
        input_ids=torch.cat([e.input_ids for e in examples])[None],
        targets=torch.cat([e.targets for e in examples])[None],
        position_ids=torch.cat([torch.arange(len(e)) for e in sequences])[None],
        cu_seqlens=bounds,
        max_length=int(lengths.max()),
        num_tokens=int(lengths.sum()),
        num_targets=sum(e.num_targets for e in examples),
        examples=tuple(examples),
    )


def collate_padded(examples: Sequence[Example]) -> Batch:
    """One sequence per row, padded on the right with token 0 (nothing attends to it)."""
    sequences = [sequence for example in examples for sequence in example.sequences]
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    targets = torch.full((len(sequences), longest), IGNORE_INDEX)
    for row, example in enumerate(sequences):
        input_ids[row, : len(example)] = example.input_ids
        targets[row, : len(example)] = example.targets
    return Batch(
        input_ids=input_ids,
        targets=targets,
        position_ids=torch.arange(longest).expand(len(sequences), longest),
        cu_seqlens=None,
        max_length=longest,
        num_tokens=sum(len(e) for e in examples),
        num_targets=sum(e.num_targets for e in examples),
        examples=tuple(examples),
    )


def split_batch(batch: Batch, limit: int) -> list[Batch]:
    """Halve a micro-batch until each part has at most `limit` tokens (with padding) or a single example."""
    if batch.input_ids.numel() <= limit or len(batch.examples) == 1:
        return [batch]
    collate = collate_padded if batch.cu_seqlens is None else collate_packed
    parts = batch.examples[::2], batch.examples[1::2]  # bins are sorted by length: alternate for equal halves
    return [small for part in parts for small in split_batch(collate(part), limit)]


def make_batches(
    examples: Sequence[Example], batch_size: int, max_length: int, packing: bool, device_type: str = "cpu"
) -> list[Batch]:
    """Split one device's share of a window into micro-batches of at most batch_size x max_length tokens.

    Packed rows are filled up; on a CPU (`device_type`) they are nearly equal, of about `CPU_TOKENS`. Without
    packing a micro-batch is `batch_size` padded rows of similar length, to waste little.
    """
    lengths = [len(example) for example in examples]
    if packing:
        cut = cut_evenly if device_type == "cpu" else pack_examples
        return [collate_packed([examples[i] for i in part]) for part in cut(lengths, batch_size * max_length)]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [collate_padded([examples[i] for i in row]) for row in rows]


def largest_micro_batch(
    batch_size: int, max_length: int, longest: int, packing: bool, device_type: str = "cpu"
) -> int:
    """Upper bound of the tokens, with padding, in a micro-batch of `make_batches`.

    Args:
        longest: tokens of the longest example, at most `max_length`.
    """
    if not packing:
        return batch_size * longest
    budget = batch_size * max_length
    if device_type != "cpu":
        return budget
    # The last example added to a part is its shortest, and the part was at most average when it was added.
    return min(budget, max(longest, CPU_TOKENS + min(longest, CPU_TOKENS)))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each example, without reading memory-mapped rows."""
    lengths: list[int] | None = getattr(examples, "lengths", None)
    return [len(example) for example in examples] if lengths is None else lengths
