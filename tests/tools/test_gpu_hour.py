"""The parts of the hour on a GPU, run on a CPU and a tiny shape, so that no slip costs time there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models import tiny_llama_config
from tools import gpu_hour


def test_parts_write_their_lines_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape, page = tmp_path / "shape", tmp_path / "gpu.md"
    shape.mkdir()
    (shape / "config.json").write_text(json.dumps(tiny_llama_config(intermediate_size=128).to_dict()))
    page.write_text("# Kept\n")
    arguments = ["--device", "cpu", "--shape", str(shape), "--lengths", "32,64", "--page", str(page)]
    for _ in range(2):  # the second replaces the first
        assert gpu_hour.main([*arguments, "--parts", "speed,losses,decoding"]) == 0, capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("# Kept\n") and text.count("<!-- speed -->") == 1
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith(("| 32 |", "| 64 |"))]
    assert len(rows) == 2 and all(float(row[1].replace(",", "")) > 0 for row in rows)
    assert "in bf16" in text and "| 16 |" in text


def test_a_failed_part_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: gpu_hour.Job) -> list[str]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_hour, "PARTS", {"speed": fail, "losses": lambda job: ["done"]})
    page = tmp_path / "gpu.md"
    assert gpu_hour.main(["--device", "cpu", "--page", str(page), "--parts", "speed,losses"]) == 1
    assert "speed failed: RuntimeError: no kernel image" in page.read_text() and "done" in page.read_text()


def test_a_machine_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_hour.main(["--parts", "sped"])
    assert error.value.code == 2 and "no part 'sped'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "gpu.md is about GPUs; pass --page FILE"),
        (["--device", "cpu", "--page", "x.md", "--lengths", "2048,many"], "invalid whole_numbers value"),
        (["--device", "cpu", "--page", "x.md", "--shape", "nowhere"], "--shape nowhere has no config.json"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        gpu_hour.main(arguments)
    assert error.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
