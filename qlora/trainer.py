"""The training loop: the only file that knows accelerate's loop.

One optimizer step consumes a window of examples, spread over devices and micro-batches. Its loss is

    sum over the window's target tokens of their cross-entropy / number of those tokens

so 1 x 8, 2 x 4 and 8 x 1 examples, on one device or two, give one and the same gradient. Each micro-batch
adds its sum; one all-reduce adds the devices' adapter gradients, a few megabytes in fp32 (there is no DDP
wrapper: it would average over devices, and overlap what takes no time); then the whole is divided once.

Random numbers (dropout) are seeded per step and device, evaluation draws none and leaves no trace in the
model, and the data order is arithmetic: step k is the same however the run came to it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from qlora.device import available_memory, peak_memory_gib
from qlora.errors import TrainingStopped
from qlora.lora import lora_layers, lora_parameters
from qlora.loss import causal_lm_loss
from qlora.memory import plan_memory, wants_checkpointing
from qlora.optim import MasterOptimizer
from qlora.packing import Batch, WindowOrder, deal_examples, make_batches
from qlora.tokenize import Example


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
        TrainingStopped: before anything is changed, on a non-finite loss or gradient.
    """
    device = accelerator.device
    counts = torch.tensor([sum(b.num_tokens for b in batches), sum(b.num_targets for b in batches)], device=device)
    num_tokens, num_targets = accelerator.reduce(counts, "sum").tolist()
    losses = []
    for batch in batches:
        loss_sum, _ = causal_lm_loss(model, batch.to(device))
        accelerator.backward(loss_sum)
        losses.append(loss_sum.detach())
    total = torch.stack(losses).sum() if losses else torch.zeros((), device=device)
    _sum_gradients(optimizer.parameters, accelerator)
    for parameter in optimizer.parameters:
        if parameter.grad is not None:
            parameter.grad.div_(max(1, num_targets))  # once, in fp32
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in optimizer.parameters if p.grad is not None])
    loss, norm = (accelerator.reduce(total, "sum") / max(1, num_targets)).item(), grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        bad = [i for i, value in enumerate(losses) if not torch.isfinite(value)]
        optimizer.zero_grad()
        where = f"micro-batch {bad[0] + 1} of {len(batches)}" if bad else "the gradient"
        raise TrainingStopped(f"loss {loss}, gradient norm {norm}, first in {where}")
    if check_adapters:
        check_adapters_learn(model)
    if 0 < max_grad_norm < norm:
        for parameter in optimizer.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(max_grad_norm / norm)
    optimizer.step(learning_rate)
    return loss, norm, num_tokens, num_targets


def _sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Add the devices' gradients, in place, as one flat fp32 all-reduce."""
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    summed = accelerator.reduce(flat.float(), "sum")
    for parameter, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


@torch.no_grad()
def evaluate(
    model: nn.Module, examples: Sequence[Example], accelerator: Accelerator, budget: int, packing: bool = True
) -> float:
    """Mean loss per target token over `examples`, in nats; the model is left as it was found.

    Args:
        budget: tokens of a micro-batch.
    """
    was_training = model.training
    model.eval()
    mine = deal_examples([len(e) for e in examples], accelerator.num_processes)[accelerator.process_index]
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    longest = max(len(e) for e in examples)
    for batch in make_batches([examples[i] for i in mine], max(1, budget // longest), longest, packing):
        loss_sum, count = causal_lm_loss(model, batch.to(accelerator.device))
        sums += torch.stack([loss_sum.double(), torch.tensor(count, device=sums.device)])
    model.train(was_training)
    loss_sum, count = accelerator.reduce(sums, "sum").tolist()
    return loss_sum / count


def settle_checkpointing(model: Any, mode: str, budget: int, say: Callable[[str], Any] = print) -> bool:
    """Switch gradient checkpointing on or off, and say which and what memory the run is planned to take.

    Non-reentrant: the reentrant kind finds no gradient at all behind frozen embeddings.

    Args:
        mode: "on", "off", or "auto": on only where `budget` tokens' activations would not fit.
    """
    dtype, device = model.compute_dtype, next(model.parameters()).device
    plan = plan_memory(model, budget, dtype, checkpointing=False)
    on = wants_checkpointing(mode, plan.activations, available_memory(device))
    if on:
        # transformers 5.21 renamed it and warns of the old name; Python 3.10 has nothing newer than 5.20.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    name = str(dtype).removeprefix("torch.")
    say(f"computing in {name}, gradient checkpointing {'on' if on else 'off'}")
    say(f"{plan_memory(model, budget, dtype, on)} at {budget} tokens a micro-batch")
    return on


def check_adapters_learn(model: nn.Module) -> None:
    """After the first backward pass every adapter must have a gradient.

    Raises:
        TrainingStopped: names the layers without one; what they would have learned is lost otherwise.
    """
    silent = [
        n for n, layer in lora_layers(model).items() if layer.lora_A.grad is None or layer.lora_B.grad is None
    ]
    if silent:
        raise TrainingStopped(f"these adapters got no gradient: {', '.join(silent)}")


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
    start_step: int = 0,
    eval_examples: Sequence[Example] = (),
    eval_every: int = 0,
    save_every: int = 0,
    save: Callable[[int], None] = lambda step: None,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
) -> None:
    """Train from `start_step` to `total_steps`.

    Args:
        learning_rate: of the optimizer step counted from 0.
        save: writes the state after that many steps; called every `save_every`, at the end and before a stop.
        log: receives one dict per step, and {"step", "eval_loss"} per evaluation; called on every process.
    Raises:
        TrainingStopped: see `train_step` and `check_adapters_learn`; the state before the step is saved.
    """
    window_size = batch_size * grad_accum * accelerator.num_processes
    order = WindowOrder(len(examples), window_size, seed)
    model.train()
    for parameter in lora_parameters(model):
        parameter.grad_dtype = torch.float32
    if eval_every and start_step == 0:
        log(
            {
                "step": 0,
                "eval_loss": evaluate(model, eval_examples, accelerator, batch_size * max_length, packing),
            }
        )
    for step in range(start_step, total_steps):
        started = time.perf_counter()
        window = [examples[i] for i in order.window(step)]
        mine = deal_examples([len(e) for e in window], accelerator.num_processes)[accelerator.process_index]
        batches = make_batches([window[i] for i in mine], batch_size, max_length, packing)
        torch.manual_seed((seed * 1_000_003 + step) * 4096 + accelerator.process_index)
        rate = learning_rate(step)
        try:
            optimizer.zero_grad()
            loss, norm, tokens, targets = train_step(
                model, optimizer, batches, accelerator, rate, max_grad_norm, check_adapters=step == start_step
            )
        except TrainingStopped as error:
            save(step)
            rows = ", ".join(str(i) for i in order.window(step))
            raise TrainingStopped(
                f"Training stopped at step {step + 1}: {error}. The step's examples were numbers {rows} of the "
                f"data; the state before it is saved."
            ) from error
        seconds = time.perf_counter() - started
        memory = peak_memory_gib(accelerator.device)
        log(asdict(StepMetrics(step + 1, loss, norm, rate, tokens, targets, tokens / seconds, memory)))
        done = step + 1
        if eval_every and (done % eval_every == 0 or done == total_steps):
            held_out = evaluate(model, eval_examples, accelerator, batch_size * max_length, packing)
            log({"step": done, "eval_loss": held_out})
        if (save_every and done % save_every == 0) or done == total_steps:
            save(done)
