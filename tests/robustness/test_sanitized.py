"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no access out of bounds, nothing undefined.

Their own tests again, by GCC with both, as for this processor and as for one without AVX-512.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = [f"tests/kernels/test_{name}.py" for name in ("fused", "gemm", "rounding", "bounds")] + [
    "tests/test_generation.py"
]
# Tensors of two bytes are read by vectors and by pairs, wherever they begin.
FLAGS = "-O0 -g -fsanitize=address,undefined -fno-sanitize=alignment -fno-sanitize-recover=all"
MISTAKE = "int mistake(long n) { int x[4] = {0}; return x[n]; }"


def sanitizer_libraries() -> str | None:
    """What has to be loaded before anything else; None without GCC or its sanitizers."""
    gcc = shutil.which("gcc")
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [str(gcc), f"-print-file-name={name}"]
        path = subprocess.run(command, capture_output=True, text=True).stdout.strip() if gcc else ""
        found.append(path)
    return " ".join(found) if all(os.path.isabs(path) for path in found) else None


@pytest.fixture
def environment(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    libraries, processor = sanitizer_libraries(), Path("/proc/cpuinfo")
    if libraries is None:
        pytest.skip("no GCC with sanitizers")
    if request.param and not (processor.is_file() and "avx512f" in processor.read_text()):
        pytest.skip("compiled without AVX-512 anyway")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\nexec gcc "$@" {FLAGS} {request.param}\n')
    compiler.chmod(0o755)
    options = "detect_leaks=0:verify_asan_link_order=0:allocator_may_return_null=1"
    own = {"CC": str(compiler), "LD_PRELOAD": libraries, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | own
    if subprocess.run([sys.executable, "-c", "pass"], env=environment, capture_output=True).returncode:
        pytest.skip("the sanitizers do not start here")  # older ones do not under the newest kernels' settings
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("environment", ["", "-mno-avx512f"], indirect=True)
def test_kernels(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "no C compiler" not in done.stdout


@pytest.mark.parametrize("environment", [""], indirect=True)
def test_a_mistake_would_be_noticed(environment: dict[str, str], tmp_path: Path) -> None:
    """As the kernels are compiled and called: by `compile_c`, through ctypes."""
    source = tmp_path / "mistake.c"
    source.write_text(MISTAKE)
    code = (
        "import sys, pathlib, ctypes; from qlora.kernels.compile import compile_c;"
        "compile_c(pathlib.Path(sys.argv[1])).mistake(ctypes.c_long(int(sys.argv[2])))"
    )
    environment |= {"QLORA_CACHE": str(tmp_path)}
    for index, expected in (("3", ""), ("4", "out of bounds")):
        command = [sys.executable, "-c", code, str(source), index]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert expected in done.stderr and (done.returncode == 0) == (not expected), done.stderr
