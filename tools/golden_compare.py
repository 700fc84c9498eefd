"""Compare the output of two commits file by file: equal, or the first value that differs.

    *.safetensors   names, dtypes, shapes, bytes of every tensor, metadata, and then the file's own bytes
    *.jsonl         line by line, field by field
    *.json          field by field; without an ignored field, the file's own bytes too
    any other file  its bytes

A number is equal if it is written the same: 0.1 differs from 0.10000000000000002, and 1 from 1.0. Settings
(run.json, and "run" in state.json) are compared by flag, whatever section they stand in. `IGNORED` is the whole
list of what may differ.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ignored:
    """A value that may differ.

    Args:
        file: pattern of the file's name.
        key: pattern of the field, as a.b.c; "" = the whole file, of which only the presence is compared.
        reason: why it may differ although all results are equal.
    """

    file: str
    key: str
    reason: str


IGNORED = (
    Ignored("metrics.jsonl", "tokens_per_second", "time"),
    Ignored("metrics.jsonl", "peak_memory_gib", "memory, which the allocator's history moves"),
    Ignored("run.json", "facts.started", "time"),
    Ignored("run.json", "facts.versions.qlora", "the two commits may have different versions"),
    Ignored("state.json", "sha256.*", "checksums of the other files, which are compared themselves"),
    Ignored("result*.json", "settings.*", "every flag; one that matters changes the figures"),
    Ignored("result*.json", "versions.qlora", "the two commits may have different versions"),
    Ignored("loss.png", "", "a picture of metrics.jsonl"),
    Ignored("report.html", "", "a page about the files that are compared, with times"),
    Ignored("README.md", "", "words for the reader of a merged model"),
    Ignored(".lock", "", "empty, or a process id"),
)
# Between a run that was resumed and one that was not, of the same commit.
WITHIN = (
    Ignored("run.json", "output_dir", "each has its own"),
    Ignored("run.json", "resume", "one of them was"),
    Ignored("run.json", "facts.command", "holds the two flags above"),
    Ignored("state.json", "run.output_dir", "each has its own"),
    Ignored("state.json", "run.resume", "one of them was"),
)
# Settings written as text by one commit may be a list or a mapping in another: {"q_proj": 4} is q_proj=4.
MAPPINGS = ("rank_pattern", "alpha_pattern", "columns")
DTYPES = {  # as safetensors and as torch name them
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
TEXT_LENGTH = 60  # letters of a value in a message


def compare_directories(old: Path, new: Path, ignored: Sequence[Ignored] = IGNORED) -> list[str]:
    """Every difference between two trees of files, one sentence each: the first of each file.

    Metrics come first, since they tell at which step it began.
    """
    names = sorted({*_files(old), *_files(new)}, key=lambda name: (not name.endswith(".jsonl"), name))
    found = [compare_files(name, old / name, new / name, ignored) for name in names]
    return [difference for difference in found if difference is not None]


def compared_files(directory: Path) -> Counter[str]:
    """How many files of each kind `compare_directories` looks into."""
    names = [Path(name).name for name in _files(directory)]
    whole = [rule.file for rule in IGNORED if not rule.key]
    return Counter(
        Path(name).suffix.lstrip(".") or name for name in names if not any(fnmatchcase(name, w) for w in whole)
    )


def _files(directory: Path) -> Iterator[str]:
    return (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def compare_files(name: str, old: Path, new: Path, ignored: Sequence[Ignored] = IGNORED) -> str | None:
    """The first difference of two files as a sentence that begins with `name`; None if they are equal."""
    for path, side in ((old, "old"), (new, "new")):
        if not path.is_file():
            return f"{name}: only the {'new' if side == 'old' else 'old'} commit wrote it"
    rules = [rule for rule in ignored if fnmatchcase(old.name, rule.file)]
    if any(rule.key == "" for rule in rules) or _same_bytes(old, new):
        return None
    compare = READERS.get(old.suffix, _compare_bytes)
    try:
        difference = compare(old, new, [rule.key for rule in rules])
    except (ValueError, KeyError, TypeError) as error:
        difference = f"cannot be read ({error}), and its bytes differ"
    return None if difference is None else f"{name}: {difference}"


def _same_bytes(old: Path, new: Path) -> bool:
    return old.stat().st_size == new.stat().st_size and old.read_bytes() == new.read_bytes()


def _compare_bytes(old: Path, new: Path, _ignored: list[str]) -> str | None:
    ours, theirs = old.read_bytes(), new.read_bytes()
    if ours == theirs:
        return None
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if place is None:
        return f"{len(ours)} bytes became {len(theirs)}"
    return f"byte {place} was {ours[place]}, is {theirs[place]}"


# ---- JSON -------------------------------------------------------------------------------------------------


def _compare_lines(old: Path, new: Path, ignored: list[str]) -> str | None:
    ours, theirs = ([json.loads(line) for line in path.read_text().splitlines()] for path in (old, new))
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), 1):
        difference = compare_values(flatten(a), flatten(b), ignored)
        if difference is not None:
            return f"line {number}, {difference}"
    return None if len(ours) == len(theirs) else f"{len(ours)} lines became {len(theirs)}"


def _compare_json(old: Path, new: Path, ignored: list[str]) -> str | None:
    ours, theirs = (_read_fields(path) for path in (old, new))
    difference = compare_values(ours, theirs, ignored)
    if difference is None and not ignored:
        return "the values are equal, but their order or layout in the file is not"
    return difference


def _read_fields(path: Path) -> dict[str, str]:
    """Field -> value as JSON; settings by flag."""
    content = json.loads(path.read_text())
    if path.name == "run.json":
        facts = content.pop("facts", None)
        return flatten(settings_by_flag(content)) | flatten({"facts": facts})
    if path.name == "state.json":
        content["run"] = settings_by_flag(content["run"])
    return flatten(content)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON as {"a.b.0": the value as JSON}; an empty list or mapping is a value."""
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {name: json.dumps(value)}
    found: dict[str, str] = {}
    for key, item in items:
        found |= flatten(item, f"{name}.{key}" if name else key)
    return found


def settings_by_flag(sections: dict[str, Any]) -> dict[str, Any]:
    """The settings of nested sections as {flag: value}, lists and mappings as the text of the command line.

    Raises:
        ValueError: a flag stands in two sections.
    """
    found: dict[str, Any] = {}
    for name, value in sections.items():
        if isinstance(value, dict) and name not in MAPPINGS:
            own = settings_by_flag(value)
        else:
            own = {name: _as_text(value)}
        if found.keys() & own.keys():
            raise ValueError(f"{', '.join(found.keys() & own.keys())} stands in two sections")
        found |= own
    return found


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, dict):
        return ",".join(
            f"{key}={item:g}" if isinstance(item, float) else f"{key}={item}" for key, item in value.items()
        )
    return value


def compare_values(old: dict[str, str], new: dict[str, str], ignored: list[str]) -> str | None:
    """The first field that differs and is not ignored; None if none does."""
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key) and not any(fnmatchcase(key, pattern) for pattern in ignored):
            return f"{key}: {_shorten(old.get(key))} became {_shorten(new.get(key))}"
    return None


def _shorten(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= TEXT_LENGTH else text[: TEXT_LENGTH - 3] + "..."


# ---- safetensors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file: its dtype as the file names it, its shape, its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """(metadata, name -> tensor) of a file: 8 bytes of length, a JSON header, the tensors' bytes.

    Raises:
        ValueError, KeyError, TypeError: it is no safetensors file.
    """
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        tensors[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), content[start + first : start + last])
    return metadata, tensors


def _compare_tensors(old: Path, new: Path, ignored: list[str]) -> str | None:
    (old_metadata, ours), (new_metadata, theirs) = read_safetensors(old), read_safetensors(new)
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            return f"{name}: only in the {'old' if name in ours else 'new'} file"
        a, b = ours[name], theirs[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"{name}: {a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
        if a.data != b.data:
            return f"{name}: {_describe_values(a, b)}"
    difference = compare_values(flatten(old_metadata), flatten(new_metadata), ignored)
    return f"metadata, {difference}" if difference else "the tensors are equal, but their order in the file is not"


def _describe_values(old: StoredTensor, new: StoredTensor) -> str:
    """How many values of two tensors differ, and by how much at most."""
    import torch

    dtype = getattr(torch, DTYPES[old.dtype])
    a, b = (torch.frombuffer(bytearray(tensor.data), dtype=dtype) for tensor in (old, new))
    if not dtype.is_floating_point:
        return f"{int((a != b).sum()):,} of {a.numel():,} values differ"
    size = a.element_size()
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]  # -0 is not 0, NaN is NaN
    count, apart = int((a.view(as_bits) != b.view(as_bits)).sum()), (a.double() - b.double()).abs()
    most, largest = float(apart.nan_to_num(float("inf")).max()), float(a.double().abs().max())
    return f"{count:,} of {a.numel():,} values differ, by at most {most:.2g}; the old ones go up to {largest:.2g}"


READERS: dict[str, Callable[[Path, Path, list[str]], str | None]] = {
    ".jsonl": _compare_lines,
    ".json": _compare_json,
    ".safetensors": _compare_tensors,
}
