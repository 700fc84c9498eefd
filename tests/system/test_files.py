"""system/files.py: whole or absent, with the permissions of an ordinary file; and JSON that may hold anything."""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.system import digests
from qlora.system.errors import InputError
from qlora.system.files import JSON_LIMIT, new_directory, new_file, read_json, remove_leftovers
from qlora.system.wording import explain


@pytest.fixture(params=[0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[str, str]:
    """Every file below `directory`, hidden ones too: nothing temporary may stay."""
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


# ---- one file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [True, False])
def test_new_file_appears_whole(tmp_path: Path, existing: bool) -> None:
    """The target keeps its old text until the block ends, then has the new one, and nothing else is there."""
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")
    with new_file(target) as staging:
        staging.write_text("new")
        assert target.exists() == existing
        assert not existing or target.read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("existing", [True, False])
def test_new_file_error_changes_nothing(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "a.txt"
    if existing:
        target.write_text("old")
    with pytest.raises(RuntimeError, match="midway"), new_file(target) as staging:
        staging.write_text("half")
        raise RuntimeError("midway")
    assert contents(tmp_path) == ({"a.txt": "old"} if existing else {})


def test_new_file_that_was_never_written(tmp_path: Path) -> None:
    """A block that forgets to write is an error, not an empty file; the old one stays."""
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), new_file(target):
        pass
    assert contents(tmp_path) == {"a.txt": "old"}


def test_new_file_permissions(tmp_path: Path, umask: int) -> None:
    """safetensors makes its files private (0600); others in the group could not read the adapter."""
    with new_file(tmp_path / "a") as staging:
        staging.touch(mode=0o600)
    assert permissions(tmp_path / "a") == 0o666 & ~umask


# ---- a directory ------------------------------------------------------------------------------------------


def test_new_directory_appears_whole(tmp_path: Path) -> None:
    """Parents are made, folders inside travel, and the target is absent until the block ends."""
    target = tmp_path / "parent" / "model"
    with new_directory(target) as staging:
        (staging / "inner").mkdir()
        (staging / "inner" / "b").write_text("2")
        (staging / "a").write_text("1")
        assert not target.exists()
    assert contents(tmp_path) == {"parent/model/a": "1", "parent/model/inner/b": "2"}
    assert [p.name for p in (tmp_path / "parent").iterdir()] == ["model"]


def test_new_directory_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="midway"), new_directory(tmp_path / "model") as staging:
        (staging / "a").write_text("half")
        raise RuntimeError("midway")
    assert list(tmp_path.iterdir()) == []


def test_new_directory_is_not_entered_after_an_interrupt(tmp_path: Path) -> None:
    """Ctrl-C is no Exception; it must clean up all the same."""
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "model") as staging:
        (staging / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_stays(tmp_path: Path) -> None:
    """Another process was first: its result is as good, and nobody's is mixed with another's."""
    target = tmp_path / "model"
    with new_directory(target) as staging:
        (staging / "a").write_text("ours")
        target.mkdir()
        (target / "a").write_text("theirs")
    assert contents(tmp_path) == {"model/a": "theirs"}


def test_file_in_the_way_is_an_error(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("a file")
    with pytest.raises(OSError), new_directory(target) as staging:
        (staging / "a").write_text("1")
    assert contents(tmp_path) == {"model": "a file"}


def test_new_directory_forgets_a_killed_attempt(tmp_path: Path) -> None:
    """What a process of the same number left behind does not end up in the result."""
    with new_directory(tmp_path / "model") as staging:
        leftover = staging
    leftover.mkdir()
    (leftover / "stale").write_text("stale")
    with new_directory(tmp_path / "model2") as staging:
        (staging / "a").write_text("1")
    stale = leftover.with_name(leftover.name.replace(".model.", ".model3."))
    leftover.rename(stale)
    with new_directory(tmp_path / "model3") as staging:
        assert staging == stale
        (staging / "a").write_text("1")
    assert contents(tmp_path) == {"model2/a": "1", "model3/a": "1"}


def test_leftovers_are_those_of_one_name(tmp_path: Path) -> None:
    """`merged` and `merged.1` may be written at the same time, and a dot stands for itself."""
    left = {".merged.17.tmp", ".a.b.17.tmp", ".merged.17.old.tmp"}
    others = {".merged.1.17.tmp", ".merged.tmp", "merged.17.tmp", ".lock", ".axb.17.tmp"}
    for name in left | others:
        (tmp_path / name).mkdir()
    (tmp_path / ".merged.17.tmp" / "weights").touch()
    remove_leftovers(tmp_path, "merged")
    remove_leftovers(tmp_path, "a.b")
    assert {path.name for path in tmp_path.iterdir()} == others
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".merged.tmp", "merged.17.tmp", ".lock"}
    remove_leftovers(tmp_path / "nowhere")


def test_new_directory_permissions(tmp_path: Path, umask: int) -> None:
    with new_directory(tmp_path / "model") as staging:
        (staging / "inner").mkdir()
        for file in (staging / "a", staging / "inner" / "b"):
            file.touch(mode=0o600)
    assert permissions(tmp_path / "model") == permissions(tmp_path / "model" / "inner") == 0o777 & ~umask
    assert permissions(tmp_path / "model" / "a") == 0o666 & ~umask
    assert permissions(tmp_path / "model" / "inner" / "b") == 0o666 & ~umask


def test_reading_the_umask_keeps_it(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can only be read by setting it; what another thread creates meanwhile must not be open to all."""
    set_to, real = [], os.umask

    def record(value: int) -> int:
        set_to.append(value)
        return real(value)

    monkeypatch.setattr(os, "umask", record)
    with new_file(tmp_path / "a") as staging:
        staging.write_text("1")
    monkeypatch.undo()
    assert set_to and all(value & 0o077 == 0o077 or value == umask for value in set_to)
    assert os.umask(umask) == umask


# ---- JSON of others ---------------------------------------------------------------------------------------


def test_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": {"b": [1, 2.5, null]}, "ä": "\\u00e4", "c": 1, "c": 2}', encoding="utf-8")
    assert read_json(file, "mend it") == {"a": {"b": [1, 2.5, None]}, "ä": "ä", "c": 2}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"), (b"{", "Expecting property name"), (b"[1]", "not a JSON object"),
        (b'"a"', "not a JSON object"), (b"null", "not a JSON object"), (b'{"a": "\xff"}', "can't decode"),
        (b"[" * 10**6, "recursion"), (b'{"a": ' + b"1" * 10**5 + b"}", "digits"), (b"{} x", "Extra data"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice"),
    ],
)  # fmt: skip
def test_json_that_is_none(tmp_path: Path, content: bytes, reason: str) -> None:
    """File, reason and remedy in one sentence."""
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"{tmp_path}/a\.json .*{reason}.*; mend it\.$") as raised:
        read_json(tmp_path / "a.json", "mend it", unique_keys=True)
    assert str(raised.value).isprintable()


def test_json_up_to_the_limit(tmp_path: Path) -> None:
    for length, is_read in ((JSON_LIMIT, True), (JSON_LIMIT + 1, False)):
        (tmp_path / "a.json").write_bytes(b'{"a": "' + b"x" * (length - 9) + b'"}')
        assert (tmp_path / "a.json").stat().st_size == length
        if is_read:
            assert len(read_json(tmp_path / "a.json", "")["a"]) == length - 9
        else:
            with pytest.raises(InputError, match="larger than 32 MiB"):
                read_json(tmp_path / "a.json", "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("a"), "a"), (ValueError("first.\nsecond"), "first"), (ValueError(), "ValueError"),
        (ValueError("\n  "), "ValueError"), (ValueError("field:\n  wrong\nmore"), "field: wrong"),
        (ValueError("\x1b[2J\ta\0"), "?[2J a?"), (ValueError("x" * 999), "x" * 300),
    ],
)  # fmt: skip
def test_what_an_error_says(error: Exception, text: str) -> None:
    assert explain(error) == text


def test_who_waits_says_for_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from filelock import FileLock

    from qlora.system import files

    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with ThreadPoolExecutor(1) as thread:
        with FileLock(tmp_path / "base.lock"):
            waiting = thread.submit(lambda: files.only_writer(tmp_path / "base").__enter__())
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
        assert waiting.result(timeout=10) is True
    assert capsys.readouterr().err == f"another process is writing {tmp_path / 'base'}; waiting for it\n"


@pytest.mark.parametrize("kind", ["new_file", "new_directory"])
def test_what_a_killed_process_left_goes_with_the_next_try(tmp_path: Path, kind: str) -> None:
    """A killed export left a hidden model each time. What a running process writes stays."""
    from qlora.system import files

    code = (
        f"import sys, pathlib; from qlora.system.files import {kind} as new\n"
        f"with new(pathlib.Path(sys.argv[1])) as path:\n"
        f"    (path if '{kind}' == 'new_file' else path / 'part').write_text('half')\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    target, pipe = tmp_path / "model", subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        (left,) = tmp_path.glob(".model.*.tmp")
        assert left.name.startswith(f".model.{process.pid}")
        with contextlib.suppress(InterruptedError), getattr(files, kind)(target):
            assert left.exists()
            raise InterruptedError
        assert left.exists()
        process.kill()
    assert left.exists() and not target.exists()
    number = int(left.name.split(".")[2])
    elsewhere = left.with_name(f".model.{number - 1 if number % files.MACHINES else number + 1}.tmp")
    elsewhere.touch()  # of another machine that writes to the same disk: whether it runs cannot be known here
    with contextlib.suppress(InterruptedError), getattr(files, kind)(target):
        raise InterruptedError
    assert list(tmp_path.iterdir()) == [elsewhere]


def test_a_directory_is_verified_once_and_again_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base split over processes was read twice at each start, to be loaded and to be compared."""
    read: list[str] = []
    whole = digests.content_digest
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "a").write_bytes(b"1234")
    digests.write_digests(directory)
    monkeypatch.setattr(digests, "content_digest", lambda file: [read.append(file.name), whole(file)][1])
    assert digests.is_whole(directory) and digests.is_whole(directory) and read == ["a"]
    status = (directory / "a").stat()
    time.sleep(0.03)
    (directory / "a").write_bytes(b"1235")
    os.utime(directory / "a", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not digests.is_whole(directory) and not digests.is_whole(directory) and read == ["a"] * 3
    assert not digests.is_whole(tmp_path / "absent")
