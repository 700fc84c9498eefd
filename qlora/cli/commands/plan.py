"""Say what memory and time a run would take, before it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from qlora.cli.program import program
from qlora.config.devices import DevicesConfig
from qlora.config.fields import size_in_bytes
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.system.errors import InputError


@dataclass
class PlanConfig(RunConfig):
    """Say what a run of train.py with the same flags would take, from the model's config alone: memory, and of
    many devices also what they send each other, and the time of a step."""

    devices: DevicesConfig = field(default_factory=DevicesConfig)
    device: Literal["cuda", "cpu"] | None = None
    """What it would run on; by default what is here."""
    device_memory: Annotated[str | None, tyro.conf.arg(aliases=["--gpu-memory"])] = None
    """Memory of each device, as 24GiB or 24GB: whether the run fits, and if not what would make it."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(PlanConfig, program("plan"), argv)
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
