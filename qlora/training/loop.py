"""The training loop: the only file that knows accelerate's loop.

One optimizer step consumes a window of examples, spread over devices and micro-batches. Its loss is

    sum over the window's target tokens of their cross-entropy / number of those tokens

so 1 x 8, 2 x 4 and 8 x 1 examples, on one device or two, give one and the same gradient. Each micro-batch
adds its sum; one all-reduce adds the devices' adapter gradients, a few megabytes in fp32 (there is no DDP
wrapper: it would average over devices, and overlap what takes no time); then the whole is divided once.

Random numbers (dropout) are seeded per step and device, evaluation draws none and leaves no trace in the
model, and the data order is arithmetic: step k is the same however the run came to it.

What may go wrong in a step leaves the state before it whole: nothing but `optimizer.step` changes the model,
and it comes last. Out of memory: smaller micro-batches, the same step again. A non-finite loss: the step is
skipped and its batch kept, up to a limit. Another process died: save and stop. Devices agree on each of
these before they act, or one would wait for ever in a collective that another never enters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from traceback import clear_frames
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qlora.data.batches import Batch, balance_by_length, make_batches, split_batch
from qlora.data.example import Example
from qlora.data.order import WindowOrder, sources_of
from qlora.lora.trainable import lora_parameters
from qlora.model.base import ranks_of
from qlora.parallel.watchdog import watch_peers
from qlora.system.errors import StoppedOnRequest, TrainingStopped
from qlora.system.memory import peak_memory_gib
from qlora.system.wording import explain
from qlora.training.held_out import evaluate
from qlora.training.optimizer import MasterOptimizer
from qlora.training.progress import Progress
from qlora.training.step import LOST_PEER, NonFiniteStep, StepOutOfMemory, any_device, train_step


@dataclass
class StepMetrics:
    """One line of metrics.jsonl; counts are those of all devices together."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    target_tokens: int
    tokens_per_second: float
    peak_memory_gib: float


def train_window(
    model: nn.Module,
    optimizer: MasterOptimizer,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    learning_rate: float,
    max_grad_norm: float = 0.0,
    check_adapters: bool = False,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> tuple[tuple[float, float, int, int], int | None]:
    """`train_step`, repeated in smaller micro-batches for as long as they do not fit in memory.

    Args:
        seed: of the step's random numbers, set before each try.
    Returns:
        (what train_step returns, the most tokens a micro-batch may hold from here on; None: no limit found).
    Raises:
        TrainingStopped: a micro-batch of a single example does not fit; and what train_step raises.
    """
    limit = None
    while True:
        torch.manual_seed(seed)
        try:
            step = train_step(model, optimizer, batches, accelerator, learning_rate, max_grad_norm, check_adapters)
            return step, limit
        except StepOutOfMemory as error:
            here = error.here
        if any_device(here and all(len(batch.examples) == 1 for batch in batches), accelerator):
            raise TrainingStopped(
                "even a micro-batch of one example does not fit in memory; lower --max-length, or pass "
                "--gradient-checkpointing on"
            )
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        if here:
            limit = max(batch.input_ids.numel() for batch in batches) // 2
            batches = [part for batch in batches for part in split_batch(batch, limit)]
            say(
                f"out of memory; the step is repeated as {len(batches)} micro-batches, at most {limit} tokens each"
            )


@dataclass
class _StepMaker:
    """Makes optimizer steps from windows of examples. Arguments as `fit`.

    Attributes:
        budget: the most tokens of a micro-batch; smaller once memory ran out.
        checked: whether every adapter was seen to have a gradient.
    """

    model: nn.Module
    optimizer: MasterOptimizer
    learning_rate: Callable[[int], float]
    examples: Sequence[Example]
    accelerator: Accelerator
    progress: Progress
    batch_size: int
    grad_accum: int
    max_length: int
    packing: bool
    max_grad_norm: float
    seed: int
    max_skipped: int
    log: Callable[[dict[str, Any]], None]
    keep_batch: Callable[[int, Sequence[Example]], str]
    say: Callable[[str], object]

    def __post_init__(self) -> None:
        self.ranks = ranks_of(self.model, self.accelerator)
        window = self.batch_size * self.grad_accum * self.ranks.data_size
        self.order = WindowOrder(sources_of(self.examples), window, self.seed)
        self.budget, self.checked = self.batch_size * self.max_length, False

    def make(self) -> None:
        """The next step, made or skipped; `progress` moves along."""
        step, progress = self.progress.step, self.progress
        self.checked = self._make(step) or self.checked
        progress.step, progress.eval_loss, progress.score = step + 1, None, None

    def _make(self, step: int) -> bool:
        """Whether the step was made: one with a non-finite loss is skipped."""
        rank, devices = self.ranks.data_rank, self.ranks.data_size
        started = time.perf_counter()
        window = [self.examples[i] for i in self.order.window(step)]
        mine = [window[i] for i in balance_by_length([len(e) for e in window], devices)[rank]]
        whole = make_batches(mine, self.batch_size, self.max_length, self.packing, self.accelerator.device.type)
        batches = [part for batch in whole for part in split_batch(batch, self.budget)]
        rate, step_seed = self.learning_rate(step), (self.seed * 1_000_003 + step) * 4096 + rank
        try:
            (loss, norm, tokens, targets), limit = train_window(
                self.model, self.optimizer, batches, self.accelerator, rate, self.max_grad_norm,
                not self.checked, step_seed, self.say,
            )  # fmt: skip
        except NonFiniteStep as error:
            self._skip(step, window, rate, error)
            return False
        self.budget = limit or self.budget
        speed, memory = tokens / (time.perf_counter() - started), peak_memory_gib(self.accelerator.device)
        self.log(asdict(StepMetrics(step + 1, loss, norm, rate, tokens, targets, speed, memory)))
        return True

    def _skip(self, step: int, window: Sequence[Example], rate: float, error: NonFiniteStep) -> None:
        where, progress, limit = self.keep_batch(step + 1, window), self.progress, self.max_skipped
        if progress.skipped == limit:
            raise TrainingStopped(f"{error}; {limit} such steps were skipped before. {where}") from error
        progress.skipped += 1
        if self.accelerator.is_main_process:
            self.say(f"step {step + 1} skipped ({progress.skipped} of at most {limit}): {error}. {where}")
        self.log({"step": step + 1, "loss": None, "skipped": progress.skipped, "learning_rate": rate})


@dataclass
class _Watcher:
    """Looks at the model between steps: evaluates, judges, samples. Arguments as `fit`."""

    model: nn.Module
    accelerator: Accelerator
    progress: Progress
    total_steps: int
    eval_examples: Sequence[Example]
    eval_every: int
    packing: bool
    score: Callable[[Callable[[], str | None]], float | None] | None
    patience: int
    min_delta: float
    sample: Callable[[int], object] | None
    sample_every: int
    log: Callable[[dict[str, Any]], None]
    stop: Callable[[], str | None]

    @property
    def is_enough(self) -> bool:
        """Whether patience has run out before the last step."""
        return 0 < self.patience <= self.progress.stale and self.progress.step < self.total_steps

    def evaluate_if_due(self, budget: int) -> tuple[bool, bool]:
        """(whether this state still wants its evaluation, whether it had it now and is the best so far)."""
        step = self.progress.step
        is_due = self.eval_every and (step % self.eval_every == 0 or step == self.total_steps)
        if not is_due or self.progress.eval_loss is not None:
            return False, False
        held_out = evaluate(self.model, self.eval_examples, self.accelerator, budget, self.packing, self.stop)
        score = self.score(self.stop) if self.score is not None and held_out is not None else None
        if held_out is None or (self.score is not None and score is None):
            return True, False  # a reason to stop came first; a resumed run begins with the evaluation
        if not math.isfinite(held_out):
            raise TrainingStopped(f"the held-out loss is {held_out}; look at the held-out data")
        is_best = self.progress.judge(held_out, score, self.min_delta)
        line: dict[str, Any] = {"step": step, "eval_loss": held_out}
        line |= {"exact_match": score} if score is not None else {}
        line |= {"stale_evaluations": self.progress.stale} if self.patience else {}
        self.log(line | ({"stopped_early": True} if self.is_enough else {}))
        return False, is_best

    def sample_if_due(self, is_last: bool) -> None:
        """Sample where the step, or an evaluation of this state, asks for it and it has not been done."""
        step, is_evaluated = self.progress.step, self.progress.eval_loss is not None
        by_step = self.sample_every and step and (step % self.sample_every == 0 or is_last)
        with_evaluation = is_evaluated and (self.sample_every == 0 or step == 0)
        if self.sample is not None and self.progress.sampled < step and (by_step or with_evaluation):
            self.sample(step)
            self.progress.sampled = step

    def say_if_enough(self, say: Callable[[str], object]) -> None:
        """Say, on the main process, that the run ends before its last step."""
        if self.is_enough and self.accelerator.is_main_process:
            say(
                f"stopped early after step {self.progress.step} of {self.total_steps}; evaluations in a row that "
                f"were no better: {self.progress.stale} (--early-stopping-patience {self.patience})"
            )


def fit(
    model: nn.Module,
    optimizer: MasterOptimizer,
    learning_rate: Callable[[int], float],
    examples: Sequence[Example],
    accelerator: Accelerator,
    *,
    total_steps: int,
    batch_size: int,
    grad_accum: int,
    max_length: int,
    packing: bool = True,
    max_grad_norm: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    eval_examples: Sequence[Example] = (),
    eval_every: int = 0,
    score: Callable[[Callable[[], str | None]], float | None] | None = None,
    patience: int = 0,
    min_delta: float = 0.0,
    sample: Callable[[int], object] | None = None,
    sample_every: int = 0,
    save_every: int = 0,
    keep_best: bool = False,
    max_skipped: int = 0,
    save: Callable[[Progress], None] = lambda progress: None,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    keep_batch: Callable[[int, Sequence[Example]], str] = lambda step, window: "",
    stop: Callable[[], str | None] = lambda: None,
    say: Callable[[str], object] = print,
) -> None:
    """Train from where `progress` stands up to `total_steps`; `progress` moves along.

    Args:
        learning_rate: of the optimizer step counted from 0.
        score: what an evaluation is judged by instead of its loss, higher is better; called on every process with
            `stop`, and None once that gave a reason.
        patience: end after so many evaluations without one better by more than `min_delta`; 0 = never.
        sample: shows what the model does at a step: every `sample_every` steps and at the end, or with each
            evaluation (0); called on every process.
        max_skipped: steps with a non-finite loss that are left out before training stops.
        save: writes the state as it is: every `save_every` steps; after the best evaluation so far, with
            `save_every` or `keep_best`; at the end; before a stop.
        log: receives one dict per step, and {"step", "eval_loss", ...} per evaluation; called on every process.
        keep_batch: writes the examples of a step with a non-finite loss for inspection, and says where.
        stop: why the run should end now, or None; asked between steps and while evaluating.
    Raises:
        StoppedOnRequest: `stop` gave a reason.
        TrainingStopped: too many non-finite steps, an example that does not fit in memory, adapters without a
            gradient, another process that died. The state before it is saved, or the error says why it is not.
    """
    progress = progress or Progress()
    steps = _StepMaker(
        model, optimizer, learning_rate, examples, accelerator, progress, batch_size, grad_accum, max_length,
        packing, max_grad_norm, seed, max_skipped, log, keep_batch, say,
    )  # fmt: skip
    watcher = _Watcher(
        model, accelerator, progress, total_steps, eval_examples, eval_every, packing, score, patience, min_delta,
        sample, sample_every, log, stop,
    )  # fmt: skip
    model.train()
    for parameter in lora_parameters(model):
        parameter.grad_dtype = torch.float32
    saved = replace(progress)

    def save_if_new() -> None:
        nonlocal saved
        if progress != saved:
            save(progress)
            saved = replace(progress)

    peers = watch_peers(accelerator)
    try:
        while True:
            is_pending, is_best = watcher.evaluate_if_due(steps.budget)
            step, reason = progress.step, stop()
            is_stopped = any_device(reason is not None, accelerator)
            is_last = (watcher.is_enough or step >= total_steps) and not is_pending
            if is_last or not (is_stopped or is_pending):
                watcher.sample_if_due(is_last)
            by_step = save_every and step % save_every == 0
            by_evaluation = is_best and (save_every or keep_best)
            if is_last or is_stopped or (step and (by_step or by_evaluation)):
                save_if_new()
            if is_last:
                return watcher.say_if_enough(say)
            if is_stopped:
                reason = reason or "another process was asked to stop"
                raise StoppedOnRequest(
                    f"stopped after step {step} of {total_steps} ({reason}); --resume auto goes on from there"
                )
            steps.make()
    except RuntimeError as error:
        peers.stand_down()
        lost_peer = not isinstance(error, TrainingStopped)
        if lost_peer and not (accelerator.num_processes > 1 and LOST_PEER.search(str(error))):
            raise
        clear_frames(error.__traceback__)  # with what a step in need of memory held
        optimizer.zero_grad()
        cause = peers.describe(error) if lost_peer else str(error)
        state = "the state before it is saved"
        try:
            save_if_new()
        except Exception as failure:  # which must not hide why training stopped
            last = f"that after step {saved.step} is the last saved" if saved.step else "none was saved before"
            state = f"the state before it could not be saved ({explain(failure)}); {last}"
        raise TrainingStopped(f"Training stopped at step {progress.step + 1}: {cause}; {state}.") from error
    finally:
        peers.leave(sys.exc_info()[1])
