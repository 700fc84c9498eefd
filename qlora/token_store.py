"""Tokenised rows of one source as a file of Arrow that is mapped into memory, and its cache.

    TokenWriter   rows one after another -> a directory, whole or absent; a piece of it in memory at a time
    TokenStore    the directory, or a copy in memory -> Example by number; pages are read as they are asked for

    DIRECTORY/rows.arrow    origin, input_ids, targets (int32, shifted already), digest (of these), num_targets
              report.json   what became of the others: counts, bad rows; size and checksum of rows.arrow

Why not a stream of rows into training, as for data that no disk holds: a stream is shuffled within a window only,
and to resume it is to read it again from its beginning. Rows that can be asked for by number keep the shuffle of a
whole epoch, resuming by the step's number and packing exactly as they are with everything in memory.

The cache, $QLORA_CACHE/tokens (else ~/.cache/qlora/tokens), holds a directory for each source, tokenizer,
template and set of options; its name is a hash of all of these, the code's version included. A directory whose
checksum is wrong is made anew. Above MAX_CACHE bytes in all the least recently used ones go. Any may be deleted
at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from qlora.device import cache_directory
from qlora.files import new_directory
from qlora.rows import BadRow
from qlora.tokenize import EncodeReport, Example

FORMAT = 1
CHUNK_TOKENS, CHUNK_ROWS = 2**18, 2**12  # at which rows that wait are written: 2 MB
MAX_CACHE = 20 * 10**9  # bytes
ROWS, REPORT = "rows.arrow", "report.json"


def row_digest(input_ids: np.ndarray, targets: np.ndarray) -> int:
    """Identity of a row's tokens, 64 bits; both int32, of one length."""
    digest = hashlib.blake2b(input_ids.tobytes(), digest_size=8)
    digest.update(targets.tobytes())
    return int.from_bytes(digest.digest(), "little")


def digests_of(examples: Sequence[Example]) -> np.ndarray:
    """(rows,) uint64, the `row_digest` of each example; of mapped ones, without reading them."""
    digests: np.ndarray | None = getattr(examples, "digests", None)
    if digests is not None:
        return digests
    rows = ((e.input_ids.numpy().astype(np.int32), e.targets.numpy().astype(np.int32)) for e in examples)
    return np.array([row_digest(*row) for row in rows], np.uint64)


class TokenWriter:
    """Writes rows into `sink`, a path or a buffer; `add` each, then `close`."""

    def __init__(self, sink: Any) -> None:
        import pyarrow as pa

        tokens = pa.list_(pa.int32())
        self.schema = pa.schema(
            {
                "origin": pa.string(),
                "input_ids": tokens,
                "targets": tokens,
                "digest": pa.uint64(),
                "num_targets": pa.int32(),
            }
        )
        self._writer = pa.ipc.new_file(str(sink) if isinstance(sink, Path) else sink, self.schema)
        self._waiting: list[tuple[str, np.ndarray, np.ndarray, int, int]] = []
        self._num_waiting = 0
        self.num_rows = 0

    def add(self, example: Example) -> None:
        ids, targets = (tensor.numpy().astype(np.int32) for tensor in (example.input_ids, example.targets))
        self._waiting.append((example.origin, ids, targets, row_digest(ids, targets), example.num_targets))
        self._num_waiting += len(ids)
        self.num_rows += 1
        if self._num_waiting >= CHUNK_TOKENS or len(self._waiting) >= CHUNK_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._waiting:
            return
        origins, ids, targets, digests, counts = zip(*self._waiting, strict=True)
        offsets = pa.array(np.cumsum([0, *map(len, ids)], dtype=np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(rows))) for rows in (ids, targets)]
        columns = [
            pa.array(origins, pa.string()),
            *lists,
            pa.array(digests, pa.uint64()),
            pa.array(counts, pa.int32()),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self.schema))
        self._waiting, self._num_waiting = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class TokenStore(Sequence[Example]):
    """Rows of one source in the source's order.

    Args:
        file: what a TokenWriter wrote: a path, which is mapped, or a buffer.
        report: what became of all the source's rows.
        bad_rows: those among them that cannot be used.
    Attributes:
        lengths: (rows,) int64, tokens of each.
        digests: (rows,) uint64, see `row_digest`.
        target_counts: (rows,) int32.
    """

    def __init__(self, file: Path | bytes, report: EncodeReport, bad_rows: list[BadRow]) -> None:
        import pyarrow as pa

        self.report, self.bad_rows = report, bad_rows
        source = pa.memory_map(str(file)) if isinstance(file, Path) else pa.py_buffer(file)
        self._file = pa.ipc.open_file(source)
        batches = [self._file.get_batch(number) for number in range(self._file.num_record_batches)]
        lengths = [np.diff(batch.column(1).offsets.to_numpy()) for batch in batches]
        self.lengths = np.concatenate(lengths).astype(np.int64)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    @cached_property
    def digests(self) -> np.ndarray:
        return self._column(3)

    @cached_property
    def target_counts(self) -> np.ndarray:
        return self._column(4)

    def _column(self, column: int) -> np.ndarray:
        batches = (self._file.get_batch(number) for number in range(self._file.num_record_batches))
        return np.concatenate([batch.column(column).to_numpy() for batch in batches])

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # an IndexError past the end, and -1 is the last
        chunk = int(np.searchsorted(self._starts, number, side="right")) - 1
        batch, place = self._file.get_batch(chunk), number - int(self._starts[chunk])
        ids, targets = (
            torch.from_numpy(batch.column(column)[place].values.to_numpy().astype(np.int64)) for column in (1, 2)
        )
        return Example(ids, targets, batch.column(0)[place].as_py())


def write_store(
    fill: Callable[[TokenWriter], tuple[EncodeReport, list[BadRow]]], directory: Path | None
) -> TokenStore:
    """Make a store by `fill`, in a directory that appears whole or not at all, or (None) in memory.

    Raises:
        OSError: the directory cannot be written.
    """
    if directory is None:
        buffer = io.BytesIO()
        writer = TokenWriter(buffer)
        report, bad_rows = fill(writer)
        writer.close()
        return TokenStore(buffer.getvalue(), report, bad_rows)
    with new_directory(directory) as staging:
        writer = TokenWriter(staging / ROWS)
        report, bad_rows = fill(writer)
        writer.close()
        described = {
            "format": FORMAT,
            "report": dataclasses.asdict(report),
            "bad_rows": [[row.where, row.problem] for row in bad_rows],
            "size": (staging / ROWS).stat().st_size,
            "crc32": _checksum(staging / ROWS),
        }
        (staging / REPORT).write_text(json.dumps(described))
    return TokenStore(directory / ROWS, report, bad_rows)


def read_store(directory: Path) -> TokenStore | None:
    """The store in a directory; None if there is none, or a damaged one."""
    import pyarrow as pa

    rows = directory / ROWS
    try:
        described = json.loads((directory / REPORT).read_bytes())
        if rows.stat().st_size != described["size"] or _checksum(rows) != described["crc32"]:
            return None
        bad_rows = [BadRow(str(where), str(problem)) for where, problem in described["bad_rows"]]
        store = TokenStore(rows, EncodeReport(**described["report"]), bad_rows)
        os.utime(directory)  # used now
    except (OSError, KeyError, TypeError, ValueError, RecursionError, pa.ArrowException):
        return None
    return store


def _checksum(file: Path) -> int:
    """CRC-32 of a file, read a piece at a time: a gigabyte takes about a second."""
    value = 0
    with open(file, "rb") as content:
        while piece := content.read(2**20):
            value = zlib.crc32(piece, value)
    return value


def cached_store(
    key: list[Any], fill: Callable[[TokenWriter], tuple[EncodeReport, list[BadRow]]]
) -> tuple[TokenStore, bool]:
    """The store for `key` from the cache, made by `fill` if it is not there whole, and whether it was.

    Who comes while another process makes it waits for that one.

    Args:
        key: all that the rows depend on, as JSON.
    Raises:
        OSError: the cache cannot be written.
    """
    from filelock import FileLock

    described = json.dumps([FORMAT, _code(), key], sort_keys=True)
    directory = token_cache() / hashlib.sha256(described.encode()).hexdigest()[:24]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{directory}.lock"):
        store = read_store(directory)
        if store is not None:
            return store, True
        shutil.rmtree(directory, ignore_errors=True)
        for left in directory.parent.glob(f".{directory.name}.*.tmp"):  # half written by a killed process
            shutil.rmtree(left, ignore_errors=True)
        store = write_store(fill, directory)
    _evict(directory)
    return store, False


def token_cache() -> Path:
    """$QLORA_CACHE/tokens."""
    return cache_directory() / "tokens"


def _code() -> str:
    """Identity of the code that makes rows."""
    from tokenizers import __version__ as tokenizers_version
    from transformers import __version__ as transformers_version

    names = ("rows", "tool_calls", "records", "template", "tokenize", "token_store")
    files = [Path(__file__).with_name(f"{name}.py") for name in names]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"{digest} {transformers_version} {tokenizers_version}"


def _evict(newest: Path) -> None:
    """Delete the least recently used stores while all together are above MAX_CACHE; never the newest."""
    with suppress(FileNotFoundError):  # another process may tidy up at the same time
        stores = [path for path in newest.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in stores}
        for path in sorted({*stores} - {newest}, key=lambda path: path.stat().st_mtime):
            if sum(sizes.values()) <= MAX_CACHE:
                return
            shutil.rmtree(path, ignore_errors=True)  # who has it mapped keeps its pages
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
            del sizes[path]
