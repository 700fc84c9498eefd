"""The training loop: windows of examples become optimizer steps, and observers watch.

One optimizer step consumes a window of examples, spread over devices and micro-batches. Its loss is

    sum over the window's target tokens of their cross-entropy / number of those tokens

(of preferences the mean over the window's rows, preferences.py),

so 1 x 8, 2 x 4 and 8 x 1 examples, on one device or two, give the same gradient. Each micro-batch adds its sum;
one all-reduce adds the devices' adapter gradients, a few megabytes in fp32 (a DDP wrapper would average over
devices, and overlap communication that takes no time); then the sum is divided once.

Random numbers (dropout) are seeded per step and device, evaluation draws none and leaves the model unchanged, and
the data order is a function of the step: step k is the same however the run got there.

A failure in a step leaves the state before it intact: only `optimizer.step` changes the model, and it comes last.
Out of memory: repeat the step with smaller micro-batches. A non-finite loss: skip the step and keep its examples,
up to a limit. Another process died: save and stop. Devices agree on each of these before they act; otherwise one
would wait forever in a collective that another never enters.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qlora.data.batches import Batch, balance_by_length, make_batches, split_batch
from qlora.data.example import Example
from qlora.data.order import WindowOrder, sources_of
from qlora.lora.optimizer import MasterOptimizer, take_gradients
from qlora.lora.trainable import lora_parameters
from qlora.model.base import ranks_of
from qlora.parallel.watchdog import PeerWatch, watch_peers
from qlora.system.errors import StoppedOnRequest, TrainingStopped
from qlora.system.memory import peak_memory_gib
from qlora.training.held_out import AskStop, evaluate
from qlora.training.observer import Observer
from qlora.training.preferences import Preferences
from qlora.training.progress import Progress
from qlora.training.skipped import keep_examples
from qlora.training.step import (
    NonFiniteStep,
    StepOutOfMemory,
    StepResult,
    StoppedAtStep,
    any_device,
    train_step,
)


@dataclass
class StepMetrics:
    """One line of metrics.jsonl; counts are sums over devices."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    target_tokens: int
    tokens_per_second: float
    peak_memory_gib: float


@dataclass(frozen=True)
class TrainingData:
    """Examples, and how they are grouped into windows and micro-batches.

    Args:
        batch_size: examples of a micro-batch on one device, at most `batch_size` x `max_length` tokens in all.
        grad_accum: micro-batches of a step on one device.
        packing: concatenate a micro-batch's examples into one row; False: pad them.
        seed: for the data order and each step's random numbers.
        held_out: examples for evaluation.
        preferences: the loss of examples that are preferences.
    """

    examples: Sequence[Example]
    batch_size: int
    grad_accum: int
    max_length: int
    packing: bool = True
    seed: int = 0
    held_out: Sequence[Example] = ()
    preferences: Preferences | None = None


@dataclass(frozen=True)
class Limits:
    """How far a run goes.

    Args:
        total_steps: optimizer steps of the whole run, including those before a resume.
        max_grad_norm: clip each step's gradient to this norm; 0 = never.
        max_skipped: steps with a non-finite loss to skip before training stops.
        skipped_dir: where examples of such steps are saved; None: nowhere.
    """

    total_steps: int
    max_grad_norm: float = 0.0
    max_skipped: int = 0
    skipped_dir: Path | None = None


@dataclass
class Trainer:
    """Trains an adapted model, one window of examples per optimizer step.

    Args:
        schedule: learning rate of the optimizer step counted from 0.
        accelerator: this process's device and the connection to the other processes.
        observers: called in this order (`Observer`).
        say: receives sentences for the user.
    Attributes:
        progress: where the run is; passed to `fit`, which updates it.
        budget: tokens that a micro-batch may hold; reduced when memory runs out.
        is_pending: the evaluation of this state is still due, because a request to stop came first.
        is_enough: the run ends here as if its last step were done.
    """

    model: nn.Module
    optimizer: MasterOptimizer
    schedule: Callable[[int], float]
    data: TrainingData
    accelerator: Accelerator
    limits: Limits
    observers: Sequence[Observer] = ()
    say: Callable[[str], object] = print
    progress: Progress = field(init=False, default_factory=Progress)
    is_pending: bool = field(init=False, default=False)
    is_enough: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.ranks = ranks_of(self.model, self.accelerator)
        window = self.data.batch_size * self.data.grad_accum * self.ranks.data_size
        self.order = WindowOrder(sources_of(self.data.examples), window, self.data.seed)
        self.budget = self.data.batch_size * self.data.max_length
        self._is_checked = False  # whether every adapter is known to get a gradient
        self._reason: str | None = None
        self._agreed: bool | None = None

    def fit(self, progress: Progress | None = None) -> None:
        """Train from `progress` to the last step, updating `progress`.

        Raises:
            StoppedOnRequest: an observer gave a reason.
            TrainingStopped: too many non-finite steps, an example that does not fit in memory, adapters without a
                gradient, or another process died. It says whether the state before it is saved.
        """
        self.progress = progress or Progress()
        self.model.train()
        take_gradients(lora_parameters(self.model), torch.float32)
        peers = watch_peers(self.accelerator)
        try:
            while self._goes_on():
                started = time.perf_counter()
                self._tell(self.step(), time.perf_counter() - started)
        except RuntimeError as error:
            peers.stop()
            stopped = self._explain(error, peers)
            self._end(stopped or error)
            if stopped is None:
                raise
            raise TrainingStopped(str(stopped)) from error
        except BaseException as error:
            self._end(error)
            raise
        else:
            self._end(None)
        finally:
            take_gradients(lora_parameters(self.model), None)  # as any other optimizer expects them
            peers.leave(sys.exc_info()[1])

    def step(self) -> StepResult | None:
        """Train on one window, in smaller micro-batches if memory runs out, and update `progress`.

        Returns:
            The step's result; None: its loss is not finite, and it is skipped.
        Raises:
            TrainingStopped: a micro-batch of a single example does not fit; too many steps were skipped; an
                adapter has no gradient.
        """
        window = [self.data.examples[i] for i in self.order.window(self.progress.step)]
        result: StepResult | None = None
        try:
            result = self._update(window)
            self.budget = result.largest_micro_batch or self.budget
        except NonFiniteStep as error:
            self._skip(window, error)
        self.progress.step, self.progress.eval_loss, self.progress.score = self.progress.step + 1, None, None
        return result

    def held_out(self, stop: AskStop = lambda: None) -> dict[str, float] | None:
        """Numbers of the held-out examples by name; `eval_loss` is the mean per target token, in nats, or per row.

        None: `stop` gave a reason first.
        """
        data = self.data
        compute = evaluate if data.preferences is None else data.preferences.evaluate
        found = compute(self.model, data.held_out, self.accelerator, self.budget, data.packing, stop)
        return {"eval_loss": found} if isinstance(found, float) else found

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        is_done = self.is_enough or self.progress.step >= self.limits.total_steps
        return is_done and not self.is_pending

    def is_stopping(self) -> bool:
        """Whether any process has a reason to stop here; call on all: the first call asks them."""
        if self._agreed is None:
            self._agreed = any_device(self._reason is not None or self.is_pending, self.accelerator)
        return self._agreed

    def _goes_on(self) -> bool:
        """Ask the observers; returns whether there is another step to make."""
        self._agreed = None
        for observer in self.observers:
            reason = observer.before_step(self)
            self._reason = self._reason or reason
        if not self.is_last and self.is_stopping():
            raise StoppedOnRequest(
                f"stopped after step {self.progress.step} of {self.limits.total_steps} "
                f"({self._reason or 'another process was asked to stop'}); --resume auto goes on from there"
            )
        return not self.is_last

    def _tell(self, result: StepResult | None, seconds: float) -> None:
        """Send a step's line of metrics.jsonl to the observers."""
        step = self.progress.step
        rate = self.schedule(step - 1)
        line: dict[str, Any] = {
            "step": step,
            "loss": None,
            "skipped": self.progress.skipped,
            "learning_rate": rate,
        }
        if result is not None:
            speed, memory = result.num_tokens / seconds, peak_memory_gib(self.accelerator.device)
            counts = result.num_tokens, result.num_targets
            line = asdict(StepMetrics(step, result.loss, result.grad_norm, rate, *counts, speed, memory))
            line |= result.measures
        for observer in self.observers:
            observer.after_step(self, line)

    def _end(self, error: BaseException | None) -> None:
        """Tell all observers that the loop has ended, even if one fails, without hiding an error."""
        failure: Exception | None = None
        for observer in self.observers:
            try:
                observer.at_end(self, error)
            except Exception as problem:
                failure = failure or problem
        if failure is not None and error is None:
            raise failure

    def _micro_batches(self, window: Sequence[Example]) -> list[Batch]:
        """This device's share of a window."""
        data, lengths = self.data, [len(example) for example in window]
        mine = [window[i] for i in balance_by_length(lengths, self.ranks.data_size)[self.ranks.data_rank]]
        whole = make_batches(mine, data.batch_size, data.max_length, data.packing, self.accelerator.device.type)
        return [part for batch in whole for part in split_batch(batch, self.budget)]

    def _update(self, window: Sequence[Example]) -> StepResult:
        """`train_step`, repeated with smaller micro-batches while memory runs out."""
        step, limit, batches = self.progress.step, None, self._micro_batches(window)
        while True:
            torch.manual_seed((self.data.seed * 1_000_003 + step) * 4096 + self.ranks.data_rank)
            try:
                result = train_step(
                    self.model, self.optimizer, batches, self.accelerator, self.schedule(step),
                    self.limits.max_grad_norm, not self._is_checked, self.data.preferences,
                )  # fmt: skip
                self._is_checked = True
                return replace(result, largest_micro_batch=limit)
            except StepOutOfMemory as error:
                is_here = error.here  # handled outside of this block: the error holds the activations
            if any_device(is_here and all(len(batch.examples) == 1 for batch in batches), self.accelerator):
                raise TrainingStopped(
                    "even a micro-batch of one example does not fit in memory; lower --max-length, or pass "
                    "--gradient-checkpointing on"
                )
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
            if is_here:
                limit = max(batch.input_ids.numel() for batch in batches) // 2
                batches = [part for batch in batches for part in split_batch(batch, limit)]
                self.say(
                    f"out of memory; the step is repeated as {len(batches)} micro-batches, at most {limit} tokens "
                    "each"
                )

    def _skip(self, window: Sequence[Example], error: NonFiniteStep) -> None:
        """Count a step with a non-finite loss and keep its examples, or stop if there were too many."""
        progress, limit, is_main = self.progress, self.limits.max_skipped, self.accelerator.is_main_process
        where = keep_examples(self.limits.skipped_dir, progress.step + 1, window, is_main)
        if progress.skipped == limit:
            raise TrainingStopped(f"{error}; {limit} such steps were skipped before. {where}") from error
        progress.skipped += 1
        if is_main:
            self.say(f"step {progress.step + 1} skipped ({progress.skipped} of at most {limit}): {error}. {where}")

    def _explain(self, error: RuntimeError, peers: PeerWatch) -> StoppedAtStep | None:
        """Free the error's memory and convert it to what stopped the run; None: it is a bug in the program."""
        is_lost = not isinstance(error, TrainingStopped)
        if is_lost and not (self.accelerator.num_processes > 1 and is_lost_peer(error)):
            return None
        clear_frames(error.__traceback__)  # frees what the failed step held
        self.optimizer.zero_grad()
        return StoppedAtStep(self.progress.step + 1, peers.describe(error) if is_lost else str(error))


GLOO = re.compile(r"gloo|connection (closed|reset)", re.IGNORECASE)  # it raises plain RuntimeErrors


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone."""
    return isinstance(error, torch.distributed.DistError) or GLOO.search(str(error)) is not None
