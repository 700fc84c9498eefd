"""Compile C files for this machine at first use, and cache the libraries."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from qlora.system.cache import cache_directory
from qlora.system.digests import content_digest
from qlora.system.files import make_directories, new_file
from qlora.system.wording import tell

FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC".split()
FLAGS += ["-Wfatal-errors"]  # a file that begins with #error is refused at once
DIGEST = ".xxh3"  # of the library, beside it


@cache
def compile_c(source: Path, *more_flags: str) -> ctypes.CDLL | None:
    """Load the library of a C file, compiling it once (about a second); None if no compiler accepts it.

    The compiler is $CC, else cc or gcc. The cache key covers file, compiler and processor type. A damaged library
    is compiled again, and at each start in a private directory where others may write to the cache.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        return None
    flags, processor = [*FLAGS, *more_flags], Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    features = next((line for line in lines if line.startswith("flags")), platform.processor())
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    identity = repr((source.read_text(), headers, compiler, flags, platform.machine(), features))
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"

    def make(target: Path) -> None:
        with new_file(target) as staging:
            subprocess.run([compiler, *flags, "-o", staging, source, "-lm"], check=True, capture_output=True)
            digest = content_digest(staging)
        with new_file(target.with_suffix(DIGEST)) as staging:
            staging.write_text(digest)

    target = cache_directory() / name
    try:
        make_directories(target.parent)
        if _is_writable_by_others(target):
            tell(f"others may write to {target} or its directories, so it is not loaded; it is compiled again")
            with tempfile.TemporaryDirectory() as private:  # once loaded, the file may go
                make(Path(private, name))
                return ctypes.CDLL(str(Path(private, name)))
        if not _is_whole(target):
            make(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None


def _is_whole(library: Path) -> bool:
    """Whether a library is as it was compiled. Loading a truncated one would end the process."""
    digest = library.with_suffix(DIGEST)
    return library.is_file() and digest.is_file() and digest.read_bytes() == content_digest(library).encode()


def _is_writable_by_others(library: Path) -> bool:
    """Whether anyone but this user and root could have put, or could replace, a library: loading runs its code.

    Asks the file and its digest, if present, and all directories above them. In one with the sticky bit, as /tmp,
    no one may rename what is another's.
    """
    if not hasattr(os, "getuid"):
        return False
    folder = Path(os.path.realpath(library.parent))
    for path in (library, library.with_suffix(DIGEST), folder, *folder.parents):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        is_shared = status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX)
        if status.st_uid not in (0, os.getuid()) or is_shared or stat.S_ISLNK(status.st_mode):
            return True
    return False
