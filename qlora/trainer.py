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
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from traceback import clear_frames
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qlora.block import decoder_layers
from qlora.checkpoint import Progress
from qlora.device import GIB, available_memory, give_back_at_once, peak_memory_gib
from qlora.distributed import Ranks, ranks_of
from qlora.errors import StoppedOnRequest, TrainingStopped, is_out_of_memory
from qlora.files import explain
from qlora.injection import active_adapter, lora_layers, lora_parameters
from qlora.loss import CHUNK_SIZE, causal_lm_loss
from qlora.memory import MemoryPlan, choose_recomputed, default_limit, differentiated_layers, plan_recomputing
from qlora.optim import MasterOptimizer
from qlora.packing import (
    Batch,
    WindowOrder,
    deal_examples,
    lengths_of,
    make_batches,
    sources_of,
    split_batch,
)
from qlora.peers import watch_peers
from qlora.plan_devices import add_communication, layout_of, take_census
from qlora.shard import end_backward_at
from qlora.tokenize import IGNORE_INDEX, Example


class NonFiniteStep(TrainingStopped):
    """A loss or gradient that is no number; nothing was changed."""


class StepOutOfMemory(TrainingStopped):
    """Activations did not fit; nothing was changed. `here`: on this device."""

    def __init__(self, here: bool) -> None:
        super().__init__("out of memory")
        self.here = here


# What gloo and NCCL say when the other end of a collective is gone.
_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset)|peer", re.IGNORECASE)


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


def train_step(
    model: nn.Module,
    optimizer: MasterOptimizer,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    learning_rate: float,
    max_grad_norm: float = 0.0,
    check_adapters: bool = False,
) -> tuple[float, float, int, int]:
    """One window, one update.

    Args:
        model: causal LM in training mode, whose LoRA parameters train.
        batches: this device's micro-batches of the window; may be empty.
        max_grad_norm: clip the global gradient to this norm; 0 = never.
        check_adapters: stop if an adapter got no gradient (`check_adapters_learn`).
    Returns:
        (loss per target token in nats, gradient norm before clipping, tokens, target tokens) of the window.
    Raises:
        NonFiniteStep, StepOutOfMemory: on all devices, before anything is changed.
    """
    optimizer.zero_grad()
    device, ranks = accelerator.device, ranks_of(model, accelerator)
    counts = torch.tensor([sum(b.num_tokens for b in batches), sum(b.num_targets for b in batches)], device=device)
    num_tokens, num_targets = ranks.sum(counts).tolist()
    batches = in_lockstep(batches, ranks, device)
    losses: list[Tensor] = []
    full = False
    try:
        for batch in batches:
            loss_sum, _ = causal_lm_loss(model, batch.to(device))
            accelerator.backward(loss_sum)
            losses.append(loss_sum.detach())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if ranks.is_split:  # the others wait in the middle of a layer, and cannot be asked
            raise TrainingStopped(
                "a micro-batch does not fit in memory, and a split base takes no smaller ones; lower --max-length "
                "or --batch-size, or pass --gradient-checkpointing on"
            ) from error
        full = True  # and leave this block: the error holds the activations
    if _any_device(full, accelerator):
        raise StepOutOfMemory(here=full)
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
    _sum_gradients(optimizer.parameters, ranks)
    for parameter in optimizer.parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(1, num_targets))  # once, in fp32
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    loss, norm = (ranks.sum(total) / max(1, num_targets)).item(), grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [i for i, value in enumerate(losses) if not torch.isfinite(value)]
        where = f"micro-batch {bad[0] + 1} of {len(batches)}" if bad else "the gradient"
        raise NonFiniteStep(f"loss {loss}, gradient norm {norm}, first in {where}")
    if check_adapters:
        check_adapters_learn(model)
    if 0 < max_grad_norm < norm:
        for parameter in optimizer.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_grad_norm / norm)
    optimizer.step(learning_rate)
    return loss, norm, num_tokens, num_targets


def _any_device(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is up on any device; the same answer on all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum").item())


def _sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Add the processes' gradients as one flat fp32 all-reduce.

    They are moved into a tensor that is summed in place, so that beside them there is one copy at most, and while
    it is sent none.
    """
    if ranks.size == 1:
        return
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
    parts = [part.view_as(p) for part, p in zip(flat.split(sizes), parameters, strict=True)]
    for parameter, part in zip(parameters, parts, strict=True):
        if parameter.grad is not None:
            part.copy_(parameter.grad)
            parameter.grad = None
    ranks.sum_in_place(flat)
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part


def in_lockstep(batches: Sequence[Batch], ranks: Ranks, device: torch.device) -> Sequence[Batch]:
    """As many micro-batches on every process where the base is split: empty ones, without a target, at the end."""
    if not ranks.is_split:
        return batches
    missing = ranks.max(len(batches), device) - len(batches)
    nothing = torch.tensor([0]), torch.tensor([IGNORE_INDEX])
    return [*batches, *make_batches([Example(*nothing)] * missing, 1, 1, False, device.type)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    accelerator: Accelerator,
    budget: int,
    packing: bool = True,
    stop: Callable[[], str | None] = lambda: None,
) -> float | None:
    """Mean loss per target token over `examples`, in nats; the model is left as it was found.

    Args:
        budget: tokens of a micro-batch; halved for as long as one does not fit in memory.
        stop: asked after each micro-batch; once there is a reason on any device, the result is None.
    """
    was_training = model.training
    model.eval()
    lengths, ranks = lengths_of(examples), ranks_of(model, accelerator)
    mine = deal_examples(lengths, ranks.data_size)[ranks.data_rank]
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    longest = max(lengths)
    rows, kind = max(1, budget // longest), accelerator.device.type
    waiting = make_batches([examples[i] for i in mine], rows, longest, packing, kind)
    waiting = list(in_lockstep(waiting, ranks, accelerator.device))
    while waiting and not sums[2]:
        batch = waiting.pop()
        try:
            loss_sum, count = causal_lm_loss(model, batch.to(accelerator.device))
            sums[:2] += torch.stack([loss_sum.double(), torch.tensor(count, device=sums.device)])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch.examples) == 1 or ranks.is_split:
                raise TrainingStopped("a held-out example does not fit in memory; lower --max-length") from error
            waiting += split_batch(batch, batch.input_ids.numel() // 2)
        reason = stop() is not None
        sums[2] = ranks.max(reason, accelerator.device) if ranks.is_split else reason
    model.train(was_training)
    loss_sum, count, stopped = ranks.sum(sums).tolist()
    return None if stopped else loss_sum / count


def settle_checkpointing(
    model: Any,
    mode: str,
    num_tokens: int,
    memory_budget: int | None = None,
    accelerator: Accelerator | None = None,
    say: Callable[[str], Any] = print,
    optim: str = "adamw",
) -> tuple[float, MemoryPlan]:
    """Have the lowest layers recompute their activations, and say how many do, why, and what the run should take.

    Non-reentrant: the reentrant kind finds no gradient at all behind frozen embeddings. A sharded base is gathered
    for the backward pass no lower than it goes.

    Args:
        mode: "on" all layers, "off" none, "auto" as few as make the plan fit the budget.
        num_tokens: the most that a micro-batch holds.
        memory_budget: bytes for all that is planned; None = the base and half of the free memory.
        accelerator: names the device that computes; its processes share a CPU's memory, and decide alike.
        optim: kind of optimizer.
    Returns:
        (the share of the model's decoder layers that are recomputed, from 0 to 1; the plan).
    """
    dtype = model.compute_dtype
    device = next(model.parameters()).device if accelerator is None else accelerator.device
    layers = differentiated_layers(model)
    ranks = ranks_of(model, accelerator)
    divided = ranks.tensor_size, ranks.sequence_parallel
    plans = plan_recomputing(model, num_tokens, dtype, CHUNK_SIZE, optim, *divided)
    if ranks.size > 1:
        census = take_census(model)
        if ranks.cpu_offload:  # the shares are in main memory
            plans = [replace(plan, base=census.replaced) for plan in plans]
        plans = add_communication(plans, census, layout_of(ranks), num_tokens)
    limit, source = memory_budget, "--memory-budget"
    if limit is None:
        free = _free_memory(device, accelerator)
        limit, source = default_limit(plans[0], free), "what is loaded and half of what is free"
    number = choose_recomputed(mode, [plan.total for plan in plans], limit)
    if ranks.shard_mesh is not None and layers:
        end_backward_at(layers[0])
    for index, layer in enumerate(layers):
        # What transformers' own switch does, but for making the embeddings' output want a gradient: layers below
        # the first adapted one would then be differentiated for nothing.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = index < number
    if number and device.type == "cpu":  # memory is short
        give_back_at_once()
    reason = f"--gradient-checkpointing {mode}"
    if mode == "auto":
        reason = f"keeping all would take {plans[0].total / GIB:.2f} of at most {limit / GIB:.2f} GiB, {source}"
    name, planned = str(dtype).removeprefix("torch."), plans[number]
    say(f"computing in {name}; {number} of {len(layers)} layers are recomputed in the backward pass ({reason})")
    excess = "; more than that, so it may not fit" if mode == "auto" and planned.total > limit else ""
    say(f"{planned} at {num_tokens} tokens a micro-batch{excess}")
    return number / max(1, len(decoder_layers(model))), planned


def _free_memory(device: torch.device, accelerator: Accelerator | None) -> int:
    """Bytes free for this process: of a CPU's, a share; the least of all processes, so that they decide alike."""
    free = available_memory(device)
    if accelerator is None or accelerator.num_processes == 1:
        return free
    if device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return int(accelerator.gather(torch.tensor([free], device=device)).min())


def check_adapters_learn(model: nn.Module) -> None:
    """After the first backward pass every adapter, and what trains beside it, must have a gradient.

    Raises:
        TrainingStopped: names the layers without one; what they would have learned is lost otherwise.
    """
    silent = [
        n for n, layer in lora_layers(model).items() if layer.lora_A.grad is None or layer.lora_B.grad is None
    ]
    adapter = active_adapter(model)
    trained = {} if adapter is None else adapter.trained
    # A bias may wait: that of an expert which no token has chosen yet.
    silent += [n for n, parameter in trained.items() if parameter.grad is None and not n.endswith(".bias")]
    if silent:
        raise TrainingStopped(f"these adapters got no gradient: {', '.join(silent)}")


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
        if _any_device(here and all(len(batch.examples) == 1 for batch in batches), accelerator):
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
        mine = [window[i] for i in deal_examples([len(e) for e in window], devices)[rank]]
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
            is_stopped = _any_device(reason is not None, accelerator)
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
        if lost_peer and not (accelerator.num_processes > 1 and _LOST_PEER.search(str(error))):
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
