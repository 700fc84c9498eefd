"""Sources that are not ordinary files are refused in one true sentence, and none is read twice by another name."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora.data.conversations import to_messages
from qlora.data.dataset import find_sources
from qlora.data.readers import identify_source, read_records
from qlora.data.rows import BadRow
from qlora.system.errors import InputError


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe(tmp_path: Path) -> None:
    """check-data waited for it, and train took it for a dataset on the hub."""
    os.mkfifo(tmp_path / "rows.jsonl")
    for function in (read_records, identify_source):
        with pytest.raises(InputError, match=r"rows.jsonl is a pipe or a device"):
            function(str(tmp_path / "rows.jsonl"))


ROWS = b'{"text": "a"}\n{"text": "\xc3\xa9"}\n'


@pytest.mark.parametrize(("suffix", "compression"), [(".gz", "gzip"), (".zst", "zstd")])
def test_compressed_lines(tmp_path: Path, suffix: str, compression: str) -> None:
    """Read as the file that was compressed; cut off or damaged, one sentence."""
    file = tmp_path / f"rows.jsonl{suffix}"
    with pyarrow.output_stream(str(file), compression=compression) as stream:
        stream.write(ROWS * 500)
    records = read_records(str(file))
    assert [record.fields["text"] for record in records] == ["a", "é"] * 500
    assert records[-1].origin == f"{file}:1000"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"not compressed at all" * 9):
        file.write_bytes(content)
        with pytest.raises(InputError, match=rf"not readable as {compression}|column|empty|no records"):
            read_records(str(file))


@pytest.mark.parametrize("name", ["rows.jsonl.XZ", "rows.csv.gz", "rows.zip"])
def test_another_compressed_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(ROWS))
    with pytest.raises(InputError, match=r"is compressed; only .jsonl.gz and .jsonl.zst are read: decompress it"):
        read_records(str(tmp_path / name))


def test_a_directory_of_parts(tmp_path: Path) -> None:
    """As Spark and others write it; what is of two kinds is no such directory."""
    for number in (2, 1):
        pyarrow.parquet.write_table(pyarrow.table({"text": [f"{number}"]}), tmp_path / f"part-{number}.parquet")
    for name in ("_SUCCESS", ".part-1.parquet.crc"):
        (tmp_path / name).touch()
    found = find_sources(str(tmp_path), [2.0])
    assert found == [(f"{tmp_path}/part-{number}.parquet", 2.0) for number in (1, 2)]
    (tmp_path / "more.jsonl").write_bytes(ROWS)
    assert find_sources(str(tmp_path)) == [(str(tmp_path), 1.0)]
    with pytest.raises(InputError, match=rf"without files of one kind; .* several as '{tmp_path}/\*\.parquet'"):
        read_records(str(tmp_path))


def test_parquet_values_that_python_cannot_hold(tmp_path: Path) -> None:
    """In columns that are not used they refused the whole file; they are noted as any other such column."""
    far = pyarrow.array([10**17, None], pyarrow.int64()).cast(pyarrow.timestamp("ms"))
    table = {"text": ["a", "b"], "far": far, "took": pyarrow.array([1, 2], pyarrow.duration("ns"))}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    records, notes = read_records(str(tmp_path / "a.parquet")), list[tuple[str, str]]()
    for record in records:
        assert to_messages(record, lambda *note: notes.append(note))[0]["content"] in ("a", "b")
    assert notes.count(("columns not used", "far")) == 1 and notes.count(("columns not used", "took")) == 2
    pyarrow.parquet.write_table(pyarrow.table({"text": far}), tmp_path / "b.parquet")
    with pytest.raises(BadRow, match=r"text is <timestamp\[ms\]> \(Unreadable\), not text"):
        to_messages(read_records(str(tmp_path / "b.parquet"))[0])


@pytest.mark.parametrize("how", ["link", "hard link", "dots"])
def test_the_same_file_by_another_name(tmp_path: Path, how: str) -> None:
    """It was trained on twice."""
    file, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text('{"text": "a"}\n')
    link.symlink_to(file) if how == "link" else link.hardlink_to(file)
    other = link if "link" in how else tmp_path / ".." / tmp_path.name / "a.jsonl"
    with pytest.raises(InputError, match=rf"names {other} twice, the first time as {file}; give it a weight"):
        find_sources([str(file), str(other)])
    assert len(find_sources([str(file), "owner/name"])) == 2
