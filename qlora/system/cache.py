"""The project's cache directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from qlora.system.errors import InputError


def cache_directory() -> Path:
    """$QLORA_CACHE, or ~/.cache/qlora."""
    return Path(os.environ.get("QLORA_CACHE") or "~/.cache/qlora").expanduser()


def is_in_cache(path: Path) -> bool:
    """Whether a file or directory is the cache or in it: those are private, whatever the umask."""
    return path.is_relative_to(cache_directory())


def make_cache() -> None:
    """Create `cache_directory`.

    Raises:
        InputError: it cannot be created or written to.
    """
    path = cache_directory()
    try:
        if not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(
            f"The cache {path} cannot be written ({error.strerror}); set QLORA_CACHE to a writable directory."
        ) from error
