"""Which examples an optimizer step sees: arithmetic on the seed, so that a resumed run goes on exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.data.example import Example


def rows_per_epoch(num_rows: int, weight: float) -> int:
    """Rows of a source in an epoch: each as often as the weight says, and a sample for its fraction."""
    return max(1, int(weight) * num_rows + round(weight % 1 * num_rows))


def sources_of(examples: Sequence[Example]) -> Sequence[tuple[int, float]]:
    """(rows, weight) of each source of the examples, one source after another; a plain list is one of weight 1."""
    return getattr(examples, "sources", [(len(examples), 1.0)])


class WindowOrder:
    """Which examples the optimizer step `step` (counted from 0) sees: arithmetic, no state.

    Each epoch is shuffled by (seed, epoch); its last window may be smaller, and counts as a step. A source of
    weight 2 is there twice in each epoch, one of weight 0.3 as a sample of 30 % without repeats, drawn anew for
    each epoch; with weights of 1, which changes nothing, nothing is drawn.

    Args:
        examples: (rows, weight) of each source, whose rows are numbered one source after another; a number
            alone is one source of weight 1.
    """

    def __init__(self, examples: int | Sequence[tuple[int, float]], window_size: int, seed: int) -> None:
        self.sources = [(examples, 1.0)] if isinstance(examples, int) else list(examples)
        self.num_examples = sum(rows_per_epoch(*source) for source in self.sources)
        self.window_size, self.seed = window_size, seed
        self.steps_per_epoch = -(-self.num_examples // window_size)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)  # 8 bytes a row, where a list would take 36

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
        """The rows of an epoch, source by source."""
        drawn, first = [], 0
        for num_rows, weight in self.sources:
            rows = torch.arange(first, first + num_rows)
            rest = rows_per_epoch(num_rows, weight) - int(weight) * num_rows
            drawn += [rows] * int(weight)
            if rest:
                drawn.append(rows[torch.randperm(num_rows, generator=generator)[:rest]])
            first += num_rows
        return torch.cat(drawn)
