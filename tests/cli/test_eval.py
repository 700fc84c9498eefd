"""qlora eval finds its own code: beside qlora/ in a checkout, never in the current directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.cli.commands import eval as evaluate
from qlora.system.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
from qlora.cli.commands.eval import main as evaluate
try:
    evaluate(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
import qlora.evaluation
print(qlora.evaluation.__file__)
print([name for name in ("eval", "torch", "scipy") if name in sys.modules])
"""


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    """A directory with an eval/ of its own."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("raise AssertionError('a stranger was imported')\n")
    return tmp_path


@pytest.mark.parametrize("arguments", [["--help"], ["perplexity", "--help"]], ids=" ".join)
def test_a_checkout_runs_its_own_evaluations(arguments: list[str], strangers: Path) -> None:
    """`-c` puts the current directory first on the path, as `python -m qlora` does."""
    shown = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=strangers, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    *page, file, imported = shown.stdout.splitlines()
    assert "usage: python -m qlora eval" in "\n".join(page)
    assert Path(file) == ROOT / "eval" / "__init__.py" and imported == "[]"


def test_missing_code_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "NAME", "qlora.not_here")
    monkeypatch.setattr(evaluate, "CHECKOUT", tmp_path)
    with pytest.raises(InputError, match=f"neither qlora.not_here nor {tmp_path} exists"):
        evaluate.find_evaluation()
