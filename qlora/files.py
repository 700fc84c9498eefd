"""Files and directories that appear whole or not at all: written aside, synced to disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it takes the place of `target`, on an error nothing changes."""
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield staging
        _settle(staging)
        os.replace(staging, target)
        _sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `target`.

    Where `target` exists already (another process was first), that one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for file in staging.rglob("*"):
            _settle(file)
        try:
            os.rename(staging, target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settle(path: Path) -> None:
    """Sync a file to disk and give it ordinary permissions (safetensors creates its files private)."""
    if path.is_file():
        umask = os.umask(0)
        os.umask(umask)
        path.chmod(0o666 & ~umask)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
