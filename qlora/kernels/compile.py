"""Compile C files for this machine at first use, and cache the libraries."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

from qlora.system.cache import cache_directory
from qlora.system.files import new_file

FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC".split()


@cache
def compile_c(source: Path, *more_flags: str) -> ctypes.CDLL | None:
    """Load the library of a C file, compiling it once (about a second); None if no compiler accepts it.

    The compiler is $CC, else cc or gcc. The cache key covers file, compiler and processor type.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        return None
    flags, processor = [*FLAGS, *more_flags], Path("/proc/cpuinfo")
    lines = processor.read_text().splitlines() if processor.is_file() else []
    features = next((line for line in lines if line.startswith("flags")), platform.processor())
    headers = [header.read_text() for header in sorted(source.parent.glob("*.h"))]
    identity = repr((source.read_text(), headers, compiler, flags, platform.machine(), features))
    target = cache_directory() / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    try:
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with new_file(target) as staging:
                subprocess.run([compiler, *flags, "-o", staging, source, "-lm"], check=True, capture_output=True)
                staging.chmod(staging.stat().st_mode & 0o666)  # a library needs no execute permission
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None
