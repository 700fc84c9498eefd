"""One optimizer step over the micro-batches of a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qlora.data.batches import Batch, make_batches
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import active_adapter, lora_layers
from qlora.lora.optimizer import MasterOptimizer
from qlora.model.base import ranks_of
from qlora.model.loss import causal_lm_loss
from qlora.system.errors import TrainingStopped
from qlora.system.memory import is_out_of_memory
from qlora.system.ranks import Ranks


class NonFiniteStep(TrainingStopped):
    """A loss or gradient that is not finite; nothing was changed."""


class StepOutOfMemory(TrainingStopped):
    """Activations did not fit; nothing was changed. `here`: on this device."""

    def __init__(self, here: bool) -> None:
        super().__init__("out of memory")
        self.here = here


class StoppedAtStep(TrainingStopped):
    """A step failed for good. `state`: what became of the state before it, set by the code that saves it."""

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(step, cause)
        self.step, self.cause, self.state = step, cause, "the state before it is not saved"

    def __str__(self) -> str:
        return f"Training stopped at step {self.step}: {self.cause}; {self.state}."


@dataclass(frozen=True)
class StepResult:
    """The result of a step; losses in nats, counts summed over devices.

    Attributes:
        loss: per target token of the window; of preferences, per row.
        grad_norm: before clipping.
        num_tokens, num_targets: tokens of the window, and how many have a target.
        largest_micro_batch: tokens that a micro-batch may hold from now on, found because memory ran out in this
            step; None: it did not.
        measures: what else the window's loss measured, by its name in metrics.jsonl.
    """

    loss: float
    grad_norm: float
    num_tokens: int
    num_targets: int
    largest_micro_batch: int | None = None
    measures: dict[str, float] = field(default_factory=dict)


class WindowLoss(Protocol):
    """Replaces the cross-entropy as the loss of a window: `training.preferences.Preferences`."""

    num_rows: int
    """Rows of the window on all devices, by which the sum of the losses is divided."""

    def begin(self, model: nn.Module, batches: Sequence[Batch], accelerator: Accelerator) -> Sequence[Batch]:
        """Prepare a window; returns the micro-batches to compute."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum of a micro-batch's losses."""

    def finish(self, ranks: Ranks) -> dict[str, float]:
        """What else was measured in the window, the same on all devices."""


def train_step(
    model: nn.Module,
    optimizer: MasterOptimizer,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    learning_rate: float,
    max_grad_norm: float = 0.0,
    check_adapters: bool = False,
    window_loss: WindowLoss | None = None,
) -> StepResult:
    """Train on one window with one update.

    Args:
        model: causal LM in training mode with trainable LoRA parameters.
        batches: this device's micro-batches of the window, possibly none.
        max_grad_norm: clip the global gradient to this norm; 0 = never.
        check_adapters: stop if an adapter got no gradient (`check_adapters_learn`).
        window_loss: instead of the mean cross-entropy per target token.
    Raises:
        NonFiniteStep, StepOutOfMemory: on all devices, before anything is changed.
    """
    optimizer.zero_grad()
    device, ranks = accelerator.device, ranks_of(model, accelerator)
    counts = sum(b.num_tokens for b in batches), sum(b.num_targets for b in batches)
    num_tokens, num_targets = ranks.totals(counts, device)
    batches = in_lockstep(batches, ranks, device)
    losses: list[Tensor] = []
    is_out = False
    try:
        if window_loss is not None:
            batches = window_loss.begin(model, batches, accelerator)
        for batch in batches:
            on_device = batch.to(device)
            loss_sum = window_loss.loss(model, on_device) if window_loss else causal_lm_loss(model, on_device)[0]
            accelerator.backward(loss_sum)
            losses.append(loss_sum.detach())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if ranks.is_split:  # the others wait in the middle of a layer and cannot be asked
            raise TrainingStopped(
                "a micro-batch does not fit in memory, and a split base takes no smaller ones; lower --max-length "
                "or --batch-size, or pass --gradient-checkpointing on"
            ) from error
        is_out = True  # handled outside of this block: the error holds the activations
    if any_device(is_out, accelerator):
        raise StepOutOfMemory(here=is_out)
    divisor = max(1, window_loss.num_rows if window_loss else num_targets)
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
    _sum_gradients(optimizer.parameters, ranks)
    gradients = [p.grad for p in optimizer.parameters if p.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, divisor)  # once, in fp32
    grad_norm = torch.nn.utils.get_total_norm(gradients)
    # Together, since the host waits for the device.
    loss, norm = torch.stack([ranks.sum(total) / divisor, grad_norm.to(total)]).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [i for i, value in enumerate(losses) if not torch.isfinite(value)]
        where = f"micro-batch {bad[0] + 1} of {len(batches)}" if bad else "the gradient"
        raise NonFiniteStep(f"loss {loss}, gradient norm {norm}, first in {where}")
    if check_adapters:
        check_adapters_learn(model)
    # torch's clip_grads_with_norm_ divides by norm + 1e-6, which changes the bits of every clipped step.
    if 0 < max_grad_norm < norm and gradients:
        torch._foreach_mul_(gradients, max_grad_norm / norm)
    optimizer.step(learning_rate)
    measures = window_loss.finish(ranks) if window_loss else {}
    return StepResult(loss, norm, num_tokens, num_targets, measures=measures)


def any_device(flag: bool, accelerator: Accelerator) -> bool:
    """Whether the flag is set on any device; the same answer on all."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), "sum").item())


def _sum_gradients(parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
    """Sum the processes' gradients in one flat fp32 all-reduce.

    They are moved into one tensor that is summed in place: at most one copy exists besides them, none while sent.
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
    """If the base is split, append empty micro-batches without targets, so that all processes have as many."""
    if not ranks.is_split:
        return batches
    missing = ranks.max(len(batches), device) - len(batches)
    nothing = torch.tensor([0]), torch.tensor([IGNORE_INDEX])
    return [*batches, *make_batches([Example(*nothing)] * missing, 1, 1, False, device.type)]


def check_adapters_learn(model: nn.Module) -> None:
    """Check after the first backward pass that every adapter parameter has a gradient.

    Raises:
        TrainingStopped: names the layers without one, which would learn nothing.
    """
    silent = [
        n
        for n, layer in lora_layers(model).items()
        if layer.weights.lora_A.grad is None or layer.weights.lora_B.grad is None
    ]
    adapter = active_adapter(model)
    trained = {} if adapter is None else adapter.trained
    # A bias may lack one: no token may have chosen its expert yet.
    silent += [n for n, parameter in trained.items() if parameter.grad is None and not n.endswith(".bias")]
    if silent:
        raise TrainingStopped(f"these adapters got no gradient: {', '.join(silent)}")
