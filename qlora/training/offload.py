"""Keep what recomputed layers need outside the device's memory: --offload-activations.

A recomputed layer keeps its input, (N, D), until its backward pass. A store takes it in between: on CUDA pinned
main memory, copied beside the computation; on a CPU a file without a name in the output directory, which ends with
the process, and whose pages the system keeps in memory as long as there is room. The bytes come back as they were,
so losses and gradients are the same to the last digit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora.system.errors import InputError

SMALLEST = 2**20  # bytes; a smaller tensor stays where it is


class PinnedStore:
    """Main memory for tensors of a CUDA device, copied on a stream of its own."""

    place = "main memory"

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def put(self, x: Tensor) -> Any:
        """Begin to copy `x`; what `get` takes."""
        stream = self._stream = self._stream or torch.cuda.Stream(x.device)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            host.copy_(x.detach(), non_blocking=True)
        x.record_stream(stream)  # its memory is not used again before the copy is made
        return host, stream.record_event(), x.device

    def get(self, kept: Any) -> Tensor:
        """The tensor, on its device."""
        host, copied, device = kept
        torch.cuda.current_stream(device).wait_event(copied)
        x: Tensor = host.to(device, non_blocking=True)
        return x


class _Extent:
    """A part of a `FileStore`, free again when nothing refers to it."""

    def __init__(self, store: FileStore, offset: int, x: Tensor) -> None:
        self.store, self.offset, self.shape, self.dtype, self.size = store, offset, x.shape, x.dtype, x.nbytes

    def __del__(self) -> None:
        self.store.free.setdefault(self.size, []).append(self.offset)


class FileStore:
    """A file without a name for tensors of a CPU.

    Args:
        directory: where there is room.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.place = directory, f"a file in {directory}"
        self.free: dict[int, list[int]] = {}
        self._end = 0
        self._file: Any = None

    def put(self, x: Tensor) -> _Extent:
        """Write `x`; what `get` takes.

        Raises:
            InputError: no room.
        """
        x = x.detach().contiguous()
        known = self.free.get(x.nbytes)
        offset = known.pop() if known else self._end
        extent = _Extent(self, offset, x)
        self._end = max(self._end, offset + x.nbytes)
        try:
            self._file = self._file or tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115
            _whole(os.pwritev, self._file.fileno(), x, offset)
        except OSError as error:
            raise InputError(
                f"--offload-activations cannot write {x.nbytes:,} bytes to {self.directory}: {error.strerror}. "
                "Free some space, or train without it."
            ) from error
        return extent

    def get(self, kept: _Extent) -> Tensor:
        """The tensor.

        Raises:
            InputError: the file cannot be read.
        """
        x = torch.empty(kept.shape, dtype=kept.dtype)
        try:
            _whole(os.preadv, self._file.fileno(), x, kept.offset)
        except OSError as error:
            raise InputError(
                f"--offload-activations cannot read its file in {self.directory}: {error.strerror}."
            ) from error
        return x


def _whole(call: Callable[[int, list[Any], int], int], file: int, x: Tensor, offset: int) -> None:
    """Read or write all bytes of `x`: a call of the system moves at most 2 GiB."""
    view: Any = memoryview(x.view(torch.uint8).numpy().reshape(-1))  # type: ignore[arg-type]
    while len(view):
        moved = call(file, [view], offset)
        if moved == 0:
            raise OSError(5, "the file ended early")
        view, offset = view[moved:], offset + moved


Store = PinnedStore | FileStore


def activation_store(device: torch.device, directory: Path) -> Store:
    """The store of a device."""
    return PinnedStore() if device.type == "cuda" else FileStore(directory)


def recompute_from(store: Store, function: Callable[..., Any], *inputs: Any) -> Any:
    """torch's non-reentrant checkpoint of `function`, with its inputs in `store` until the backward pass."""

    def put(x: Tensor) -> Any:
        return store.put(x) if x.nbytes >= SMALLEST else x

    def get(kept: Any) -> Tensor:
        return kept if isinstance(kept, Tensor) else store.get(kept)

    with saved_tensors_hooks(put, get):
        return checkpoint(function, *inputs, use_reentrant=False)
