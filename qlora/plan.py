"""The memory of a run on one device from the model's config alone: no weights are read or downloaded.

The modules are made on the meta device, the base in the form it would be loaded in and the adapter in it, and
counted by `plan_recomputing`, as every run counts its own model before the first step. What the device's memory
decides in a run (how many layers are recomputed) is decided here by the same rule from the size given.

Where a run does not fit, changes to its settings are tried one by one, those that change no result first, and
then together until it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from rich.console import Console
from rich.table import Table

from qlora.config import ModelConfig, RunConfig
from qlora.device import GIB, available_memory, resident_memory
from qlora.injection import (
    ParameterSummary,
    activate,
    create_adapter,
    freeze_base,
    parameter_summary,
    wrap_layers,
)
from qlora.loss import CHUNK_SIZE
from qlora.memory import MemoryPlan, choose_recomputed, decoder_layers, default_limit, plan_recomputing
from qlora.model import load_tokenizer, plan_base_model
from qlora.optim import choose_optimizer
from qlora.packing import most_tokens
from qlora.quantize import QuantConfig
from qlora.trained import add_tokens

WIDTH = 115
SMALLEST_RANK, SHORTEST_LENGTH = 8, 128  # that are proposed
NOT_COUNTED = {
    "cpu": "Not counted: what the C library keeps of freed memory.",
    "cuda": "Not counted: the CUDA context and the allocator's rounding. Paged moments may move to main memory.",
}


@dataclass(frozen=True)
class RunPlan:
    """What a run would take.

    Attributes:
        num_tokens: the most that a micro-batch holds.
        recomputed, num_layers: decoder layers whose activations are computed again, of all.
        process: bytes of Python and the libraries, which share a CPU's memory with the run; 0 on a GPU.
        all_recomputed: bytes in all with every layer recomputed.
        optim: kind of optimizer.
    """

    memory: MemoryPlan
    summary: ParameterSummary
    num_tokens: int
    recomputed: int
    num_layers: int
    dtype: torch.dtype
    process: int
    all_recomputed: int
    optim: str

    @property
    def total(self) -> int:
        return self.memory.total + self.process


@dataclass(frozen=True)
class Remedy:
    """A change to a run: its flags, the settings with it, what the run would then take."""

    flags: str
    config: RunConfig
    plan: RunPlan


Changed: TypeAlias = Iterator[tuple[str, RunConfig]]
Change: TypeAlias = Callable[[RunConfig], Changed]


class Planner:
    """Plans of one model under different settings; its modules are made once.

    Args:
        name: directory, hub id or .gguf file.
        device: "cuda" or "cpu", whether or not it is there.
        device_memory: bytes of the device; None = what is free on this machine's, where it has one.
    """

    def __init__(self, name: str, device: str, device_memory: int | None = None) -> None:
        self.name, self.device = name, torch.device(device)
        self.device_memory, self.process = device_memory, 0
        self._bases: dict[tuple[bool, QuantConfig, str], Any] = {}

    def plan(self, config: RunConfig) -> RunPlan:
        """The plan of a run with these settings."""
        t, d = config.train, config.data
        model, tokenizer = self._base(config.model), None
        if config.lora.added_tokens:
            tokenizer = load_tokenizer(self.name)
            add_tokens(tokenizer, config.lora.added_tokens)
        activate(model, None)
        adapter = create_adapter(model, config.lora, t.seed, tokenizer)
        wrap_layers(model, adapter.layers)
        activate(model, adapter)
        freeze_base(model)

        optim = choose_optimizer(t.optim, self.device)
        num_tokens = most_tokens(t.batch_size, d.max_length, d.max_length, d.packing, self.device.type)
        plans = plan_recomputing(model, num_tokens, model.compute_dtype, CHUNK_SIZE, optim)
        limit = t.memory_budget_bytes
        if limit is None and self.device_memory is not None:
            free = max(0, self.device_memory - self.process - plans[0].base - plans[0].adapters)
            limit = default_limit(plans[0], free)
        # Of a device that is not known, nothing is recomputed.
        number = choose_recomputed(t.gradient_checkpointing, [p.total for p in plans], limit or plans[0].total)
        return RunPlan(
            plans[number], parameter_summary(model), num_tokens, number, len(decoder_layers(model)),
            model.compute_dtype, self.process, plans[-1].total + self.process, optim,
        )  # fmt: skip

    def _base(self, m: ModelConfig) -> Any:
        """The model on the meta device; with the first, what this process takes, now that all is imported."""
        settings = (m.use_4bit, QuantConfig(m.quant_type, m.double_quant), m.compute_dtype)
        if settings not in self._bases:
            self._bases[settings] = plan_base_model(self.name, *settings, self.device)
        if self.device.type == "cpu" and not self.process:
            self.process = resident_memory()
        if self.device_memory is None and (self.device.type == "cpu" or torch.cuda.is_available()):
            self.device_memory = available_memory(self.device) + self.process
        return self._bases[settings]

    def fits(self, plan: RunPlan) -> bool:
        """Whether the plan is within the device's memory; True where that is not known."""
        return self.device_memory is None or plan.total <= self.device_memory

    def remedies(self, config: RunConfig) -> tuple[list[Remedy], Remedy | None]:
        """What would make a run fit that does not.

        Returns:
            each change alone, as far as it saves anything; and as many of them together, the mildest first, as
            make it fit, None where all do not.
        """
        before = self.plan(config).total
        each = (self._try(config, change) for change in CHANGES)
        alone = [remedy for remedy in each if remedy is not None and remedy.plan.total < before]
        flags: list[str] = []
        for change in CHANGES:
            remedy = self._try(config, change)
            if remedy is not None and remedy.plan.total < self.plan(config).total:
                flags, config = [*flags, remedy.flags], remedy.config
                if self.fits(remedy.plan):
                    return alone, replace(remedy, flags=" ".join(flags))
        return alone, None

    def _try(self, config: RunConfig, change: Change) -> Remedy | None:
        """The mildest form of a change that makes the run fit, else the strongest; None where there is none."""
        remedy = None
        for flags, changed in change(config):
            remedy = Remedy(flags, changed, self.plan(changed))
            if self.fits(remedy.plan):
                break
        return remedy


# ---- changes to a run, each from its mildest form to its strongest -----------------------------------------


def _recompute(config: RunConfig) -> Changed:
    yield "--gradient-checkpointing on", _changed(config, "train", gradient_checkpointing="on")


def _smaller_batches(config: RunConfig) -> Changed:
    """With the same examples in a step, and so the same losses."""
    size, accumulated = config.train.batch_size, config.train.grad_accum
    for part in range(size - 1, 0, -1):
        if size % part == 0:
            steps = accumulated * (size // part)
            changed = _changed(config, "train", batch_size=part, grad_accum=steps)
            yield f"--batch-size {part} --grad-accum {steps}", changed


def _small_moments(config: RunConfig) -> Changed:
    yield "--optim paged_adamw_8bit", _changed(config, "train", optim="paged_adamw_8bit")


def _four_bits(config: RunConfig) -> Changed:
    if not config.model.use_4bit:
        yield "--use-4bit", _changed(config, "model", use_4bit=True)


def _lower_rank(config: RunConfig) -> Changed:
    rank = config.lora.rank // 2
    while rank >= SMALLEST_RANK and not config.lora.use_adalora:
        yield f"--rank {rank}", _changed(config, "lora", rank=rank)
        rank //= 2


def _shorter_examples(config: RunConfig) -> Changed:
    length = config.data.max_length // 2
    while length >= SHORTEST_LENGTH:
        yield f"--max-length {length}", _changed(config, "data", max_length=length)
        length //= 2


def _changed(config: RunConfig, part: str, **settings: Any) -> RunConfig:
    return replace(config, **{part: replace(getattr(config, part), **settings)})


CHANGES = (_recompute, _smaller_batches, _small_moments, _four_bits, _lower_rank, _shorter_examples)


# ---- printing ---------------------------------------------------------------------------------------------


def print_plan(planner: Planner, config: RunConfig, console: Console | None = None) -> None:
    """The plan by component, whether it fits, and if not what would make it."""
    if console is None:
        console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=WIDTH)
    plan = planner.plan(config)
    dtype = str(plan.dtype).removeprefix("torch.")
    console.print(f"{plan.summary}")
    console.print(
        f"on {planner.device.type}, computing in {dtype}, {plan.num_tokens:,} tokens a micro-batch at most\n"
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    meanings = {
        "base": "weights of the frozen model with their scales",
        "adapters": "A and B, and what trains beside them",
        "gradients": "of these, in fp32",
        "optimizer": f"{plan.optim}: fp32 copies of bf16 adapters, and two moments",
        "activations": f"kept for the backward pass; {plan.recomputed} of {plan.num_layers} layers are recomputed",
        "logits": f"of {min(CHUNK_SIZE, plan.num_tokens)} positions at a time",
        "workspace": "of the layer that is differentiated: gradients, one weight dequantized",
        "process": "Python and the libraries, as measured in this process",
    }
    sizes = vars(plan.memory) | ({"process": plan.process} if plan.process else {})
    for name, size in sizes.items():
        table.add_row(name, f"{size / GIB:.2f} GiB", meanings[name])
    table.add_row("total", f"{plan.total / GIB:.2f} GiB", f"{plan.total / 1e9:.2f} GB", style="bold")
    console.print(table)
    console.print(f"\n{NOT_COUNTED[planner.device.type]}")
    memory = planner.device_memory
    if memory is None:
        if config.train.gradient_checkpointing == "auto":
            least = f"{plan.all_recomputed / GIB:.2f} GiB with all layers recomputed"
            console.print(f"auto recomputes as many layers as the device asks for: {least}. Give --device-memory.")
    elif planner.fits(plan):
        console.print(f"fits {memory / GIB:.2f} GiB, {(memory - plan.total) / GIB:.2f} to spare")
    else:
        console.print(f"does not fit {memory / GIB:.2f} GiB, {(plan.total - memory) / GIB:.2f} too much")
        _print_remedies(*planner.remedies(config), memory, console)


def _print_remedies(alone: list[Remedy], together: Remedy | None, memory: int, console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for remedy in alone:
        verdict = "fits" if remedy.plan.total <= memory else "too much still"
        table.add_row(f"  {remedy.flags}", f"{remedy.plan.total / GIB:.2f} GiB", verdict)
    if alone:
        console.print("each change alone:")
        console.print(table)
    if together is not None:
        console.print(f"fits with {together.flags}: {together.plan.total / GIB:.2f} GiB")
    else:
        console.print("nothing here makes it fit; take a smaller model or a larger device")
