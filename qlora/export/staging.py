"""The directory that holds an unfinished merge."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from qlora.export.merged_weights import SHARDS
from qlora.export.mixture import Mixture
from qlora.model.resolve import resolve_model
from qlora.model.safetensors_source import weight_files
from qlora.system.digests import digest_of
from qlora.system.errors import CheckFailed, InputError
from qlora.system.file_names import BASE_SHIFT, CONFIG, WEIGHTS
from qlora.system.files import new_directory, remove_leftovers, sha256_of
from qlora.system.versions import versions


@contextmanager
def staging_directory(target: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a directory next to `target` to fill; it keeps files that an earlier try of the same merge finished.

    On success it becomes `target`. A merge that is refused or ends before its first complete file leaves nothing;
    any other end (a signal, a full disk) keeps the directory for the next try.
    """
    staging = target.with_name(f".{target.name}.{fingerprint}.partial")
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"Another merge is writing {target}; wait for it to finish or choose another.") from error
    remove_leftovers(staging)
    keep = False
    try:
        yield staging
        with new_directory(target) as final:
            for file in staging.iterdir():
                if file.name not in (SHARDS, ".lock"):
                    os.replace(file, final / file.name)
        remove_leftovers(target.parent, target.name)  # of merges killed right before this point
    except BaseException as error:
        keep = (staging / SHARDS).is_file() and not isinstance(error, (InputError, CheckFailed))
        raise
    finally:
        lock.release()
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)


def merge_fingerprint(model: str, mixture: Mixture, *settings: object) -> str:
    """Fingerprint of everything the weights files depend on."""
    parts: list[object] = [*versions("torch", "transformers", "bitsandbytes").values()]
    parts += [
        digest_of(file) for file in weight_files(resolve_model(model))
    ]  # other weights may have size and time
    for saved in mixture.adapters:
        names = (CONFIG, WEIGHTS, BASE_SHIFT)
        parts += [sha256_of(saved.directory / name) for name in names if (saved.directory / name).is_file()]
    return hashlib.sha256(repr((parts, mixture.weights, mixture.quantization, settings)).encode()).hexdigest()[:16]
