"""kernels/compile.py: only code that no one else could have written is loaded, and only whole."""

from __future__ import annotations

import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.kernels import gemm
from qlora.kernels.compile import FLAGS, compile_c

SOURCE = "int answer(void) { return 42; }"
pytestmark = pytest.mark.skipif(shutil.which("cc") is None or not hasattr(os, "getuid"), reason="no C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "answer.c"
    file.write_text(SOURCE)
    return file


def answer(source: Path) -> int:
    """In a new process: one that has loaded a library of this name gets the same again."""
    code = (
        "import sys, pathlib; from qlora.kernels.compile import compile_c as c; f = c(pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", f"{code}; print(f.answer())", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sys.stderr.write(done.stderr)
    return int(done.stdout)


def fake(source: Path, folder: Path) -> Path:
    """A harmless library that answers otherwise."""
    other = folder / "other.c"
    other.write_text(SOURCE.replace("42", "13"))
    assert answer(other) == 13
    return next((folder / "cache").glob("other-*.so"))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_it_is_compiled_once_and_private(source: Path, cache: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert answer(source) == 42
        (library,) = cache.glob("*.so")
        made = library.stat().st_mtime_ns
        assert answer(source) == 42 and library.stat().st_mtime_ns == made
    finally:
        os.umask(before)
    for path in (cache, *cache.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("damage", ["truncated", "empty", "no symbols", "no digest"])
def test_a_damaged_library_is_made_again(source: Path, cache: Path, tmp_path: Path, damage: str) -> None:
    """Truncated it ended the process at every start, empty it meant the slow versions for ever."""
    assert answer(source) == 42
    (library,) = cache.glob("answer-*.so")
    whole = library.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "empty": b"", "no digest": whole}
    put(library, content.get(damage) if damage in content else fake(source, tmp_path).read_bytes())
    if damage == "no digest":
        library.with_suffix(".xxh3").unlink()
    assert answer(source) == 42 and library.read_bytes() == whole
    again = library.stat().st_mtime_ns
    assert answer(source) == 42 and library.stat().st_mtime_ns == again


def put(file: Path, content: bytes | None) -> None:
    """Replace a file: this process has the old one mapped."""
    assert content is not None
    file.unlink()
    file.write_bytes(content)
    file.chmod(0o600)


def replace(library: Path, by: Path) -> None:
    """The other library under this name, with a digest that fits."""
    for suffix in (".so", ".xxh3"):
        put(library.with_suffix(suffix), by.with_suffix(suffix).read_bytes())


@pytest.mark.parametrize("how", ["directory", "file", "link", "parent"])
def test_what_others_may_write_is_not_loaded(
    source: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    assert answer(source) == 42
    (library,) = cache.glob("answer-*.so")
    foreign = fake(source, tmp_path)
    replace(library, foreign)
    if how == "link":
        library.unlink()
        library.symlink_to(foreign)
    else:
        writable = {"directory": cache, "file": library, "parent": cache.parent}[how]
        writable.chmod(0o777 if writable.is_dir() else 0o666)
    capsys.readouterr()
    assert answer(source) == 42
    said = capsys.readouterr().err
    assert "compiled again" in said and str(cache) in said


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="only root can give files away")
def test_another_users_library_is_not_loaded(source: Path, cache: Path, tmp_path: Path) -> None:
    assert answer(source) == 42
    (library,) = cache.glob("answer-*.so")
    replace(library, fake(source, tmp_path))
    assert answer(source) == 13  # it is loaded where only this user could have put it
    os.chown(library, 12345, 12345)
    assert answer(source) == 42


def test_a_sticky_parent_is_good(source: Path, cache: Path) -> None:
    """As /tmp, where no one may rename what is another's."""
    cache.mkdir(mode=0o700)
    cache.parent.chmod(0o1777)
    assert answer(source) == 42 and list(cache.glob("answer-*.so"))


def test_a_compiler_that_fails(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for compiler in ("false", "true"):
        monkeypatch.setenv("CC", shutil.which(compiler) or compiler)
        assert compile_c.__wrapped__(source) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its flags are an x86-64 compiler's")
def test_a_kernel_that_is_not_for_this_processor_is_refused_at_once(tmp_path: Path) -> None:
    """Each start on AVX2 spent half a second on the errors after the first."""
    command = ["cc", *FLAGS, "-mno-avx512f", "-o", str(tmp_path / "gemm.so"), str(gemm.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("error:") == 1 and "AVX2 only" in done.stderr
