"""The command `qlora` from outside: its name, its version, and what happens where nobody reads on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import qlora
from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.cli.program import program

ROOT = Path(__file__).resolve().parents[2]
PRINT = "import sys; from qlora.cli.exits import run; sys.exit(run(lambda argv: print('line\\n' * {}), []))"
LONG, SHORT = PRINT.format(10**6), PRINT.format(1)  # more, and less, than is buffered


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"qlora {qlora.__version__}\n"


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/usr/local/bin/qlora", "qlora"),
        ("qlora.exe", "qlora"),
        (str(ROOT / "qlora" / "__main__.py"), "python -m qlora"),
        ("-c", "python -m qlora"),
    ],
)
def test_help_shows_how_it_was_started(
    started: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert (program(), program("merge")) == (name, f"{name} merge")
    main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} COMMAND")
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {name} merge")


@pytest.mark.parametrize(
    "arguments",
    [["-c", LONG], ["-c", SHORT], ["-m", "qlora", "--help"], ["-m", "qlora", "merge", "--help"]],
    ids=["long", "short", "list", "help"],
)
def test_a_closed_pipe_ends_quietly(arguments: list[str]) -> None:
    """The reader is gone before anything is written; a short text would be noticed by Python at its very end."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_argv: Sequence[str]) -> None:
        raise BrokenPipeError("a socket was closed")

    assert run(fail, []) == 2 and capsys.readouterr().err == "error: a socket was closed\n"
