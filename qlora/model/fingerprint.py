"""Identity of weights: files by their content; tensors by a sample of their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlora.system.digests import digest_of


def sample_weight(name: str, weight: Tensor) -> bytes:
    """A weight's part of the base's fingerprint: its description and 64 of its values."""
    flat = weight.detach().reshape(-1)
    return describe_weight(name, weight.shape, weight.dtype) + as_bytes(flat[sampled(flat.numel())])


def describe_weight(name: str, shape: Sequence[int], dtype: torch.dtype) -> bytes:
    return f"{name} {tuple(shape)} {dtype}".encode()


def sampled(size: int) -> slice:
    """Which of a weight's flat values are sampled."""
    return slice(0, size, max(1, size // 64))


def as_bytes(values: Tensor) -> bytes:
    return bytes(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())


CACHE_FORMAT = 2  # part of the cache key: raise it when the stored layout changes


def fingerprint_files(files: Iterable[Path], *parts: object) -> str:
    """Identity of source files (name and content, wherever they are) and of what is done with them."""
    digest = hashlib.sha256(repr((CACHE_FORMAT, *parts)).encode())
    for file in files:
        digest.update(f"{file.name}|{digest_of(file)}".encode())
    return digest.hexdigest()[:24]
