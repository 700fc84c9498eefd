"""The loss of preferences in the loop: log-probabilities of answers, under the model and under its reference.

The maths is in model/preference_loss.py. The reference is the base without the adapter that trains, alone or with
another adapter. It computes each row in a pass of its own, so that its values do not depend on which rows share a
micro-batch: those of the cache and those of --reference-each-step are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qlora.data.batches import Batch, balance_by_length, collate_packed, collate_padded, lengths_of
from qlora.data.example import Example
from qlora.lora.adapter import activate, active_adapter
from qlora.lora.slot import Adapter
from qlora.model.base import ranks_of
from qlora.model.loss import sequence_log_likelihoods
from qlora.model.preference_loss import Answers, PreferenceLoss, averages
from qlora.system.ranks import Ranks
from qlora.training.held_out import AskStop, go_through, held_out_batches

Scores = dict[int, list[float]]  # id of an example -> log p of each of its sequences


def score(model: nn.Module, batches: Sequence[Batch], accelerator: Accelerator, stop: AskStop) -> Scores | None:
    """log p of each sequence of this process's micro-batches; None: `stop` gave a reason first."""
    found: Scores = {}

    def take(batch: Batch) -> None:
        values = iter(sequence_log_likelihoods(model, batch)[0].tolist())
        for example in batch.examples:
            found[id(example)] = [next(values) for _ in example.sequences]

    return None if go_through(model, batches, accelerator, take, stop) else found


@contextmanager
def under(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """The model with another adapter, or as the base, within the `with` block."""
    own = active_adapter(model)
    activate(model, adapter)
    try:
        yield
    finally:
        activate(model, own)


def score_alone(
    model: nn.Module, examples: Sequence[Example], accelerator: Accelerator, packing: bool, stop: AskStop
) -> Scores | None:
    """`score`, each example in a pass of its own."""
    collate = collate_packed if packing else collate_padded
    return score(model, [collate([example]) for example in examples], accelerator, stop)


@dataclass
class Preferences:
    """The loss of a window of preferences; `begin`, then `loss` of each micro-batch, then `finish`.

    Args:
        maths: the method and its constants.
        reference_each_step: compute the reference here; the rows bring none.
        reference: the adapter of the reference, if it is not the base alone.
        settings: what must be equal when a run is resumed.
    """

    maths: PreferenceLoss
    reference_each_step: bool = False
    reference: Adapter | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    num_rows: int = field(init=False, default=0)
    _rows_per_token: float = field(init=False, default=0.0)
    _kl: float = field(init=False, default=0.0)
    _sums: Tensor = field(init=False, default_factory=lambda: torch.zeros(0))

    def begin(self, model: nn.Module, batches: Sequence[Batch], accelerator: Accelerator) -> Sequence[Batch]:
        """Count the window's rows and compute what they share; returns the micro-batches to train on."""
        device, ranks = accelerator.device, ranks_of(model, accelerator)
        packing = not batches or batches[0].cu_seqlens is not None
        collate = collate_packed if packing else collate_padded
        if self.reference_each_step:
            rows = [example for batch in batches for example in batch.examples]
            with under(model, self.reference):
                known = score_alone(model, rows, accelerator, packing, lambda: None) or {}
            batches = [
                replace(
                    batch,
                    examples=tuple(
                        replace(e, reference=(known[id(e)][0], known[id(e)][-1])) for e in batch.examples
                    ),
                )
                for batch in batches
            ]
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for example in (example for batch in batches for example in batch.examples if example.split):
            sums[:2] += torch.tensor([1, example.sequences[0].num_targets], device=device)
        if self.maths.method == "kto":
            others = [
                collate([replace(e.sequences[-1], reference=e.reference) for e in batch.examples])
                for batch in batches
            ]
            known = score(model, others, accelerator, lambda: None) or {}
            for example in (example for batch in others for example in batch.examples):
                if example.reference is not None:
                    sums[2] += known[id(example)][0] - example.reference[1]
            batches = [
                collate(
                    [replace(e.sequences[0], is_wanted=e.is_wanted, reference=e.reference) for e in batch.examples]
                )
                for batch in batches
            ]
        num_rows, num_chosen, drift = ranks.sum(sums).tolist()
        self.num_rows, self._rows_per_token = int(num_rows), num_rows / max(1, num_chosen)
        self._kl = max(0.0, drift / max(1, num_rows))
        self._sums = torch.zeros(len(self.maths.names), 2, dtype=torch.float64, device=device)
        return batches

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of the rows' losses."""
        log_p, balance = sequence_log_likelihoods(model, batch)
        if not batch.num_targets:  # one that keeps processes in lockstep
            return log_p.sum() * 0
        answers = answers_of(batch.examples, log_p.view(len(batch.examples), -1))
        self._sums += self.maths.measure(replace(answers, log_p=answers.log_p.detach()), self._kl)
        loss = self.maths.losses(answers, self._rows_per_token, self._kl).sum()
        return loss + balance * len(batch.examples)

    def finish(self, ranks: Ranks) -> dict[str, float]:
        return averages(self.maths.names, ranks.sum(self._sums))

    def evaluate(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        accelerator: Accelerator,
        budget: int,
        packing: bool = True,
        stop: AskStop = lambda: None,
    ) -> dict[str, float] | None:
        """The mean loss of the rows, and what a step shows, as eval_...; arguments of held_out's `evaluate`."""
        log_p = score_all(model, examples, accelerator, budget, packing, stop)
        if log_p is None:
            return None
        rows = list(examples)
        if self.reference_each_step:
            with under(model, self.reference):
                known = score_all(model, examples, accelerator, 0, packing, stop)
            if known is None:
                return None
            rows = [replace(e, reference=(a, b)) for e, (a, b) in zip(rows, known.tolist(), strict=True)]
        answers = answers_of(rows, log_p)
        num_chosen = max(1, int(answers.counts[:, 0].sum()))
        kl = max(0.0, (log_p - answers.reference)[:, 1].mean().item()) if self.maths.method == "kto" else 0.0
        loss = self.maths.losses(answers, len(rows) / num_chosen, kl).double().mean().item()
        found = averages(self.maths.names, self.maths.measure(answers, kl))
        return {"eval_loss": loss} | {f"eval_{name}": value for name, value in found.items()}


def answers_of(examples: Sequence[Example], log_p: Tensor) -> Answers:
    """The answers of rows; log_p is (R, 2), or (R, 1) of rows without their second sequence."""
    width, device = log_p.shape[1], log_p.device
    counts = [[float(part.num_targets) for part in example.sequences][:width] for example in examples]
    known = [(example.reference or (0.0, 0.0))[:width] for example in examples]
    wanted = torch.tensor([example.is_wanted for example in examples], device=device)
    return Answers(log_p, torch.tensor(counts, device=device), torch.tensor(known, device=device), wanted)


def score_all(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    budget: int,
    packing: bool,
    stop: AskStop = lambda: None,
) -> Tensor | None:
    """(R, 2) fp32 on the CPU, the same on all processes: log p of each row's sequences; None: stopped first.

    Args:
        budget: tokens of a micro-batch; 0 = each row alone.
    """
    ranks = ranks_of(model, accelerator)
    lengths = lengths_of(examples)
    mine = balance_by_length(lengths, ranks.data_size)[ranks.data_rank]
    rows = [examples[number] for number in mine]
    if budget and rows:
        batches = held_out_batches(rows, Ranks(), budget, packing, accelerator.device.type)
        found = score(model, batches, accelerator, stop)
    else:
        found = score_alone(model, rows, accelerator, packing, stop)
    values = torch.zeros(len(lengths), 2, dtype=torch.float64)
    for number, example in zip(mine, rows, strict=True):
        if found is not None:
            values[number] = torch.tensor(found[id(example)], dtype=torch.float64)
    is_stopped = torch.tensor([[float(found is None), 0.0]], dtype=torch.float64)
    values = ranks.sum(torch.cat([values, is_stopped]).to(accelerator.device)).cpu()
    return None if values[-1, 0] else values[:-1].float()
