"""Which examples an optimizer step sees: computed from the seed, so that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.data.example import Example


def rows_per_epoch(num_rows: int, weight: float) -> int:
    """Rows that an epoch takes of a source: every row int(weight) times, plus a sample for the fraction."""
    return max(1, int(weight) * num_rows + round(weight % 1 * num_rows))


def sources_of(examples: Sequence[Example]) -> Sequence[tuple[int, float]]:
    """(number of rows, weight) of each source in order; a plain list is one source of weight 1."""
    return getattr(examples, "sources", [(len(examples), 1.0)])


class WindowOrder:
    """Computes which examples optimizer step `step` (from 0) sees; it has no state.

    Each epoch is shuffled by (seed, epoch); its last window may be smaller and counts as a step. An epoch contains
    a source of weight 2 twice, and a source of weight 0.3 as a new sample of 30 % without repeats. Sources of
    weight 1 draw no random numbers.

    Args:
        examples: (number of rows, weight) of each source; rows are numbered through all sources. A single number
            is one source of weight 1.
    """

    def __init__(self, examples: int | Sequence[tuple[int, float]], window_size: int, seed: int) -> None:
        self.sources = [(examples, 1.0)] if isinstance(examples, int) else list(examples)
        self.num_examples = sum(rows_per_epoch(*source) for source in self.sources)
        self.window_size, self.seed = window_size, seed
        self.steps_per_epoch = -(-self.num_examples // window_size)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)  # 8 bytes per row; a list would take 36

    def window(self, step: int) -> list[int]:
        """Indices of the examples of this step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            rows = self._draw(generator)
            self._order = rows[torch.randperm(self.num_examples, generator=generator)]
            self._epoch = epoch
        start = position * self.window_size
        return self._order[start : start + self.window_size].tolist()

    def _draw(self, generator: torch.Generator) -> Tensor:
        """Draw the rows of an epoch, source by source."""
        drawn, first = [], 0
        for num_rows, weight in self.sources:
            rows = torch.arange(first, first + num_rows)
            rest = rows_per_epoch(num_rows, weight) - int(weight) * num_rows
            drawn += [rows] * int(weight)
            if rest:
                drawn.append(rows[torch.randperm(num_rows, generator=generator)[:rest]])
            first += num_rows
        return torch.cat(drawn)
