"""Settings of `plan`: a run's, and those of the planned devices."""

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
    """Estimate a training run with the same flags from the model's config alone: memory and, on several devices,
    communication and step time."""

    devices: DevicesConfig = field(default_factory=DevicesConfig)
    device: Literal["cuda", "cpu"] | None = None
    """Device to plan for; default: this machine's."""
    device_memory: Annotated[str | None, tyro.conf.arg(aliases=["--gpu-memory"])] = None
    """Memory per device, as 24GiB or 24GB: checks whether the run fits, and what would make it fit."""

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
