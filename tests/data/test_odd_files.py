"""Sources that are not ordinary files are refused in one true sentence, and none is read twice by another name."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from qlora.data.dataset import find_sources
from qlora.data.readers import identify_source, read_records
from qlora.system.errors import InputError


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe(tmp_path: Path) -> None:
    """check-data waited for it, and train took it for a dataset on the hub."""
    os.mkfifo(tmp_path / "rows.jsonl")
    for function in (read_records, identify_source):
        with pytest.raises(InputError, match=r"rows.jsonl is a pipe or a device"):
            function(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".XZ"])
def test_a_compressed_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"rows.jsonl{suffix}"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(InputError, match=r"rows.jsonl\.\w+ is compressed; decompress it first"):
        read_records(str(file))


def test_a_directory_of_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"several as '{tmp_path}/\*\.parquet'"):
        read_records(str(tmp_path))


@pytest.mark.parametrize("how", ["link", "dots"])
def test_the_same_file_by_another_name(tmp_path: Path, how: str) -> None:
    """It was trained on twice."""
    file, link = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    file.write_text('{"text": "a"}\n')
    link.symlink_to(file)
    other = link if how == "link" else tmp_path / ".." / tmp_path.name / "a.jsonl"
    with pytest.raises(InputError, match=rf"names {other} twice, the first time as {file}; give it a weight"):
        find_sources([str(file), str(other)])
    assert len(find_sources([str(file), "owner/name"])) == 2
