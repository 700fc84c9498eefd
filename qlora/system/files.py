"""Write files and directories atomically: to a temporary name, synced to disk, then renamed.

Also read files of unknown origin: arbitrary JSON, and file names in it that must not leave their directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

from qlora.system.cache import is_in_cache
from qlora.system.errors import InputError
from qlora.system.memory import is_out_of_memory
from qlora.system.wording import explain, tell

PATIENCE = 2.0  # seconds to wait for another process without a word
MACHINES = 10**5  # told apart in the name of an unfinished file
JSON_LIMIT = 32 * 2**20  # bytes; the index of the largest model is less than half of that


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a path to write; on success it replaces `target`, on an error nothing changes."""
    staging = target.with_name(f".{target.name}.{_writer()}.tmp")
    _remove_dead(target)
    try:
        with _named(target):
            yield staging
            _settle(staging)
        os.replace(staging, target)
        _sync(target.parent)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Name `target` in the error of a full disk: a write names no file, and safetensors' error is no OSError."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(target)
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if type(error).__name__ != "SafetensorError" or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error


def make_directories(path: Path) -> None:
    """Make a directory and those above it; private ones in the cache, whatever the umask."""
    for missing in reversed([folder for folder in (path, *path.parents) if not folder.exists()]):
        missing.mkdir(mode=0o700 if is_in_cache(missing) else 0o777, exist_ok=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; on success it becomes `target`.

    If `target` exists already (another process was faster), it stays.
    """
    make_directories(target.parent)
    staging = target.with_name(f".{target.name}.{_writer()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    _remove_dead(target)
    staging.mkdir(mode=0o700 if is_in_cache(target) else 0o777)
    try:
        with _named(target):
            yield staging
            publish_directory(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_directory(staging: Path, target: Path) -> None:
    """Sync a filled directory to disk, and let it become `target`, unless that exists."""
    for file in staging.rglob("*"):
        _settle(file)
    try:
        os.rename(staging, target)
    except OSError:
        if not target.is_dir():
            raise
    _sync(target.parent)


def _writer() -> int:
    """This process and, since disks are shared, its machine, in one number."""
    return os.getpid() * MACHINES + zlib.crc32(platform.node().encode()) % MACHINES


def _remove_dead(target: Path) -> None:
    """Remove what killed processes of this machine left of `target`: as large as a model, and hidden."""
    leftover = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.tmp")
    names = (
        [name for name in os.listdir(target.parent) if leftover.fullmatch(name)] if target.parent.is_dir() else []
    )
    for name in names:
        from psutil import pid_exists

        process, machine = divmod(int(leftover.fullmatch(name)[1]), MACHINES)  # type: ignore[index]
        if machine == _writer() % MACHINES and not pid_exists(process):
            _remove(target.with_name(name))


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove unfinished files that killed processes left in a folder.

    Call only while holding the lock: unfinished files of a running process look the same.

    Args:
        name: final name of the file or directory; None = any.
    """
    wanted = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.\d+(\.old)?\.tmp")
    for left in list(folder.iterdir()) if folder.is_dir() else ():
        if wanted.fullmatch(left.name):
            _remove(left)


@contextmanager
def only_writer(target: Path) -> Iterator[bool]:
    """Wait until no other process writes `target`, and say so; yields True if it still does not exist.

    Unfinished files of killed processes are removed.
    """
    with locked(target) as lock:
        remove_leftovers(target.parent, target.name)
        yield not target.exists()
        lock.unlink(missing_ok=True)  # waiting processes find `target`; after an error the file stays for the next


@contextmanager
def locked(target: Path) -> Iterator[Path]:
    """Hold TARGET.lock, and say so while another process holds it; yields its path."""
    from filelock import FileLock, Timeout

    lock = target.with_name(f"{target.name}.lock")
    mutex = FileLock(lock, mode=0o600 if is_in_cache(target) else -1)
    try:
        mutex.acquire(timeout=PATIENCE)
    except Timeout:
        tell(f"another process is writing {target}; waiting for it")
        mutex.acquire()
    try:
        yield lock
    finally:
        mutex.release()


def _settle(path: Path) -> None:
    """Sync a file to disk, with ordinary permissions (safetensors' are private), or private ones in the cache."""
    if path.is_file():
        umask = os.umask(
            0o077
        )  # can only be read by setting it; a file that another thread creates now is private
        os.umask(umask)
        path.chmod(0o600 if is_in_cache(path) else 0o666 & ~umask)
    elif is_in_cache(path):
        path.chmod(0o700)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, remedy: str, unique_keys: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        remedy: what the error tells the user to do.
        unique_keys: raise if a key occurs twice instead of taking its last value.
    Raises:
        InputError: the file cannot be read, is too large, nested too deeply, or is not a JSON object.
    """

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if unique_keys and name in content:
                raise InputError(f"{path} has the key {name[:60]!r} twice; {remedy}.")
            content[name] = value
        return content

    try:
        with open(path, "rb") as file:
            text = file.read(JSON_LIMIT + 1)
        if len(text) > JSON_LIMIT:
            raise InputError(f"{path} is larger than {JSON_LIMIT // 2**20} MiB, the limit; {remedy}.")
        content = json.loads(text.decode("utf-8"), object_pairs_hook=build)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors
        raise InputError(f"{path} is not readable JSON ({explain(error)}); {remedy}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object; {remedy}.")
    return content


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one per line, without an incomplete last line; [] if there is no file."""
    lines = []
    for text in path.read_text("utf-8", "replace").split("\n") if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def read_tensors(path: Path, remedy: str) -> dict[str, Any]:
    """Read all tensors of a safetensors file into memory.

    Args:
        remedy: what the error tells the user to do.
    Raises:
        InputError: the file cannot be read or is not a complete safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    # TypeError and RuntimeError: shapes that safetensors accepts and torch cannot create.
    except (SafetensorError, OSError, TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{path} is not a complete safetensors file ({explain(error)}); {remedy}.") from error


def is_file_name(name: object) -> bool:
    """Whether a name read from a file is a plain file name: no folder, no "..", nothing unprintable."""
    if not isinstance(name, str) or name in ("", "..") or len(name) > 255 or not name.isprintable():
        return False
    return PureWindowsPath(name).name == name  # "\\" and "C:" count too, on any system


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while piece := handle.read(2**20):
            digest.update(piece)
    return digest.hexdigest()
