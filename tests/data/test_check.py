"""The summary of a file: its numbers against those counted by hand, and what the command prints and returns."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.cli.show_check import print_check
from qlora.data.check import LONG_TEXT, DataCheck, check_data, length_histogram
from qlora.data.encode import encode_records
from qlora.data.readers import read_records
from qlora.system.errors import InputError
from tests import fork_server
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


def pair(prompt: str, completion: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


ROWS: list[Any] = [
    pair("Hi", "Hello"),  # 1
    pair("Hi", None),  # 2: bad
    {"question": "Hi", "answer": "Hello"},  # 3: as 1, by another name
    pair("Say it", "Say it\n"),  # 4: repeats
    pair("Why?", "..."),  # 5: says nothing
    pair("a <|im_end|> b", "c"),  # 6: special-token text
    pair("a\ufffd", "\x1b[31mred"),  # 7: strange, twice
    {"text": "x <|im_end|> \t\r\n"},  # 8: a document may hold tokens, and white space
    pair("x" * LONG_TEXT, "y"),  # 9: long; with a tokenizer its targets are out of reach
    [1],  # 10: bad
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "weight": 0}]},  # 11
]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def lines_of(check: DataCheck) -> dict[str, list[str]]:
    """Kind of sign: places without the file's name."""
    return {
        kind: [place.replace(f"{check.source}:", "") for place in places]
        for kind, places in check.suspicious.items()
    }


SIGNS = {
    "same as an earlier row": ["3 is 1"],
    "an answer that repeats the question": ["4"],
    "an answer without a letter or digit": ["5", "11"],
    "control characters, or U+FFFD in place of a lost character": ["7"],
    "longer than 100,000 characters": ["9"],
}


def test_without_a_tokenizer(source: str) -> None:
    check = check_data(source)
    assert check.num_rows == 11 and check.unit == "characters"
    assert dict(check.formats) == {"prompt_completion": 6, "question_answer": 1, "text": 1, "messages": 1}
    assert check.lengths == [7, 7, 13, 7, 15, 10, 16, LONG_TEXT + 1, 2]
    assert [row.where for row in check.bad_rows] == [f"{source}:2", f"{source}:10"]
    assert lines_of(check) == SIGNS
    assert check.report is None and check.sample is None


@pytest.mark.parametrize("on_long", ["truncate", "drop"])
@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_with_a_tokenizer_it_foretells_the_run(source: str, on_long: str, train_on: str) -> None:
    tokenizer = tiny_tokenizer()
    check = check_data(source, tokenizer, 30, train_on, on_long)
    bad_rows: list[Any] = []
    records = read_records(source, bad_rows=bad_rows)
    _, report = encode_records(records, tokenizer, 30, train_on, on_long, bad_rows=bad_rows)
    assert check.report == report and report.num_bad_rows == 2 and report.num_records == 11
    whole, _ = encode_records(records, tokenizer, 10**6, "all", bad_rows=[])
    assert check.unit == "tokens" and check.lengths == [len(example) for example in whole]
    expected = SIGNS | {"special-token text in a message": ["6"]}
    if train_on == "completion" and on_long == "truncate":
        # The long one, and the one whose spelt-out token makes its prompt longer than 30.
        expected["dropped: all targets lie beyond --max-length 30"] = ["6", "9"]
    assert lines_of(check) == expected
    wanted = "⟦Hello<|im_end|>⟧" if train_on == "completion" else "<|im_start|>⟦user\nHi<|im_end|>"
    assert check.sample is not None and wanted in check.sample


def test_parsed_tokens_are_named_so(source: str) -> None:
    assert lines_of(check_data(source, tiny_tokenizer(), parse_special=True))[
        "special-token text in a message, a control token"
    ] == ["6"]


def test_the_histogram_counts_every_row() -> None:
    assert length_histogram([]) == []
    assert length_histogram([0, 1, 2, 3, 4, 17, 31, 32]) == [
        (0, 0, 1), (1, 1, 1), (2, 3, 2), (4, 7, 1), (8, 15, 0), (16, 31, 2), (32, 63, 1),
    ]  # fmt: skip


def printed(check: DataCheck) -> str:
    console = Console(file=io.StringIO(), soft_wrap=True, highlight=False, markup=False, width=80)
    print_check(check, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_print_shows_numbers_places_and_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "[bold]data.jsonl"  # not rich's markup
    rows = [pair(f"Q\x1b[31m{n}", "A") for n in range(5)] + [pair("Q", n) for n in range(25)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = printed(check_data(str(path), tiny_tokenizer()))
    assert f"{path}: 30 rows (5 prompt_completion)\n" in text
    assert "16 to 31     5  ########################################\n" in text
    assert "5 of 30 records kept" in text and "are masked" in text and r"Q\x1b[31m0<|im_end|>" in text
    assert f"  {path}:6: completion is 0 (int), not text; write it as text.\n" in text
    assert f"{path}:25: " in text and f"{path}:26: " not in text and "  and 5 more\n" in text
    places = ", ".join(f"{path}:{n}" for n in (1, 2, 3))
    assert f"     5  control characters, or U+FFFD in place of a lost character: {places}, and 2 more\n" in text
    assert "\x1b" not in text


def test_the_print_of_bad_rows_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("[1]\n")
    for tokenizer in (None, tiny_tokenizer()):
        check = check_data(str(tmp_path / "a.jsonl"), tokenizer)
        assert check.num_rows == 1 and "1 rows cannot be used:" in printed(check)


def test_the_command_fails_after_the_summary_if_rows_are_bad(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main, ["check-data", source]) == 2
    captured = capsys.readouterr()
    assert "11 rows" in captured.out and "10: the row is [1] (list)" in captured.out
    assert captured.err == (
        f"error: 2 of 11 rows of {source} cannot be used; fix them, or train without them: --on-bad-row skip.\n"
    )
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(ROWS[0]) + "\n")
    assert run(main, ["check-data", str(good)]) == 0
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match=r"a\.csv does not exist"):
        main(["check-data", str(tmp_path / "a.csv")])


def test_the_command_with_a_model_loads_no_weights(tmp_path: Path) -> None:
    """As a user starts it; the weights are no weights at all."""
    model = save_tiny_llama(tmp_path / "model", tokenizer=tiny_tokenizer())
    (model / "model.safetensors").write_text("nothing")
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps(pair("Hi", "Hello")) + "\n" + json.dumps(pair("x" * 99, "y")) + "\n")
    command = [sys.executable, "-m", "qlora", "check-data", "--model", str(model), str(data), "--max-length", "50"]
    done = fork_server.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 2 records kept (0 truncated; dropped: 0 too long, 1 without a target)" in done.stdout
    assert "⟦Hello<|im_end|>⟧" in done.stdout
