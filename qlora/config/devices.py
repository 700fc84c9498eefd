"""Flags of `plan` for many devices. Does not import torch, so that `--help` is fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from qlora.config.fields import size_in_bytes
from qlora.config.settings import Check, Positive, Settings
from qlora.system.errors import InputError

MAX_RANKS = 16384
Gpus = Annotated[int | None, Check(f"a number from 1 to {MAX_RANKS:,}", lambda n: 1 <= n <= MAX_RANKS)]
Flops = Annotated[float | None, Check("operations a second, as 150e12", lambda x: 0 < x < math.inf)]
Rate = Annotated[
    str | None, Check("bytes a second, as 25GB or 900MB", lambda text: size_in_bytes(text) is not None)
]


@dataclass
class DevicesConfig(Settings):
    """The devices of a planned run, and how fast they are."""

    gpus: Gpus = None
    """Devices in all, one process each (processes on CPUs, with --device cpu); by default one."""
    nodes: Positive = 1
    """Machines that they are spread over, the same number on each."""
    flops: Flops = None
    """Floating-point operations that a device achieves in a second, as 150e12; on a CPU measured by default."""
    link_rate: Rate = None
    """Bytes that a device sends in a second, and receives at the same time: 25GB, 900MB."""
    node_link_rate: Rate = None
    """Bytes that each node sends to the others in a second, over all its links; by default --link-rate."""

    def check(self) -> None:
        if self.node_link_rate is not None and self.link_rate is None:
            raise InputError("--node-link-rate is given without the rate inside a node; pass --link-rate with it.")

    @property
    def is_given(self) -> bool:
        """Whether anything is asked about more than the memory of one device."""
        return self != DevicesConfig()

    @property
    def rates(self) -> tuple[int | None, int | None]:
        """Bytes a second of a device's link, and of a node's to the others; None: not known."""
        inside = size_in_bytes(self.link_rate or "")
        return inside, size_in_bytes(self.node_link_rate or "") or inside
