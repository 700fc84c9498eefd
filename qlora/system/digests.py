"""Identity of files by their content, and directories whose files are verified when they are read again.

A digest is XXH3's of 128 bits, which reads as fast as memory and is not meant to withstand forgery: who may write
these files decides what is in them anyway. Pieces are digested in threads, and then their digests together.

A large file is digested again only if it may have changed. Path, size and modification time can all be those of
another file (`cp -p`, an unpacked archive), but not its inode and the time at which its status last changed, which
nobody can set. Two changes within one tick of a file system's clock look the same: reading begins only when the
tick is over, and where the clock counts whole seconds nothing is remembered.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import xxhash

from qlora.system.cache import cache_directory, make_cache
from qlora.system.files import make_directories, new_directory, new_file, only_writer
from qlora.system.wording import tell

T = TypeVar("T")
PIECE = 64 * 2**20  # bytes that a thread digests at a time
REMEMBERED = 64 * 2**20  # bytes of a file from which on its digest is kept: a smaller one takes milliseconds
TICK_SECONDS = 0.02  # Linux stamps files every 1 to 10 ms
_known: dict[tuple[str, ...], str] = {}  # of this process
_whole: dict[
    Path, dict[str, tuple[int, ...]]
] = {}  # of this process: directory -> its files when they were verified
DIGESTS = "digests.json"  # in a directory: file name -> digest


def content_digest(file: Path) -> str:
    """32 hexadecimal digits; reads all of the file, with a buffer of a megabyte per thread."""

    def digest_piece(start: int) -> bytes:
        piece, buffer = xxhash.xxh3_128(), memoryview(bytearray(2**20))
        with open(file, "rb", buffering=0) as content:
            content.seek(start)
            left = PIECE
            while left and (count := content.readinto(buffer[:left])):
                piece.update(buffer[:count])
                left -= count
        return piece.digest()

    starts = range(0, file.stat().st_size, PIECE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return str(xxhash.xxh3_128(b"".join(threads.map(digest_piece, starts))).hexdigest())


def digest_of(file: Path) -> str:
    """`content_digest`, remembered in the cache for a large file that has not changed since."""
    path = file.resolve()
    before = _state(path)
    if before[1] < REMEMBERED:
        return content_digest(path)
    key = (str(path), *map(str, before))
    if key not in _known:
        _known[key] = _remembered_digest(path, before)
    return _known[key]


def _remembered_digest(path: Path, before: list[int]) -> str:
    memory = (
        cache_directory() / "digests" / xxhash.xxh3_128(str(path).encode("utf-8", "surrogateescape")).hexdigest()
    )
    try:
        known = json.loads(memory.read_bytes())
        if known["state"] == before:
            return str(known["digest"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    time.sleep(TICK_SECONDS)
    digest = content_digest(path)
    if _state(path) == before and before[-1] % 10**9:
        try:
            make_directories(memory.parent)
            with new_file(memory) as staging:
                staging.write_text(json.dumps({"path": str(path), "state": before, "digest": digest}))
        except (OSError, ValueError):  # no cache: it is digested again the next time
            pass
    return digest


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_dev, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def write_digests(directory: Path) -> None:
    """Write the digests of a directory's files beside them; call it when all others are there."""
    digests = {file.name: content_digest(file) for file in _files(directory)}
    (directory / DIGESTS).write_text(json.dumps(digests, indent=2, sort_keys=True))


def damaged_file(directory: Path) -> str | None:
    """The name of a file that is not as `write_digests` found it: changed, missing or added; None: all are.

    Reads all files.
    """
    try:
        digests = json.loads((directory / DIGESTS).read_bytes())
        names = {file.name for file in _files(directory)}
        for name in sorted(names.symmetric_difference(digests)):
            return str(name)
        return next((name for name in sorted(names) if content_digest(directory / name) != digests[name]), None)
    except (OSError, ValueError, TypeError, RecursionError):
        return DIGESTS


def is_whole(directory: Path) -> bool:
    """Whether no file of a directory is damaged; in one process they are read again only if one has changed."""
    try:
        states = {file.name: tuple(_state(file)) for file in directory.iterdir()}
    except OSError:
        return False
    if _whole.get(directory) != states:
        if damaged_file(directory) is not None:
            return False
        _whole[directory] = states
    return True


def build_verified(directory: Path, build: Callable[[], T]) -> T | None:
    """`build()` from a directory, while all its files are read and verified.

    Returns:
        None if there is no such directory, or a file is damaged: what was built, or failed to be, is dropped.
    """
    if not directory.is_dir():
        return None
    with ThreadPoolExecutor(1) as thread:
        whole = thread.submit(is_whole, directory)
        try:
            built = build()
        except Exception:
            if whole.result():
                raise
            return None
    return built if whole.result() else None


def make_verified(target: Path, write: Callable[[Path], object]) -> None:
    """Make a directory of the cache, or make it again if it is damaged, which is said; other processes wait.

    Args:
        write: fills the empty directory that it is given.
    """
    make_cache()
    with only_writer(target) as is_absent:
        damaged = None if is_absent else damaged_file(target)
        if not is_absent and damaged is None:
            return
        if damaged is not None:
            tell(f"{target} in the cache is damaged ({damaged}); making it again")
            shutil.rmtree(target)
        with new_directory(target) as staging:
            write(staging)
            write_digests(staging)


def _files(directory: Path) -> Iterable[Path]:
    return [file for file in directory.iterdir() if file.name != DIGESTS]
