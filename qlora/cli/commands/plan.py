"""Estimate the memory and time of a run before starting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from qlora.config.devices import DevicesConfig
from qlora.config.fields import size_in_bytes
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.system.errors import InputError


@dataclass
class PlanConfig(RunConfig):
    """Estimate a training run with the same flags from the model's config alone: memory and, on several devices,
    communication and step time."""

    devices: DevicesConfig = field(default_factory=DevicesConfig)
    device: Literal["cuda", "cpu"] | None = None
    """Device to plan for; default: this machine's."""
    device_memory: Annotated[str | None, tyro.conf.arg(aliases=["--gpu-memory"])] = None
    """Memory per device, as 24GiB or 24GB: checks whether the run fits, and what would make it fit."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(PlanConfig, "python -m qlora plan", argv)
    if config.model.model is None:
        raise InputError("No model given; pass --model with a Hugging Face directory, a hub id or a .gguf file.")
    size = size_in_bytes(config.device_memory or "")
    if config.device_memory is not None and size is None:
        raise InputError(
            f"device_memory is {config.device_memory!r}; give --device-memory a size such as 24GiB or 24GB."
        )
    if config.generate.adapter is not None:
        from qlora.adapters.peft_files import read_adapter

        config.lora = read_adapter(config.generate.adapter).config
    from qlora.cli.show_plan import print_plan
    from qlora.planning.planner import Planner
    from qlora.system.device import best_device

    asked = config.devices.is_given or config.parallel.is_split
    planner = Planner(config.model.model, config.device or best_device().type, size)
    print_plan(planner, config, config.devices if asked else None)
