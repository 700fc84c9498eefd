"""Plan the memory of a run from the model's config alone, on one or many devices, without reading any weights.

The modules are created on the meta device, with the base as it would be loaded and the adapter, and measured by
`plan_recomputing`, as every run measures its own model before the first step. The number of recomputed layers
follows from the given memory by the same rule as in a run. planning/devices.py divides a run over devices;
planning/step.py estimates communication and step time.

If a run does not fit, changes to its settings are tried one by one, those that do not affect results first, and
then combined until it fits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qlora.config.devices import DevicesConfig
from qlora.config.model import ModelConfig
from qlora.config.run import RunConfig
from qlora.data.batches import CPU_TOKENS, largest_micro_batch
from qlora.data.tokenizer_files import add_tokens
from qlora.lora.adapter import activate, create_adapter, wrap_layers
from qlora.lora.trainable import ParameterSummary, freeze_base, parameter_summary
from qlora.model.base import base_info
from qlora.model.block import decoder_layers
from qlora.model.load import plan_base_model
from qlora.model.loss import CHUNK_SIZE
from qlora.model.tokenizer import load_tokenizer
from qlora.parallel.divisibility import check_widths, possible_counts
from qlora.planning.devices import Census, DeviceLayout, arrange, divide_plans, measure_layout
from qlora.planning.memory import MemoryPlan, choose_recomputed, default_limit, plan_recomputing
from qlora.planning.remedies import CHANGES, Change, Job
from qlora.planning.step import Traffic, Work, step_flops, step_traffic
from qlora.quant.weight import QuantConfig
from qlora.system.device import choose_optimizer
from qlora.system.errors import InputError
from qlora.system.memory import available_memory, resident_memory


@dataclass(frozen=True)
class RunPlan:
    """What a run needs on each device.

    Attributes:
        num_tokens: the maximum per micro-batch.
        recomputed, num_layers: recomputed decoder layers, and all of them.
        process: bytes of Python and libraries, which share a CPU's memory with the run; 0 on a GPU.
        all_recomputed: total bytes with every layer recomputed.
        optim: kind of optimizer.
        main_memory: bytes of main memory per node that hold shares of the base.
        offloaded: bytes per device that recomputed layers keep elsewhere, written and read once a micro-batch.
        traffic, flops: communication per step by kind; operations per device and step.
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
    layout: DeviceLayout = field(default_factory=DeviceLayout)
    main_memory: int = 0
    offloaded: int = 0
    traffic: tuple[Traffic, ...] = ()
    flops: int = 0

    @property
    def total(self) -> int:
        return self.memory.total + self.process


@dataclass(frozen=True)
class Remedy:
    """A change to a run: its flags, the changed job and its plan."""

    flags: str
    job: Job
    plan: RunPlan

    @property
    def config(self) -> RunConfig:
        return self.job.config


class Planner:
    """Plans one model under different settings; its modules are created once.

    Args:
        name: directory, hub id or .gguf file.
        device: "cuda" or "cpu"; this machine need not have it.
        device_memory: bytes per device; None = the free memory of this machine's device, if any. Processes on this
            CPU share it.
    """

    def __init__(self, name: str, device: str, device_memory: int | None = None) -> None:
        self.name, self.device = name, torch.device(device)
        self.device_memory, self.process, self.is_shared = device_memory, 0, False
        self._bases: dict[tuple[bool, QuantConfig, str], Any] = {}
        self._adapted, self._model = "", None
        self._counted: dict[str, tuple[list[MemoryPlan], ParameterSummary, int]] = {}
        self._censuses: dict[str, Census] = {}

    def plan(self, config: RunConfig, devices: DevicesConfig | None = None) -> RunPlan:
        """The plan of a run with these settings; with `devices` also computation and communication of a step.

        Raises:
            InputError: devices, flags and model do not fit together.
        """
        plan = self._memory_plan(config, devices)
        if devices is None:
            return plan
        t, length, layout = config.loop, config.data.max_length, plan.layout
        model, census = self._adapted_model(config), self._census(layout.tensor_parallel)
        rows, batches = t.batch_size * t.grad_accum, t.grad_accum
        tokens, scored = rows * config.trained_tokens, rows * config.scored_tokens
        if config.data.packing and self.device.type == "cpu":
            batches = min(max(batches, -(-rows * config.row_tokens // CPU_TOKENS)), rows)
        work = Work(tokens, batches, length, plan.recomputed, census.first_trained, scored)
        shares = sum(unit.share(layout.base_ranks) for unit in census.units) if layout.cpu_offload else 0
        return replace(
            plan,
            traffic=tuple(step_traffic(layout, census, work, config.loop.offload_activations)),
            flops=step_flops(model, work, layout),
            main_memory=shares * layout.node_ranks,
        )

    def _memory_plan(self, config: RunConfig, devices: DevicesConfig | None) -> RunPlan:
        config.check_split()
        layout = arrange(devices or DevicesConfig(), config.parallel, self.device.type)
        t, d = config.loop, config.data
        model = self._adapted_model(config)
        check_widths(model.config, layout.tensor_parallel, self.name)
        optim = choose_optimizer(config.optimizer.optim, self.device)
        size = config.row_tokens
        num_tokens = largest_micro_batch(t.batch_size, size, size, d.packing, self.device.type)
        num_tokens = min(num_tokens, t.batch_size * config.trained_tokens)
        together = layout.tensor_parallel, layout.sequence_parallel
        settings = (
            num_tokens,
            base_info(model).compute_dtype,
            CHUNK_SIZE,
            optim,
            *together,
            t.offload_activations,
        )
        key = f"{self._adapted} {settings}"
        if key not in self._counted:
            counted = plan_recomputing(model, *settings), parameter_summary(model), len(decoder_layers(model))
            self._counted[key] = counted
        plans, summary, num_layers = self._counted[key]
        if layout.ranks > 1:
            plans = divide_plans(plans, self._census(layout.tensor_parallel), layout, num_tokens)
        limit, memory = t.memory_budget_bytes, self.memory_of(layout)
        if limit is None and memory is not None:
            free = max(0, memory - self.process - plans[0].base - plans[0].adapters)
            limit = default_limit(plans[0], free)
        # Without a known memory size nothing is recomputed.
        number = choose_recomputed(t.gradient_checkpointing, [p.total for p in plans], limit or plans[0].total)
        found = RunPlan(
            plans[number], summary, num_tokens, number, num_layers,
            base_info(model).compute_dtype, self.process, plans[-1].total + self.process, optim, layout,
        )  # fmt: skip
        if not t.offload_activations:
            return found
        width = model.config.hidden_size // (layout.tensor_parallel if layout.sequence_parallel else 1)
        return replace(found, offloaded=num_tokens * number * width * found.dtype.itemsize)

    def _census(self, tensor_parallel: int) -> Census:
        """Measure the model with its current adapter."""
        key = f"{self._adapted} {tensor_parallel}"
        if key not in self._censuses:
            self._censuses[key] = measure_layout(self._model, tensor_parallel)
        return self._censuses[key]

    def _adapted_model(self, config: RunConfig) -> Any:
        """The model on the meta device with the adapter of these settings."""
        model = self._base(config.model)
        key = repr((config.model, config.lora, config.loop.seed))
        if self._adapted == key:
            return model
        tokenizer = None
        if config.lora.new_tokens:
            tokenizer = load_tokenizer(self.name)
            add_tokens(tokenizer, config.lora.new_tokens)
        activate(model, None)
        adapter = create_adapter(model, config.lora, config.loop.seed, tokenizer)
        wrap_layers(model, adapter.layers)
        activate(model, adapter)
        freeze_base(model)
        self._adapted, self._model = key, model
        return model

    def _base(self, m: ModelConfig) -> Any:
        """The model on the meta device; the first call also measures this process, now that all is imported."""
        settings = (m.use_4bit, QuantConfig(m.quant_type, m.double_quant), m.compute_dtype)
        if settings not in self._bases:
            self._bases[settings] = plan_base_model(self.name, *settings, self.device)
        if self.device.type == "cpu" and not self.process:
            self.process = resident_memory()
        if self.device_memory is None and (self.device.type == "cpu" or torch.cuda.is_available()):
            self.device_memory = available_memory(self.device) + self.process
            self.is_shared = self.device.type == "cpu"
        return self._bases[settings]

    def memory_of(self, layout: DeviceLayout) -> int | None:
        """Bytes per device; None: unknown."""
        if self.device_memory is None or not self.is_shared:
            return self.device_memory
        return self.device_memory // layout.node_ranks

    def fits(self, plan: RunPlan) -> bool:
        """Whether the plan fits in the device's memory; True if that is unknown."""
        memory = self.memory_of(plan.layout)
        return memory is None or plan.total <= memory

    def remedies(
        self, config: RunConfig, devices: DevicesConfig | None = None
    ) -> tuple[list[Remedy], Remedy | None]:
        """Changes that would make a run fit.

        Returns:
            (each change alone, if it saves memory; the first combination that fits, mildest changes first, or
            None).
        """
        before = self._memory_plan(config, devices).total
        choices = tuple(possible_counts(self._adapted_model(config).config)) if devices else ()
        job = Job(config, devices, self.device.type, choices)
        each = (self._try(job, change) for change in CHANGES)
        alone = [remedy for remedy in each if remedy is not None and remedy.plan.total < before]
        flags: list[str] = []
        for change in CHANGES:
            remedy = self._try(job, change)
            if remedy is not None and remedy.plan.total < before:
                flags, job, before = [*flags, remedy.flags], remedy.job, remedy.plan.total
                if self.fits(remedy.plan):
                    return alone, replace(remedy, flags=" ".join(flags))
        return alone, None

    def _try(self, job: Job, change: Change) -> Remedy | None:
        """The mildest form of a change that makes the run fit, else the strongest; None if it does not apply."""
        remedy = None
        for flags, changed in change(job):
            try:
                changed.config.check_split()
            except InputError:  # not a valid run
                continue
            remedy = Remedy(flags, changed, self._memory_plan(changed.config, changed.devices))
            if self.fits(remedy.plan):
                break
        return remedy
