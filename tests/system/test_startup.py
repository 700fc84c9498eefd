"""What a run imports, and what is held back meanwhile."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.system.startup import collection_paused, compile_later, importing_bitsandbytes
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def python(*argv: str) -> str:
    result = subprocess.run([sys.executable, *argv], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_bitsandbytes_loads_no_compiler() -> None:
    """`import bitsandbytes` by itself loads inductor; if it stops doing so, compile_later can go."""
    held_back = (
        "from qlora.system.startup import importing_bitsandbytes as block\nwith block(): import bitsandbytes"
    )
    for line, loads in (("import bitsandbytes", True), (held_back, False)):
        code = f"{line}\nimport sys; print('torch._inductor.compile_fx' in sys.modules)"
        assert python("-c", code) == f"{loads}\n", line


def test_everything_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile and a package `kernels` that was imported before, also where the import fails."""
    kernels, compile_now = object(), torch.compile
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    with pytest.raises(ImportError, match="no bitsandbytes"), importing_bitsandbytes():
        assert sys.modules["kernels"] is None and torch.compile is not compile_now
        raise ImportError("no bitsandbytes")
    assert sys.modules["kernels"] is kernels and torch.compile is compile_now
    monkeypatch.delitem(sys.modules, "kernels")
    with importing_bitsandbytes():
        pass
    assert "kernels" not in sys.modules


@pytest.mark.parametrize("options", [{}, {"dynamic": False}])
def test_compile_later(options: dict[str, Any]) -> None:
    """Compiled once, at the first call, with the options given; the compiled function's results."""
    compiled: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def compile_now(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append((function, options))
        return lambda *args, **kwargs: ("compiled", function(*args, **kwargs))

    def divide(a: int, b: int) -> float:
        return a / b

    decorate: Any = partial(compile_later, compile_now)
    later = decorate(**options)(divide) if options else decorate(divide)
    assert later.__name__ == "divide" and compiled == []
    assert [later(6, b=3), later(1, 2)] == [("compiled", 2.0), ("compiled", 0.5)]
    assert compiled == [(divide, options)]


def test_collection_is_paused_at_the_start_of_a_process() -> None:
    """What is made inside is frozen, also where an import fails; once torch is there, nothing changes."""
    code = """
import gc, sys
from qlora.system.startup import collection_paused
try:
    with collection_paused():
        made = [[] for _ in range(1000)]
        inside = gc.isenabled()
        raise ImportError
except ImportError:
    print(inside, gc.isenabled(), gc.get_freeze_count() > 1000)
gc.disable()
with collection_paused():
    pass
print(gc.isenabled())
"""
    assert python("-c", code).split() == ["False", "True", "True", "False"]
    frozen = gc.get_freeze_count()
    with collection_paused():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_a_run_imports_no_more_than_it_needs(tmp_path: Path) -> None:
    """A step of training, from the data to the first line of metrics, on the modules, not on a clock."""
    model, data = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer()), tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n")
    code = f"""
import sys, train
from qlora.training.display import Display
names = "datasets peft scipy sklearn pandas pyarrow matplotlib gguf qlora.merge qlora.generate"
show = Display.show
def stop(self, line):
    show(self, line)
    print("imported:", *(name for name in names.split() if name in sys.modules))
Display.show = stop
train.main(["--model", {str(model)!r}, "--data", {str(data)!r}, "--output-dir", {str(tmp_path / "out")!r},
            "--max-steps", "1", "--no-cache"])
"""
    lines = python("-c", code).splitlines()
    assert [line for line in lines if line.startswith("imported:")] == ["imported:"]


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=["none", "spin count", "wait policy"],
)
def test_threads_do_not_spin_for_long(
    monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str], expected: str
) -> None:
    """Unless the user says otherwise; read by libgomp when torch is imported. A notebook's environment stays."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    code = """
import os, sys, qlora
before = dict(os.environ)
from qlora.cli.exits import run
assert os.environ == before
run(lambda argv: print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules), [])
"""
    assert python("-c", code) == f"{expected} False\n"
