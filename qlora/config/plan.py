"""Settings of `plan`: those of a run, and of the devices it would have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from qlora.config.devices import DevicesConfig
from qlora.config.fields import size_in_bytes
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

    @property
    def device_memory_bytes(self) -> int | None:
        """--device-memory in bytes; None where it is not given.

        Raises:
            InputError: it says no size.
        """
        size = size_in_bytes(self.device_memory or "")
        if self.device_memory is not None and size is None:
            raise InputError(
                f"device_memory is {self.device_memory!r}; give --device-memory a size such as 24GiB or 24GB."
            )
        return size
