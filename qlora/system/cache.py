"""The project's cache directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qlora.system.errors import InputError


def cache_directory() -> Path:
    """$QLORA_CACHE, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def make_cache() -> None:
    """Create `cache_directory`.

    Raises:
        InputError: it cannot be created or written to.
    """
    path = cache_directory()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"The cache {path} cannot be written ({error.strerror}); set QLORA_CACHE to a writable directory."
        ) from error
