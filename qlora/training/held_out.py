"""Evaluate held-out data; choose the best state and stop early when patience runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from qlora.data.batches import Batch, balance_by_length, lengths_of, make_batches, split_batch
from qlora.data.example import Example
from qlora.model.base import ranks_of
from qlora.model.loss import causal_lm_loss
from qlora.system.errors import TrainingStopped
from qlora.system.memory import is_out_of_memory
from qlora.system.ranks import Ranks
from qlora.training.observer import Observer
from qlora.training.step import in_lockstep

if TYPE_CHECKING:
    from qlora.training.loop import Trainer

AskStop = Callable[[], "str | None"]  # why the run should stop now, or None


@torch.no_grad()
def go_through(
    model: nn.Module,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    take: Callable[[Batch], object],
    stop: AskStop = lambda: None,
) -> bool:
    """Give each micro-batch to `take`, on the device and without gradients; the model's mode is restored.

    A micro-batch that does not fit in memory is halved until it does.

    Args:
        batches: this process's.
        stop: called after each micro-batch; a reason ends it.
    Returns:
        Whether it was stopped on this device.
    """
    was_training, ranks = model.training, ranks_of(model, accelerator)
    model.eval()
    waiting, is_stopped = list(in_lockstep(batches, ranks, accelerator.device)), False
    while waiting and not is_stopped:
        batch = waiting.pop()
        try:
            take(batch.to(accelerator.device))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.examples) == 1 or ranks.is_split:
                raise TrainingStopped("a held-out example does not fit in memory; lower --max-length") from error
            waiting += split_batch(batch, batch.input_ids.numel() // 2)
        reason = stop() is not None
        is_stopped = bool(ranks.max(reason, accelerator.device)) if ranks.is_split else reason
    model.train(was_training)
    return is_stopped


def held_out_batches(
    examples: Sequence[Example], ranks: Ranks, budget: int, packing: bool, device_type: str
) -> list[Batch]:
    """This process's micro-batches of the held-out examples, of at most `budget` tokens."""
    lengths = lengths_of(examples)
    mine = balance_by_length(lengths, ranks.data_size)[ranks.data_rank]
    longest = max(lengths)
    rows = max(1, budget // longest)
    return make_batches([examples[i] for i in mine], rows, longest, packing, device_type)


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    budget: int,
    packing: bool = True,
    stop: AskStop = lambda: None,
) -> float | None:
    """Mean loss per target token over `examples`, in nats; the model's mode is restored.

    Args:
        budget: tokens of a micro-batch; halved until one fits in memory.
        stop: called after each micro-batch; once any device has a reason, the result is None.
    """
    ranks = ranks_of(model, accelerator)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)

    def take(batch: Batch) -> None:
        loss_sum, count = causal_lm_loss(model, batch)
        sums[:2] += torch.stack([loss_sum.double(), torch.tensor(count, device=sums.device)])

    batches = held_out_batches(examples, ranks, budget, packing, accelerator.device.type)
    sums[2] = go_through(model, batches, accelerator, take, stop)
    loss_sum, count, stopped = ranks.sum(sums).tolist()
    return None if stopped else loss_sum / count


class HeldOut(Observer):
    """Evaluates the held-out data periodically and at the end, and ends the run when patience runs out.

    An evaluation interrupted by a request to stop is made when the run is resumed.

    Args:
        every: optimizer steps between evaluations; 0 = never.
        score: replaces the loss as the metric; higher is better. Called on every process with `stop`, it returns
            None once that gave a reason.
        metric: the name of a number of the evaluation that replaces the loss instead; higher is better.
        patience: evaluations in a row without an improvement above `min_delta` that end the run; 0 = never.
        stop: called while evaluating.
    """

    def __init__(
        self,
        every: int,
        score: Callable[[AskStop], float | None] | None = None,
        patience: int = 0,
        min_delta: float = 0.0,
        stop: AskStop = lambda: None,
        metric: str | None = None,
    ) -> None:
        self.metric = metric
        self.every, self.score, self.patience, self.min_delta, self.stop = every, score, patience, min_delta, stop

    def before_step(self, trainer: Trainer) -> None:
        progress, total_steps = trainer.progress, trainer.limits.total_steps
        is_end = trainer.is_enough or progress.step == total_steps
        is_due = self.every and (progress.step % self.every == 0 or is_end)
        trainer.is_pending = False
        if is_due and progress.eval_loss is None:
            self._evaluate(trainer)
        if self._is_enough(trainer):
            trainer.is_enough = True

    def _evaluate(self, trainer: Trainer) -> None:
        progress = trainer.progress
        found = trainer.held_out(self.stop)
        score = self.score(self.stop) if self.score is not None and found is not None else None
        if found is None or (self.score is not None and score is None):
            trainer.is_pending = True  # a reason to stop came first
            return
        if not math.isfinite(found["eval_loss"]):
            raise TrainingStopped(f"the held-out loss is {found['eval_loss']}; look at the held-out data")
        judged = score if self.metric is None else found[self.metric]
        is_best = progress.record_evaluation(found["eval_loss"], judged, self.min_delta)
        line: dict[str, Any] = {"step": progress.step, **found}
        line |= {"exact_match": score} if score is not None else {}
        line |= {"stale_evaluations": progress.stale} if self.patience else {}
        line |= {"stopped_early": True} if self._is_enough(trainer) else {}
        for observer in trainer.observers:
            observer.after_evaluation(trainer, line, is_best)

    def at_end(self, trainer: Trainer, error: BaseException | None) -> None:
        if error is None and self._is_enough(trainer) and trainer.accelerator.is_main_process:
            step, stale, total = trainer.progress.step, trainer.progress.stale, trainer.limits.total_steps
            trainer.say(
                f"stopped early after step {step} of {total}; evaluations in a row that were no better: {stale} "
                f"(--early-stopping-patience {self.patience})"
            )

    def _is_enough(self, trainer: Trainer) -> bool:
        """Whether patience has run out before the last step."""
        return 0 < self.patience <= trainer.progress.stale and trainer.progress.step < trainer.limits.total_steps
