"""The device of a run: its choice, name, fastest dtype and default optimizer."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qlora.system.errors import InputError
from qlora.system.memory import GIB


def best_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """Describe a device: name, and memory of a GPU or threads on a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def choose_compute_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype to compute activations in.

    "auto" measures: bf16 halves activation memory everywhere, but its matrix multiply is faster than fp32 on
    some CPUs and two to five times slower on others. fp16 is not offered: its range makes training unstable.

    Args:
        name: "auto", "float32" or "bfloat16".
        width: size of the measured product, (512, width) x (width, 4 width).
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in named:
        return named[name]
    if name != "auto":
        raise InputError(f"compute_dtype is {name!r}; choose auto, float32 or bfloat16.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {
        dtype: (
            torch.ones(512, width, dtype=dtype, device=device),
            torch.ones(4 * width, width, dtype=dtype, device=device),
        )
        for dtype in seconds
    }
    for _ in range(7):  # alternate, so that other load slows both
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            x @ weight.T
            seconds[dtype].append(time.perf_counter() - start)
        wide, narrow = (seconds[dtype][1:] for dtype in (torch.float32, torch.bfloat16))
        if len(wide) == 2 and min(narrow) > 2 * max(
            wide
        ):  # without bf16 instructions a product takes half a second
            return torch.float32
    return torch.bfloat16 if statistics.median(narrow) < 0.8 * statistics.median(wide) else torch.float32


def choose_optimizer(name: str, device: torch.device, say: Callable[[str], object] = lambda line: None) -> str:
    """Resolve "auto": paged AdamW if the driver can move optimizer pages to main memory, else fused AdamW."""
    pages = device.type == "cuda"
    if name == "auto" and not pages:
        say("optimizer: fused AdamW (paged AdamW needs CUDA)")
    if name != "auto":
        return name
    return "paged_adamw_32bit" if pages else "adamw"
