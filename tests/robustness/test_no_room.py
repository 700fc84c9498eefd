"""No room for what is written outside checkpoints: one sentence, exit code 2, and nothing half is left.

A limit on the size of files stands for a full disk: the same writes fail, with "File too large".
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora.cli.exits import run
from tests.models import save_tiny_trio
from tests.tiny import tiny_tokenizer

LIMIT = 2000  # bytes


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_trio(tmp_path_factory.mktemp("room"), tiny_tokenizer())
    line = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "num_tokens": 9, "target_tokens": 9}
    lines = [{"step": n, **line, "tokens_per_second": 1.0, "peak_memory_gib": 1.0} for n in range(1, 9)]
    run_folder = folder / "run"
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"prompt": f"{n}?", "completion": "yes " * 40} for n in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@contextlib.contextmanager
def small_files(limit: int = LIMIT) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


COMMANDS = {
    "merge": "--model BASE --adapter ADAPTER --output-dir OUT/merged --no-drift",
    "merge 4bit": "--model BASE --adapter ADAPTER --output-dir OUT/merged --no-drift --save-4bit",
    "mix": "--adapters ADAPTER ADAPTER --output-dir OUT/mixed",
    "export": "--model MERGED --output OUT/model.gguf --pre-tokenizer qwen2",
    "generate": "--model BASE --prompt hi --max-new-tokens 1 --compute-dtype float32",
    "report": "RUN",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_one_sentence_and_nothing_half(
    trio: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    names = {"BASE": "base", "ADAPTER": "adapter", "MERGED": "merged", "RUN": "run"}
    text = COMMANDS[name].replace("OUT", str(tmp_path / "out"))
    for word, folder in names.items():
        text = text.replace(word, str(trio / folder))
    command = importlib.import_module(f"qlora.cli.commands.{name.partition(' ')[0]}")
    with small_files():
        code = run(command.main, text.split())
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and err[-1].startswith("error: ") and "File too large" in err[-1], (code, err)
    assert "Traceback" not in "".join(err)
    left = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    left += [
        path for path in (tmp_path / "cache").rglob("*") if path.stat().st_size == LIMIT or ".tmp" in path.name
    ]
    assert not left and not (trio / "run" / "report.html").exists()
    assert run(command.main, text.split()) == 0, capsys.readouterr().err  # and what is left is in no one's way
