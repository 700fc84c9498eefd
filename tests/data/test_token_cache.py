"""Rows on disk against the same rows in memory: content, order, damage, and the memory that reading them takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora.data.token_cache as token_store
from qlora.data.example import IGNORE_INDEX, EncodeReport, Example
from qlora.data.rows import BadRow
from qlora.data.token_cache import FILES, TOKENS, TokenWriter, read_store, token_cache, write_store
from qlora.system.errors import InputError
from qlora.training.fingerprint import data_fingerprint
from tests import fork_server
from tests.shortcuts import load_examples
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer


def example(length: int, number: int = 0) -> Example:
    generator = torch.Generator().manual_seed(number)
    ids, masked = torch.randint(5, 200_000, (length + 1,), generator=generator), torch.rand(length) < 0.5
    return Example(ids[:-1], ids[1:].masked_fill(masked, IGNORE_INDEX), f"é.jsonl:{number}")


def filler(examples: list[Example], bad_rows: list[BadRow] | None = None) -> Callable[[TokenWriter], Any]:
    def fill(writer: TokenWriter) -> tuple[EncodeReport, list[BadRow]]:
        for row in examples:
            writer.add(row)
        return EncodeReport(num_records=len(examples), num_tokens=7), bad_rows or []

    return fill


def content(examples: Any) -> list[tuple[list[int], list[int], str]]:
    return [(e.input_ids.tolist(), e.targets.tolist(), e.origin) for e in examples]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_every_row_comes_back(lengths: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    """From memory and from disk, whole and by number."""
    examples = [example(length, number) for number, length in enumerate(lengths)]
    directory = tmp_path_factory.mktemp("store") / "store"
    stores = [write_store(filler(examples), where) for where in (None, directory)]
    again = read_store(directory)
    assert again is not None
    for store in (*stores, again):
        assert len(store) == len(examples) and content(store) == content(examples)
        assert [len(e) for e in examples] == store.lengths.tolist()
        assert [e.num_targets for e in examples] == store.target_counts.tolist()
        assert data_fingerprint(store) == data_fingerprint(examples)
        assert content(store[1:3]) == content(examples[1:3])
        for number in (-1, len(examples) - 1):
            assert content([store[number]]) == content([examples[number]])
        with pytest.raises(IndexError):
            store[len(examples)]
    assert stores[0][0].input_ids.dtype == stores[1][0].targets.dtype == torch.int64


def test_report_and_bad_rows_come_back(tmp_path: Path) -> None:
    bad_rows = [BadRow("a:1", "text is null."), BadRow("a:7", "é\n.")]
    write_store(filler([example(3)], bad_rows), tmp_path / "store")
    store = read_store(tmp_path / "store")
    assert store is not None and store.report == EncodeReport(num_records=1, num_tokens=7)
    assert [(row.where, row.problem) for row in store.bad_rows] == [(row.where, row.problem) for row in bad_rows]


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_any_flipped_byte_and_any_lost_end_is_seen(tmp_path: Path) -> None:
    """Never other rows: none at all, so that they are made anew; and never an exception."""
    directory = tmp_path / "store"
    write_store(filler([example(5, number) for number in range(4)]), directory)
    whole = {file.name: file.read_bytes() for file in directory.iterdir()}
    assert sorted(whole) == sorted([*FILES, "report.json"]) and read_store(directory) is not None
    for name in FILES:
        for place in np.linspace(0, len(whole[name]) - 1, 20).astype(int):
            flip(directory / name, place)
            assert read_store(directory) is None
            (directory / name).write_bytes(whole[name][:place])
            assert read_store(directory) is None
            (directory / name).write_bytes(whole[name])
        (directory / name).unlink()
        assert read_store(directory) is None
        (directory / name).write_bytes(whole[name])
    for text in ("", "{}", "[]", '{"size": 1}', whole["report.json"].decode()[:-5]):
        (directory / "report.json").write_text(text)
        assert read_store(directory) is None
    assert read_store(tmp_path / "absent") is None


# ---- the cache ----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return token_cache()


ROWS_OF_TEXT = [{"prompt": f"Question {i}", "completion": f"Answer {i}"} for i in range(30)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """30 good rows and 2 bad ones, the first of all and the last."""
    lines = ['{"prompt": "Q", "completion": null}', *map(json.dumps, ROWS_OF_TEXT), '{"prompt": "cut of']
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path / "data.jsonl"


def load(source: Path, tokenizer: Any = None, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    settings: dict[str, Any] = {"max_length": 64, "on_bad_row": "skip", "cache": True} | options
    examples, _ = load_examples(str(source), tokenizer or tiny_tokenizer(), say=said.append, **settings)
    return examples, said


def stores_in(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.is_dir()}


def test_the_second_start_reads_what_the_first_one_wrote(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "bad_rows.jsonl"
    plain, first_said = load(source, cache=False, bad_rows_file=listed)
    list_of_first, found = listed.read_text(), [plain]
    assert not cache.exists() and "30 of 32 records kept" in first_said[0]
    for how in ("tokenized in", "read from the token cache in"):
        listed.unlink()
        examples, said = load(source, bad_rows_file=listed)
        assert how in said[0] and said[0].partition(how)[0] == first_said[0].partition("tokenized in")[0]
        assert listed.read_text() == list_of_first and list_of_first.count("\n") == 2
        found.append(examples)
        monkeypatch.setattr("qlora.data.dataset.stream_records", lambda *_, **__: pytest.fail("read again"))
    assert content(found[0]) == content(found[1]) == content(found[2])
    assert len({data_fingerprint(examples) for examples in found}) == 1
    with pytest.raises(BadRow, match=f"^{source}:1: completion is null"):
        load(source, on_bad_row="stop")  # as from the file


def test_whatever_changes_the_rows_makes_them_anew(cache: Path, source: Path) -> None:
    other = tiny_tokenizer()
    other.chat_template = CHATML_TEMPLATE.replace("<|im_start|>", "<s><|im_start|>")
    grown = tiny_tokenizer()
    grown.add_tokens(["Question"])
    for number, (tokenizer, options) in enumerate(
        [
            (None, {}), (other, {}), (grown, {}), (None, {"max_length": 63}), (None, {"train_on": "all"}),
            (None, {"on_long": "drop"}), (None, {"parse_special": True}),
            (None, {"columns": {"prompt": "completion", "completion": "prompt"}}),
        ],
        start=1,
    ):  # fmt: skip
        for how in ("tokenized", "read from the token cache"):
            _, said = load(source, tokenizer, **options)
            assert how in said[0] and len(stores_in(cache)) == number
    _, said = load(source, num_workers=2)
    assert "read from the token cache" in said[0]  # what changes no row is no part of the key
    status = source.stat()
    source.write_text(source.read_text().replace("Answer 7", "Answer 8"))
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` would: same size, same time
    _, said = load(source)
    assert "tokenized" in said[0] and len(stores_in(cache)) == number + 1


def test_other_code_makes_the_rows_anew(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(source)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    assert "tokenized" in load(source)[1][0] and len(stores_in(cache)) == 2


def test_a_damaged_store_is_made_anew(cache: Path, source: Path) -> None:
    expected = content(load(source)[0])
    (store,) = stores_in(cache)
    flip(store / TOKENS, 1000)
    (cache / f".{store.name}.99999.tmp").mkdir()  # left half written by a killed process
    examples, said = load(source)
    assert "tokenized" in said[0] and content(examples) == expected
    assert "read from the token cache" in load(source)[1][0]
    assert stores_in(cache) == {store}


def test_the_least_recently_used_go_first(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for max_length in (60, 61, 62):
        load(source, max_length=max_length)
        for store in stores_in(cache):  # times far enough apart for any file system
            status = store.stat()
            os.utime(store, (status.st_atime - 100, status.st_mtime - 100))
    load(source, max_length=60)  # used again, so 61 is the oldest
    size = sum(file.stat().st_size for store in stores_in(cache) for file in store.iterdir())
    monkeypatch.setattr(token_store, "MAX_CACHE", size + 10)
    load(source, max_length=63)
    assert len(stores_in(cache)) == 3
    for max_length, how in ((60, "cache"), (62, "cache"), (63, "cache"), (61, "tokenized")):
        assert how in load(source, max_length=max_length)[1][0]
    monkeypatch.setattr(token_store, "MAX_CACHE", 1)
    load(source, max_length=64)
    assert len(stores_in(cache)) == 1 and "cache" in load(source, max_length=64)[1][0]


def test_a_cache_that_cannot_be_written_costs_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    examples, said = load(source)
    assert "cannot be written" in said[0] and "keeping tokens in memory" in said[0]
    assert content(examples) == content(load(source, cache=False)[0])


def test_a_full_disk_in_the_middle(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing half written is left, and the rows come from memory, bad ones counted once."""
    monkeypatch.setattr(
        token_store, "publish_directory", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    examples, said = load(source)
    assert "No space left" in said[0] and "30 of 32 records kept" in said[1] and len(examples) == 30
    assert stores_in(cache) == set()


def test_an_unusable_source_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="All 1 records are bad"):
        load(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"absent\.jsonl does not exist"):
        load(tmp_path / "absent.jsonl")
    assert stores_in(cache) == set()


def test_processes_that_start_together_tokenize_once(cache: Path, source: Path) -> None:
    code = (
        "import sys; from tests.data.test_token_cache import load; from pathlib import Path\n"
        "examples, said = load(Path(sys.argv[1])); print(len(examples), said[0])"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(source)]
    runs = [fork_server.Program(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate()[0] for run in runs)
    assert all(line.startswith("30 ") for line in said)
    assert sum("; tokenized" in line for line in said) == sum("read from the token cache" in s for s in said) == 1


# ---- memory -------------------------------------------------------------------------------------------------

# Limits what the process may allocate (files that are mapped do not count), loads, and reads every row.
LOAD_WITHIN = """
import resource, sys
from tests.data.test_token_cache import load
from tests.tiny import tiny_tokenizer
from pathlib import Path
small, large, allowance, cache = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "cache"
load(small, cache=cache, max_length=2048)[0][0]  # what the libraries allocate once
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + allowance, -1))
for _ in range(2):
    examples, said = load(large, cache=cache, max_length=2048)
    print(len(examples), sum(int(example.input_ids.sum()) for example in examples), said[0])
"""


def test_memory_stays_while_the_data_grows(cache: Path, tmp_path: Path) -> None:
    """20 MB of rows, 32 MB of tokens, and 12 MB to do it in; in memory it must fail, or the limit says nothing."""
    ids = [5 + number % 200 for number in range(2000)]
    line = json.dumps({"input_ids": ids}) + "\n"
    (tmp_path / "small.jsonl").write_text(line)
    with open(tmp_path / "large.jsonl", "w") as file:
        for _ in range(2000):
            file.write(line)
    size = (tmp_path / "large.jsonl").stat().st_size
    allowance = 12 * 10**6
    assert size > 1.3 * allowance
    root = Path(__file__).parents[2]
    command = [
        sys.executable,
        "-c",
        LOAD_WITHIN,
        tmp_path / "small.jsonl",
        tmp_path / "large.jsonl",
        str(allowance),
    ]
    environment = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1")

    def start(where: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, where], cwd=root, env=environment, capture_output=True, text=True)

    run = start("cache")
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert "tokenized" in first and "read from the token cache" in second
    assert all(line.startswith(f"2000 {2000 * sum(ids[:-1])} ") for line in (first, second))
    (store,) = (path for path in stores_in(cache) if (path / TOKENS).stat().st_size > size)
    assert (store / TOKENS).stat().st_size > 2 * allowance
    assert start("memory").returncode != 0


# ---- continued ----------------------------------------------------------------------------------------------


def interrupted(source: Path, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize until so many rows are written and saved, and then be killed."""
    add, count = TokenWriter.add, [0]

    def counted(self: TokenWriter, row: Example) -> None:
        if count[0] == after:
            raise KeyboardInterrupt
        count[0] += 1
        add(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "SAVE_SECONDS", 0.0)
        patch.setattr(TokenWriter, "add", counted)
        with pytest.raises(KeyboardInterrupt):
            load(source)


def files_of(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_interrupted_tokenizing_goes_on_where_it_stopped(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed three times, with half a row after what was saved: the same bytes, and no row encoded twice."""
    expected, said = load(source)
    (store,) = stores_in(cache)
    whole = files_of(store)
    token_store.shutil.rmtree(store)
    for after in (7, 5, 3):
        interrupted(source, after, monkeypatch)
        (part,) = stores_in(cache)
        with (part / TOKENS).open("ab") as file:
            file.write(b"half a row")
        (part / ".progress.json.99.tmp").touch()
    added: list[str] = []
    add = TokenWriter.add
    monkeypatch.setattr(TokenWriter, "add", lambda self, row: [added.append(row.origin), add(self, row)])
    again, said_again = load(source)
    assert stores_in(cache) == {store} and files_of(store) == whole
    assert content(again) == content(expected) and len(added) == 30 - 15
    assert said_again[0].partition("tokenized in")[0] == said[0].partition("tokenized in")[0]


@pytest.mark.parametrize("name", [*FILES, token_store.PROGRESS])
def test_a_damaged_part_is_begun_anew(
    cache: Path, source: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(source)
    (store,) = stores_in(cache)
    whole = files_of(store)
    token_store.shutil.rmtree(store)
    interrupted(source, 20, monkeypatch)
    (part,) = stores_in(cache)
    flip(part / name, 15)
    load(source)
    assert files_of(store) == whole


def test_bad_rows_of_an_interrupted_start_stop_the_next_one(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, 20, monkeypatch)
    with pytest.raises(BadRow, match=f"^{source}:1: completion is null"):
        load(source, on_bad_row="stop")
    load(source)
    assert len(stores_in(cache)) == 1


def test_old_parts_make_room_but_not_one_that_is_being_made(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, 20, monkeypatch)
    (part,) = stores_in(cache)
    monkeypatch.setattr(token_store, "MAX_CACHE", 0)
    with token_store.locked(cache / part.name.removeprefix(".").removesuffix(".part")):
        load(source, max_length=40)
        assert part.is_dir()
    load(source, max_length=41)
    assert not part.exists()
