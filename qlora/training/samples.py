"""Sample the model during training: completions of fixed prompts, and a score of its answers.

Both decode greedily between two steps and change neither the model nor the random numbers, so that a run's losses
are the same with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from qlora.config.generate import Sampling
from qlora.data.prompts import Prompt
from qlora.system.errors import TrainingStopped
from qlora.system.memory import is_out_of_memory
from qlora.system.redact import redact
from qlora.training.observer import Observer

if TYPE_CHECKING:
    from qlora.training.loop import Trainer

DECODED_TOGETHER = 16  # prompts per batch


class Sampler:
    """Completes the prompts at a step; call it with the step, on every process.

    The main process generates while the others wait. A failure is only a warning and does not stop the run.

    Args:
        write: called with one {"step", "prompt", "completion", "expected"} per prompt.
        warn: called with a failure's message.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        accelerator: Accelerator,
        write: Callable[[list[dict[str, Any]]], object],
        warn: Callable[[str], object] = print,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.max_new_tokens = model, tokenizer, prompts, max_new_tokens
        self.accelerator, self.write, self.warn = accelerator, write, warn

    def __call__(self, step: int) -> None:
        if self.accelerator.is_main_process:
            try:
                found = answer(self.model, self.tokenizer, self.prompts, self.max_new_tokens)
                pairs = zip(self.prompts, found, strict=True)
                self.write(
                    [{"step": step, "prompt": p.text, "completion": c, "expected": p.expected} for p, c in pairs]
                )
            except Exception as error:
                problem = redact(f"{type(error).__name__}: {error}")
                self.warn(f"no samples at step {step} ({problem}); training goes on")
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()  # frees memory for steps of another shape
        self.accelerator.wait_for_everyone()


class Samples(Observer):
    """Samples periodically and at the end, or (0) with each evaluation; once per step.

    Args:
        take: takes the samples of a step (`Sampler`).
    """

    def __init__(self, take: Callable[[int], object], every: int = 0) -> None:
        self.take, self.every = take, every

    def before_step(self, trainer: Trainer) -> None:
        progress, is_last = trainer.progress, trainer.is_last
        if not is_last and trainer.is_stopping():
            return  # the resumed run takes them
        step, is_evaluated = progress.step, progress.eval_loss is not None
        by_step = self.every and step and (step % self.every == 0 or is_last)
        with_evaluation = is_evaluated and (self.every == 0 or step == 0)
        if progress.sampled < step and (by_step or with_evaluation):
            self.take(step)
            progress.sampled = step


class AnswerScore:
    """Share of prompts answered as expected; call it with a `stop` function, on every process.

    Args:
        is_match: whether an expected and a generated answer match.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        is_match: Callable[[str, str], bool],
        max_new_tokens: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.tokenizer, self.is_match, self.max_new_tokens = model, tokenizer, is_match, max_new_tokens
        self.accelerator, self.total = accelerator, len(prompts)
        self.mine = prompts[accelerator.process_index :: accelerator.num_processes]

    def __call__(self, stop: Callable[[], str | None] = lambda: None) -> float | None:
        """The share over all processes; None if any has a reason to stop.

        Raises:
            TrainingStopped: a process could not generate its answers.
        """
        correct, size, start = 0, DECODED_TOGETHER, 0
        failure: Exception | None = None
        reason: str | None = None
        while start < len(self.mine) and not (failure or reason):
            rows = self.mine[start : start + size]
            try:
                correct += self._count_correct(rows)
                start += len(rows)
            except Exception as error:
                size = size // 4 if is_out_of_memory(error) else 0
                failure = None if size else error
            reason = stop()
        sums = torch.tensor([correct, failure is not None, reason is not None], device=self.accelerator.device)
        correct, failures, stops = self.accelerator.reduce(sums, "sum").tolist()
        if failures:
            where = failure or "on another process"
            raise TrainingStopped(f"the held-out answers could not be generated ({where})")
        return None if stops else correct / self.total

    def _count_correct(self, rows: Sequence[Prompt]) -> int:
        answers = answer(self.model, self.tokenizer, rows, self.max_new_tokens)
        return sum(self.is_match(row.expected or "", given) for row, given in zip(rows, answers, strict=True))


def answer(model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """Answer each prompt greedily."""
    from qlora.generation import generate  # not needed by runs without samples or scores

    return generate(
        model, tokenizer, [p.ids for p in prompts], Sampling(max_new_tokens), batch_size=DECODED_TOGETHER
    )
