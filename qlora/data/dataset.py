"""Load data sources into training and held-out examples.

Each source becomes a TokenStore, in the cache or in memory. Rows are read on demand, so data may be larger than
memory. The weight of a source decides how much of it an epoch takes (data/order.py, WindowOrder).
"""

from __future__ import annotations

import glob
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from qlora.data.chat_template import date_of, prints_date
from qlora.data.encode import stream_examples
from qlora.data.example import EncodeReport, Example, finish_report, format_sample
from qlora.data.keys import describe_notes
from qlora.data.order import rows_per_epoch
from qlora.data.preferences import Kind
from qlora.data.python_rows import PythonRows
from qlora.data.readers import identify_source, parts_of, stream_records
from qlora.data.rows import BadRow, collect_bad_row
from qlora.data.token_cache import TokenStore, TokenWriter, cached_store, token_cache, write_store
from qlora.data.tokenizer_files import tokenizer_files
from qlora.system.errors import InputError
from qlora.system.files import new_file

MAX_WEIGHT = 1000
Source = str | PythonRows  # a file name, a hub id, or rows from Python
SourceRows = tuple[TokenStore, np.ndarray, float]  # store, row indices, weight


class Examples(Sequence[Example]):
    """Rows of several sources, one source after another, read on demand.

    Args:
        parts: (store, row indices, weight) of each source.
        notes: what was said of the sources, such as columns that are not used.
    Attributes:
        sources: (number of rows, weight) of each source, for WindowOrder.
        lengths: tokens of each row.
        num_targets: total over all rows.
        digests: (rows,) uint64, identity of each row's tokens.
        reference: (rows, 2) fp32, each row's `Example.reference`; None: they have none.
    """

    def __init__(self, parts: Sequence[SourceRows], notes: Sequence[str] = ()) -> None:
        self._parts, self.notes = parts, list(notes)
        self.reference: np.ndarray | None = None
        self.sources = [(len(rows), weight) for _, rows, weight in parts]
        self._starts = np.cumsum([0, *(len(rows) for _, rows, _ in parts)])

    @property
    def lengths(self) -> list[int]:
        return np.concatenate([store.lengths[rows] for store, rows, _ in self._parts]).tolist()

    @property
    def num_targets(self) -> int:
        return sum(int(store.target_counts[rows].sum()) for store, rows, _ in self._parts)

    @property
    def digests(self) -> np.ndarray:
        return np.concatenate([store.digests[rows] for store, rows, _ in self._parts])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        store, rows, _ = self._parts[part]
        example = store[int(rows[number - self._starts[part]])]
        return (
            example
            if self.reference is None
            else replace(example, reference=tuple(self.reference[number].tolist()))
        )


def find_sources(source: str | Sequence[Source], weights: Sequence[float] = ()) -> list[tuple[Source, float]]:
    """(file, hub id or rows from Python, weight) of each source.

    Args:
        source: names and rows, or a comma-separated list of names (unless the text itself is a file name). A name
            may be a pattern such as `shards/*.jsonl`; each of its files gets the pattern's weight.
        weights: one per name; empty = all 1.
    Raises:
        InputError: wrong number of weights, one out of range, a pattern without a file, a source given twice.
    """
    names = [source] if isinstance(source, str) and Path(source).exists() else source
    names = [name.strip() for name in names.split(",") if name.strip()] if isinstance(names, str) else list(names)
    if not names:
        raise InputError("data is empty; give --data a file or a hub id.")
    if weights and len(weights) != len(names):
        listed = ", ".join(map(str, names))
        raise InputError(
            f"data_weights has {len(weights)} numbers for {len(names)} sources, {listed}; give one each."
        )
    found: list[tuple[Source, float]] = []
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        if not 0 < weight <= MAX_WEIGHT:
            raise InputError(
                f"data_weights gives {name} the weight {weight:g}; give a number above 0, at most {MAX_WEIGHT}, "
                "or leave the source out."
            )
        found += [(source, float(weight)) for source in _matching(name)]
    texts = [str(source) for source, _ in found]
    files = [_identity(text) for text in texts]
    doubled = [(text, texts[files.index(file)]) for text, file in zip(texts, files, strict=True)]
    for number, (text, first) in enumerate(doubled):
        if files.index(files[number]) < number:
            other = "" if text == first else f", the first time as {first}"
            raise InputError(f"data names {text} twice{other}; give it a weight of 2 instead.")
    return found


def _identity(text: str) -> object:
    """Equal for all names of one file: links of both kinds, relative and absolute paths."""
    try:
        status = Path(text).stat()
    except OSError:
        return text
    return status.st_dev, status.st_ino


def _matching(name: Source) -> Sequence[Source]:
    """The files of a pattern, or of a directory of parts; anything else alone."""
    if not isinstance(name, PythonRows) and Path(name).is_dir():
        return parts_of(Path(name)) or [name]
    if isinstance(name, PythonRows) or Path(name).exists() or not glob.has_magic(name):
        return [name]
    files = sorted(glob.glob(name))
    if not files:
        raise InputError(f"{name} matches no file; give another pattern or a file name.")
    return files


@dataclass(frozen=True)
class Encoder:
    """Turns the records of a source into rows; fields as the arguments of `encode_records` and `stream_records`.

    `cache`: keep the tokens in a memory-mapped file on disk instead of in memory.
    """

    tokenizer: Any
    max_length: int
    train_on: str = "completion"
    on_long: str = "truncate"
    parse_special: bool = False
    num_workers: int = 0
    columns: Mapping[str, str] | None = None
    cache: bool = False
    kind: Kind = "answers"

    @cached_property
    def key(self) -> list[Any]:
        """Everything the rows depend on, apart from the source."""
        digest = hashlib.sha256()
        for name, content in sorted(tokenizer_files(self.tokenizer).items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        options: list[Any] = [date_of(self.tokenizer)] if prints_date(self.tokenizer) else []
        options += [self.max_length, self.train_on, self.on_long, self.parse_special]
        options += [] if self.kind == "answers" else [self.kind]
        return [digest.hexdigest(), sorted((self.columns or {}).items()), *options]

    def load(
        self, source: Source, bad_rows: list[BadRow] | None, say: Callable[[str], Any]
    ) -> tuple[TokenStore, str]:
        """(rows of a source, where they came from).

        Args:
            bad_rows: collects unusable rows, including those before an error; None: raise at the first.
        """

        def fill(writer: TokenWriter) -> tuple[EncodeReport, list[BadRow]]:
            report, found = EncodeReport(), [] if bad_rows is None else bad_rows
            found.clear()
            if writer.saved is not None:
                report = EncodeReport(**writer.saved["report"])
                for where, problem in writer.saved["bad_rows"]:
                    collect_bad_row(BadRow(where, problem), bad_rows)
            records = stream_records(source, columns=self.columns, kind=self.kind)
            rows = stream_examples(
                islice(records, report.num_records + len(found), None), self.tokenizer, self.max_length,
                self.train_on, self.on_long, report,
                parse_special=self.parse_special, num_workers=self.num_workers, kind=self.kind,
            )  # fmt: skip
            with closing(records), closing(rows):
                for row in rows:
                    if isinstance(row, BadRow):
                        collect_bad_row(row, bad_rows)
                    else:
                        writer.add(row)
                    # The report and the bad rows count all records up to this row; a labelled one needs others.
                    if self.kind != "labels" and writer.is_save_due():
                        listed = [[bad.where, bad.problem] for bad in found]
                        writer.save({"report": asdict(report), "bad_rows": listed})
            finish_report(report, found, writer.num_rows, self.max_length)
            return report, found

        identity = identify_source(source) if self.cache else None
        if identity is not None:
            try:
                store, was_there = cached_store([identity, self.key], fill)
            except OSError as error:
                say(f"the token cache {token_cache()} cannot be written ({error}); keeping tokens in memory")
            else:
                if bad_rows is None and store.bad_rows:
                    raise store.bad_rows[0]
                if bad_rows is not None:
                    bad_rows[:] = store.bad_rows
                return store, "read from the token cache" if was_there else "tokenized"
        return write_store(fill, None), "tokenized"


@dataclass(frozen=True)
class Sources:
    """Where training and held-out rows come from.

    Attributes:
        training, weights: as `find_sources`.
        held_out: one file, hub id or rows.
        split: instead of `held_out`, the share of each source to hold out, at least a row, drawn by
            `seed`; 0 = none. A single row is trained on. Weights are for training alone.
    """

    training: str | Sequence[Source]
    weights: Sequence[float] = ()
    held_out: Source | None = None
    split: float = 0.0
    seed: int = 0


def load_examples(
    sources: Sources,
    encoder: Encoder,
    say: Callable[[str], Any] = print,
    *,
    on_bad_row: str = "stop",
    bad_rows_file: Path | None = None,
    show_sample: bool = False,
) -> tuple[Examples, Sequence[Example]]:
    """(training, held-out) examples.

    Args:
        say: receives one line per source, the sample, the split and the mix.
        on_bad_row: "stop" raises at an unusable row, "skip" drops and counts it.
        bad_rows_file: lists the dropped rows, one {"where", "problem"} per line, even if too few rows are left to
            train on. An old file is replaced, or removed if no row is bad.
    Raises:
        InputError: unusable data, or a split that leaves one side empty.
    """
    if on_bad_row not in ("stop", "skip"):
        raise InputError(f"on_bad_row is '{on_bad_row}'; use 'stop' or 'skip'.")
    found = find_sources(sources.training, sources.weights)
    skipped: list[BadRow] = []
    notes: list[str] = []

    def load(name: Source) -> TokenStore:
        started, bad_rows = time.perf_counter(), list[BadRow]()
        try:
            store, how = encoder.load(name, bad_rows if on_bad_row == "skip" else None, say)
        finally:
            skipped.extend(bad_rows)
        listed = f"; bad rows are listed in {bad_rows_file}" if bad_rows and bad_rows_file else ""
        say(f"{name}: {store.report}; {how} in {time.perf_counter() - started:.1f} s{listed}")
        lines = [f"{name}: {line}" for line in describe_notes(store.report.notes)]
        notes.extend(lines)
        for line in lines:
            say(line)
        return store

    try:
        stores = [load(name) for name, _ in found]
        if show_sample:
            say(format_sample(stores[0][0], encoder.tokenizer))
        held_out = None if sources.held_out is None else load(sources.held_out)
    finally:
        if bad_rows_file is not None:
            write_bad_rows(skipped, bad_rows_file)
    parts = [(store, np.arange(len(store)), weight) for store, (_, weight) in zip(stores, found, strict=True)]
    held: list[SourceRows] = [] if held_out is None else [(held_out, np.arange(len(held_out)), 1.0)]
    if held_out is None and sources.split:
        parts, held = _split(parts, sources.split, sources.seed)
        if not held:
            few, count = ", ".join(str(name) for name, _ in found), sum(map(len, stores))
            if count > len(stores):
                problem = f"--eval-split {sources.split:g} of {few} holds out all {count} examples"
                raise InputError(f"{problem} and leaves none to train on; pass a smaller share.")
            raise InputError(f"{few}: {count} examples are too few to hold some out; pass --eval-data.")
        say(f"held out {sum(len(rows) for _, rows, _ in held)} of them for evaluation")
    if len(found) > 1 or found[0][1] != 1:
        say(describe_mix([str(name) for name, _ in found], parts))
    return Examples(parts, notes), Examples(held) if held else []


def _split(parts: Sequence[SourceRows], share: float, seed: int) -> tuple[list[SourceRows], list[SourceRows]]:
    """(training part, held-out part): a share of each source, independent of the other sources."""
    trained, held = [], []
    for store, rows, weight in parts:
        count = max(1, round(share * len(rows)))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).numpy()
        if count >= len(rows):
            trained.append((store, rows, weight))
            continue
        trained.append((store, np.sort(order[count:]), weight))
        held.append((store, np.sort(order[:count]), 1.0))
    return trained, held


def describe_mix(names: Sequence[str], parts: Sequence[SourceRows]) -> str:
    """Rows and tokens of each source in an epoch; a sampled row counts as the source's mean."""
    taken = [rows_per_epoch(len(rows), weight) for _, rows, weight in parts]
    means = [float(store.lengths[rows].mean()) for store, rows, _ in parts]
    tokens = [count * mean for count, mean in zip(taken, means, strict=True)]
    lines = [
        f"{name} x {weight:g}: {count:,} rows, {number:,.0f} tokens ({number / sum(tokens):.0%})"
        for name, (_, _, weight), count, number in zip(names, parts, taken, tokens, strict=True)
    ]
    return f"an epoch: {sum(taken):,} rows, {sum(tokens):,.0f} tokens; " + "; ".join(lines)


def write_bad_rows(bad_rows: Sequence[BadRow], path: Path) -> None:
    """Write one {"where", "problem"} per line, atomically; no file if there are no bad rows."""
    if not bad_rows:
        path.unlink(missing_ok=True)
        return
    with new_file(path) as staging, open(staging, "w", encoding="utf-8") as file:
        for row in bad_rows:
            file.write(json.dumps({"where": row.where, "problem": row.problem}) + "\n")
