"""The flags of `plan` about many devices. (Without torch: `--help` is instant.)"""

from __future__ import annotations

from dataclasses import dataclass

from qlora.config.fields import size_in_bytes
from qlora.system.errors import InputError

MAX_RANKS = 16384


@dataclass
class DevicesConfig:
    """The devices of a planned run, and how fast they are."""

    gpus: int | None = None
    """Devices in all, one process each (processes on CPUs, with --device cpu); by default one."""
    nodes: int = 1
    """Machines that they are spread over, the same number on each."""
    flops: float | None = None
    """Floating-point operations that a device achieves in a second, as 150e12; on a CPU measured by default."""
    link_rate: str | None = None
    """Bytes that a device sends in a second, and receives at the same time: 25GB, 900MB."""
    node_link_rate: str | None = None
    """Bytes that each node sends to the others in a second, over all its links; by default --link-rate."""

    def __post_init__(self) -> None:
        if self.gpus is not None and not 1 <= self.gpus <= MAX_RANKS:
            raise InputError(f"gpus is {self.gpus}; give --gpus a number from 1 to {MAX_RANKS:,}.")
        if self.nodes < 1:
            raise InputError(f"nodes is {self.nodes}; give --nodes 1 or more.")
        if self.flops is not None and not 0 < self.flops < float("inf"):
            raise InputError(f"flops is {self.flops}; give --flops operations a second, as 150e12.")
        for name in ("link_rate", "node_link_rate"):
            text = getattr(self, name)
            if text is not None and size_in_bytes(text) is None:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{name} is {text!r}; give {flag} bytes a second, as 25GB or 900MB.")
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
