"""Memory of devices and of the process: available, resident, peak, returned to the system."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # errors of commands that compute nothing are told without it
    import torch

GIB = 2**30


def trim_heap() -> None:
    """Return freed memory to the system; glibc otherwise keeps free pieces between those in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def return_large_frees() -> None:
    """From now on, make glibc return freed tensors of a megabyte or more to the system.

    By default it keeps freed pieces of up to 32 MB, with the few surviving tensors of a recomputed layer in
    between. Fresh pages cost nothing next to a large model's products, and a tenth of a small model's step.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if option is not None:
        option(-3, 2**20)  # M_MMAP_THRESHOLD


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device (of main memory for a CPU)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def resident_memory() -> int:
    """Bytes of main memory that this process uses."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory use so far: the CUDA allocator's, or the process's peak resident set on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    # The kernel's value for this process; ru_maxrss starts at the peak of the parent process.
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the host.

    Recognized by torch's own error, by accelerate's list of messages, and by messages missing there: from C++,
    cuBLAS, and CUDA and CPU outside torch's allocators.
    """
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(RuntimeError(text)):
        return True
    others = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "ALLOC_FAILED")
    return any(words in text for words in others)
