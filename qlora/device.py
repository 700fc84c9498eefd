"""What this device can do: its faster compute dtype, its free and its peak memory, its name."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from qlora.errors import InputError

GIB = 2**30


def cache_directory() -> Path:
    """$QLORA_CACHE, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def make_cache() -> None:
    """Make `cache_directory`.

    Raises:
        InputError: it cannot be made or written to.
    """
    path = cache_directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"The cache {path} cannot be written ({error.strerror}); set QLORA_CACHE to a directory that can."
        ) from error


def give_back_memory() -> None:
    """Have the C library return what was freed to the system; glibc keeps the pieces between what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def give_back_at_once() -> None:
    """From now on, have glibc return tensors of a megabyte and more to the system when they are freed.

    It else keeps what is freed, up to 32 MB a piece, and the few tensors of a recomputed layer that live on lie in
    between. Their fresh pages cost nothing beside a large model's products, and a tenth of a small one's step.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if option is not None:
        option(-3, 2**20)  # M_MMAP_THRESHOLD


def best_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """A device in words: name, memory of a GPU, threads on a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.get_num_threads()} threads"


def choose_compute_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """The dtype activations are computed in.

    "auto" measures: bf16 halves activation memory everywhere, but its matrix multiply is faster than fp32
    on some CPUs and two to five times slower on others. fp16 is no choice: its range makes training unstable.

    Args:
        name: "auto", "float32" or "bfloat16".
        width: of the measured product, (512, width) x (width, 4 width).
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
    for _ in range(7):  # in turns, so that a busy neighbour slows both
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


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (of main memory for a CPU)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def resident_memory() -> int:
    """Bytes of main memory that this process takes."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far: the CUDA allocator's, or the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    # The kernel's figure for this process; ru_maxrss would begin at the peak of the process that started it.
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
