"""A tokenized row: input ids and shifted targets; and a report of how records became rows.

T tokens of one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora.data.keys import EQUAL, Notes, count_notes
from qlora.data.rows import BadRow, sort_by_place
from qlora.system.errors import InputError
from qlora.system.wording import show_controls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


@dataclass
class Example:
    """One row: input_ids (T,) int64; targets (T,) int64, shifted already, IGNORE_INDEX where not trained.

    A row of preferences has two sequences, one behind the other, which do not see each other: the chosen and the
    rejected answer, or an answer that is good or bad and one that belongs to another prompt.

    Attributes:
        origin: its source, such as `train.jsonl:17`.
        split: where the second sequence starts; 0 = there is one alone.
        is_wanted: whether the first answer is a good one.
        reference: log p of both sequences' targets under the reference model, where an objective needs it.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    origin: str = ""
    split: int = 0
    is_wanted: bool = True
    reference: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> list[Example]:
        """Its sequences, each as a row of its own."""
        if not self.split:
            return [self]
        parts = slice(self.split), slice(self.split, None)
        return [Example(self.input_ids[part], self.targets[part], self.origin) for part in parts]

    @property
    def num_targets(self) -> int:
        return int(np.count_nonzero(self.targets.numpy() != IGNORE_INDEX))


@dataclass
class EncodeReport:
    """Counts of what happened to the records. str(report) is one line for the user."""

    num_records: int = 0
    num_truncated: int = 0  # kept, but cut at max_length
    num_dropped_long: int = 0
    num_dropped_no_target: int = 0
    num_dropped_equal: int = 0  # pairs
    num_bad_rows: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    notes: Notes = field(default_factory=dict)

    def __str__(self) -> str:
        dropped = self.num_dropped_long + self.num_dropped_no_target + self.num_dropped_equal
        num_kept = self.num_records - dropped - self.num_bad_rows
        share = self.num_targets / max(self.num_tokens, 1)
        more = f", {self.num_dropped_equal:,} with equal answers" if self.num_dropped_equal else ""
        more += f"; {self.num_bad_rows:,} bad rows skipped" if self.num_bad_rows else ""
        return (
            f"{num_kept:,} of {self.num_records:,} records kept ({self.num_truncated:,} truncated; dropped: "
            f"{self.num_dropped_long:,} too long, {self.num_dropped_no_target:,} without a target{more}), "
            f"{self.num_tokens:,} tokens, {self.num_targets:,} of them targets ({share:.0%})"
        )

    def admit(self, row: Example, max_length: int, on_long: str) -> Example | None:
        """Count one whole row and return its part to train on: at most max_length tokens, or None."""
        kept = self.admit_sequences([row], max_length, on_long)
        return kept[0] if kept else None

    def admit_sequences(self, rows: Sequence[Example], max_length: int, on_long: str) -> list[Example]:
        """`admit` of a row with one sequence, or with a pair that has to differ; [] if it is dropped."""
        self.num_records += 1
        is_long = any(len(row) > max_length for row in rows)
        kept = [Example(row.input_ids[:max_length], row.targets[:max_length], row.origin) for row in rows]
        counts = [example.num_targets for example in kept]
        if is_long and on_long == "drop":
            self.num_dropped_long += 1
        elif 0 in counts:
            self.num_dropped_no_target += 1
        elif len(kept) == 2 and all(torch.equal(*parts) for parts in zip(*map(_tokens_of, kept), strict=True)):
            self.num_dropped_equal += 1
            count_notes(self.notes, [(EQUAL, "within --max-length" if is_long else "in the data")])
        else:
            self.num_truncated += is_long
            self.num_tokens += sum(map(len, kept))
            self.num_targets += sum(counts)
            return kept
        return []


def _tokens_of(example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    return example.input_ids, example.targets


def finish_report(report: EncodeReport, bad_rows: list[BadRow], num_kept: int, max_length: int) -> None:
    """Count the bad rows and sort them in the source's order; InputError if nothing is left to train on."""
    if bad_rows:
        sort_by_place(bad_rows)
        report.num_bad_rows = len(bad_rows)
        report.num_records += len(bad_rows)
    if bad_rows and report.num_bad_rows == report.num_records:
        raise InputError(f"All {report.num_records} records are bad; the first: {bad_rows[0]}")
    if not num_kept:
        equal = f"{report.num_dropped_equal} with equal answers, " if report.num_dropped_equal else ""
        raise InputError(
            f"None of {report.num_records} records is left at --max-length {max_length}: "
            f"{report.num_dropped_long} too long, {report.num_dropped_no_target} without a target within it, "
            f"{equal}{report.num_bad_rows} bad; raise it or fix the data."
        )


def format_sample(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The row as the model sees it, with special tokens, and with targets between ⟦ and ⟧."""
    if example.split:
        return "\n".join(format_sample(sequence, tokenizer) for sequence in example.sequences)
    is_target = (example.targets != IGNORE_INDEX).tolist()
    ids = example.input_ids.tolist() + example.targets[-1:].tolist()
    pieces = []
    for trained, run in groupby(zip([False, *is_target], ids, strict=True), key=lambda pair: pair[0]):
        run_ids = [token for _, token in run if token != IGNORE_INDEX]
        text: Any = tokenizer.decode(run_ids, clean_up_tokenization_spaces=False)
        text = show_controls(text)
        pieces.append(f"⟦{text}⟧" if trained else text)
    return f"{len(example)} tokens, {example.num_targets} targets between ⟦ and ⟧:\n{''.join(pieces)}"


def shift_targets(ids: list[int], is_target: list[bool], max_length: int, origin: str) -> Example:
    """The row for t_0 .. t_T, cut to its first max_length positions."""
    tokens = np.array(ids[: max_length + 1], np.int64)
    trained = np.array(is_target[1 : max_length + 1], bool)
    targets = np.where(trained, tokens[1:], IGNORE_INDEX)
    return Example(torch.from_numpy(tokens[:-1]), torch.from_numpy(targets), origin)
