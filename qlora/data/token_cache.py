"""Tokenized rows of one source as memory-mapped files (numpy.memmap), and their cache.

    TokenWriter   writes rows to a directory one by one; holds one row in memory
    TokenStore    reads the directory, or a copy in memory: Example by number; pages are read on demand

    DIRECTORY/tokens.bin    int32: input_ids and targets (shifted already) of the first row, of the second, ...
              origins.bin   the origin of each row, one per line
              index.bin     a ROW each: offsets of its tokens and its origin, counts, a digest of its tokens
              report.json   counts of the dropped rows, the bad rows, checksums of the files

While it is made it is .DIRECTORY.part, and every few seconds its progress.json says how far it is: a process that
was killed is continued there, and the bytes at the end are the same.

(Arrow could store this in one file, but importing it adds 0.1 s to every start.)

Why not stream rows into training: a stream can only be shuffled within a window, and resuming means reading it
again from the start. Access by number keeps the shuffle of a whole epoch, resuming by step number, and the same
packing as with all rows in memory.

The cache, $QLORA_CACHE/tokens (default ~/.cache/qlora/tokens), has a directory for each combination of source,
tokenizer, template, options, FORMAT and library versions; its name is a hash of them. A directory with a wrong
checksum is rebuilt. Above MAX_CACHE bytes the least recently used directories are deleted. It is safe to delete
any of them at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from qlora.data.example import EncodeReport, Example
from qlora.data.rows import BadRow
from qlora.system.cache import cache_directory
from qlora.system.files import locked, make_directories, new_file, publish_directory, remove_leftovers
from qlora.system.versions import versions

FORMAT = 4  # increase it when the same rows, tokenizer, template and options give different tokens
MAX_CACHE = 20 * 10**9  # bytes
ROW = np.dtype(
    [
        ("start", "i8"), ("length", "i4"), ("num_targets", "i4"), ("origin", "i8"), ("num_letters", "i4"),
        ("digest", "u8"), ("split", "i4"), ("is_wanted", "?"),
    ]
)  # fmt: skip
PACKED_ROW = struct.Struct("=qiiqiQi?")  # the same bytes
INDEX, TOKENS, ORIGINS, REPORT = "index.bin", "tokens.bin", "origins.bin", "report.json"
PROGRESS, SAVE_SECONDS = "progress.json", 5.0
FILES: dict[str, Any] = {INDEX: ROW, TOKENS: np.int32, ORIGINS: np.uint8}


def row_digest(example: Example) -> int:
    """64-bit digest of a row's tokens, as int32, and of what sets a row of preferences apart."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in (example.input_ids, example.targets):
        digest.update(tensor.numpy().astype(np.int32).tobytes())
    if example.split:
        digest.update(f"{example.split} {example.is_wanted}".encode())
    return int.from_bytes(digest.digest(), "little")


def digests_of(examples: Sequence[Example]) -> np.ndarray:
    """(rows,) uint64, the `row_digest` of each example, without reading memory-mapped rows."""
    digests: np.ndarray | None = getattr(examples, "digests", None)
    if digests is not None:
        return digests
    return np.array([row_digest(example) for example in examples], np.uint64)


class TokenWriter:
    """Writes rows with `add` to files in a directory, or (None) to memory; close it at the end.

    What is in the directory is continued if its last `save` fits it, else removed.

    Attributes:
        saved: the state of that `save`; None at the beginning.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.num_rows = self._num_tokens = self._num_letters = 0
        self.checksums = dict.fromkeys(FILES, 0)
        self.saved = None if directory is None else self._restore(directory)
        mode = "wb" if self.saved is None else "ab"
        self.files: dict[str, Any] = {
            name: io.BytesIO() if directory is None else (directory / name).open(mode) for name in FILES
        }
        self._next_save = time.monotonic() + SAVE_SECONDS

    def add(self, example: Example) -> None:
        ids, targets = (tensor.numpy().astype(np.int32) for tensor in (example.input_ids, example.targets))
        origin = example.origin.encode("utf-8", "surrogateescape") + b"\n"
        place = (self._num_tokens, len(ids), example.num_targets, self._num_letters, len(origin) - 1)
        self._write(INDEX, PACKED_ROW.pack(*place, row_digest(example), example.split, example.is_wanted))
        self._write(TOKENS, ids.tobytes() + targets.tobytes())
        self._write(ORIGINS, origin)
        self._num_tokens += 2 * len(ids)
        self._num_letters += len(origin)
        self.num_rows += 1

    def _write(self, name: str, content: bytes) -> None:
        self.files[name].write(content)
        self.checksums[name] = zlib.crc32(content, self.checksums[name])

    def is_save_due(self) -> bool:
        """Whether the rows so far should be saved: every SAVE_SECONDS, on disk."""
        return self.directory is not None and time.monotonic() >= self._next_save

    def save(self, state: dict[str, Any]) -> None:
        """Keep the rows so far for a process that continues after this one was killed.

        Args:
            state: JSON that this process needs for it.
        """
        assert self.directory is not None
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        counts = [self.num_rows, self._num_tokens, self._num_letters]
        with new_file(self.directory / PROGRESS) as staging:
            staging.write_text(json.dumps({"counts": counts, "crc32": self.checksums, "state": state}))
        self._next_save = time.monotonic() + SAVE_SECONDS

    def _restore(self, directory: Path) -> dict[str, Any] | None:
        """Cut the files to what was saved last, if they hold it; else empty the directory."""
        remove_leftovers(directory)
        try:
            saved = json.loads((directory / PROGRESS).read_bytes())
            rows, tokens, letters = map(int, saved["counts"])
            for name, size in ((INDEX, rows * ROW.itemsize), (TOKENS, 4 * tokens), (ORIGINS, letters)):
                if (directory / name).stat().st_size < size:
                    raise ValueError(name)
                os.truncate(directory / name, size)
                if _checksum(directory / name) != saved["crc32"][name]:
                    raise ValueError(name)
            state: dict[str, Any] = dict(saved["state"])
        except (OSError, KeyError, TypeError, ValueError, RecursionError):
            shutil.rmtree(directory, ignore_errors=True)
            make_directories(directory)
            return None
        self.num_rows, self._num_tokens, self._num_letters = rows, tokens, letters
        self.checksums = {name: int(saved["crc32"][name]) for name in FILES}
        return state

    def close(self) -> None:
        for file in self.files.values():
            file.close()


class TokenStore(Sequence[Example]):
    """Rows of one source, in the source's order.

    Args:
        files: a TokenWriter's output as arrays with the dtypes in FILES, in memory or memory-mapped.
        report: counts for all rows of the source.
        bad_rows: the unusable rows.
    Attributes:
        lengths: (rows,) int64, tokens per row.
        digests: (rows,) uint64, see `row_digest`.
        target_counts: (rows,) int32.
    """

    def __init__(self, files: dict[str, np.ndarray], report: EncodeReport, bad_rows: list[BadRow]) -> None:
        self._index, self._tokens, self._origins = (files[name] for name in (INDEX, TOKENS, ORIGINS))
        self.report, self.bad_rows = report, bad_rows
        self.lengths = self._index["length"].astype(np.int64)

    @property
    def digests(self) -> np.ndarray:
        return np.ascontiguousarray(self._index["digest"])

    @property
    def target_counts(self) -> np.ndarray:
        return np.ascontiguousarray(self._index["num_targets"])

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, length, _, origin, num_letters, _, split, is_wanted = self._index[range(len(self))[index]].tolist()
        both = torch.from_numpy(self._tokens[start : start + 2 * length].astype(np.int64))
        text = self._origins[origin : origin + num_letters].tobytes().decode("utf-8", "surrogateescape")
        return Example(both[:length], both[length:], text, split, is_wanted)


def write_store(
    fill: Callable[[TokenWriter], tuple[EncodeReport, list[BadRow]]], directory: Path | None
) -> TokenStore:
    """Create a store with `fill`, in a directory (written atomically) or (None) in memory.

    Raises:
        OSError: the directory cannot be written.
    """
    if directory is None:
        writer = TokenWriter(None)
        report, bad_rows = fill(writer)
        held = {name: np.frombuffer(writer.files[name].getbuffer(), kind) for name, kind in FILES.items()}
        return TokenStore(held, report, bad_rows)
    part = part_of(directory)
    make_directories(part)
    try:
        _fill_part(fill, part)
        publish_directory(part, directory)
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise
    described = json.loads((directory / REPORT).read_bytes())
    return _open(directory, described)


def part_of(directory: Path) -> Path:
    """Where a store is while it is made; what a killed process left there is continued."""
    return directory.with_name(f".{directory.name}.part")


def _fill_part(fill: Callable[[TokenWriter], tuple[EncodeReport, list[BadRow]]], part: Path) -> None:
    writer = TokenWriter(part)
    try:
        report, bad_rows = fill(writer)
    finally:
        writer.close()
    described = {
        "report": dataclasses.asdict(report),
        "bad_rows": [[row.where, row.problem] for row in bad_rows],
        "crc32": writer.checksums,
    }
    (part / REPORT).write_text(json.dumps(described))
    (part / PROGRESS).unlink(missing_ok=True)


def _map_files(directory: Path) -> dict[str, np.ndarray]:
    return {name: np.memmap(directory / name, kind, "r") for name, kind in FILES.items()}


def read_store(directory: Path) -> TokenStore | None:
    """The store in a directory; None if it is missing or damaged."""
    try:
        described = json.loads((directory / REPORT).read_bytes())
        if described["crc32"] != {name: _checksum(directory / name) for name in FILES}:
            return None
        store = _open(directory, described)
        with suppress(OSError):  # the cache may belong to someone else
            os.utime(directory)  # mark as used
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return store


def _open(directory: Path, described: dict[str, Any]) -> TokenStore:
    bad_rows = [BadRow(str(where), str(problem)) for where, problem in described["bad_rows"]]
    return TokenStore(_map_files(directory), EncodeReport(**described["report"]), bad_rows)


def _checksum(file: Path) -> int:
    """CRC-32 of a file, read in pieces: about a second per gigabyte."""
    value = 0
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            value = zlib.crc32(piece, value)
    return value


def cached_store(
    key: list[Any], fill: Callable[[TokenWriter], tuple[EncodeReport, list[BadRow]]]
) -> tuple[TokenStore, bool]:
    """Return the store for `key` and whether it was cached; if not, `fill` creates it.

    If another process is creating it, wait for that process.

    Args:
        key: everything the rows depend on, as JSON.
    Raises:
        OSError: the cache cannot be written.
    """
    described = json.dumps([FORMAT, _code(), key], sort_keys=True)
    directory = token_cache() / hashlib.sha256(described.encode()).hexdigest()[:24]
    make_directories(directory.parent)
    with locked(directory):
        store = read_store(directory)
        if store is not None:
            return store, True
        shutil.rmtree(directory, ignore_errors=True)
        remove_leftovers(directory.parent, directory.name)
        store = write_store(fill, directory)
    _evict(directory)
    return store, False


def token_cache() -> Path:
    """$QLORA_CACHE/tokens."""
    return cache_directory() / "tokens"


def _code() -> str:
    """Versions of the code that makes rows: our format and the libraries that render and tokenize."""
    return " ".join([str(FORMAT), *versions("transformers", "tokenizers").values()])


def _evict(newest: Path) -> None:
    """Delete the least recently used stores, except `newest`, until the total is at most MAX_CACHE."""
    with suppress(FileNotFoundError):  # another process may delete at the same time
        stores = [path for path in newest.parent.iterdir() if path.is_dir() and path.suffix in ("", ".part")]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in stores}
        for path in sorted({*stores} - {newest}, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) <= MAX_CACHE:
                return
            if _is_being_made(path):
                continue
            shutil.rmtree(path, ignore_errors=True)  # processes that have it mapped keep its pages
            path.with_name(f"{_store_of(path)}.lock").unlink(missing_ok=True)
            del sizes[path]


def _store_of(path: Path) -> str:
    return path.name.removeprefix(".").removesuffix(".part")


def _is_being_made(path: Path) -> bool:
    """Whether a process holds the lock of a part."""
    from filelock import FileLock, Timeout

    if path.suffix != ".part":
        return False
    try:
        with FileLock(path.with_name(f"{_store_of(path)}.lock"), blocking=False):
            return False
    except Timeout:
        return True
