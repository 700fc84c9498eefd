"""The page of a run: its numbers are the files', all text stays text, and there is always a page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora.cli.exits import run
from qlora.cli.main import main
from qlora.report.answers import MOST_ROWS, choose_evenly, mark_changes, short_count, trace_samples
from qlora.report.page import list_tiles, render_report, span, write_report
from qlora.report.run import read_run
from qlora.system.errors import InputError
from tests.pages import BYTES, FACTS, Page, train_line, write_run, write_whole_run

HOSTILE = "</script><script>alert(1)</script> & <b title='x'>\"bold\"</b> {{ 7 * 7 }} \u202e\x00\ud800 end"
SEEN = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")  # those two cannot be in a page


def page_of(directory: Path) -> Page:
    return Page(write_report(directory).read_text("utf-8"))


def lines_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Loss per target token", "loss"),
        ("Learning rate", "learning_rate"),
        ("Gradient norm", "grad_norm"),
        ("Tokens per second", "tokens_per_second"),
    ],
)
def test_the_numbers_behind_the_curves_are_those_of_the_file(tmp_path: Path, title: str, name: str) -> None:
    page = page_of(write_whole_run(tmp_path))
    expected = [(line["step"], line[name]) for line in lines_of(tmp_path) if line.get("loss") is not None]
    shown = page.rows(title)
    assert len(shown) == len(expected) == 23
    for cells, (step, value) in zip(shown, expected, strict=True):
        assert int(cells[0]) == step and float(cells[1]) == pytest.approx(value, rel=1e-5)  # six digits


def test_evaluations_scores_lengths_and_memory(tmp_path: Path) -> None:
    page = page_of(write_whole_run(tmp_path))
    held_out = [line for line in lines_of(tmp_path) if "eval_loss" in line]
    assert [(int(a), float(b)) for a, b in page.rows("Loss per target token", 1)] == [
        (line["step"], pytest.approx(line["eval_loss"], rel=1e-5)) for line in held_out
    ]
    assert [(int(a), float(b)) for a, b in page.rows("Exact match")] == [(8, 0.25), (16, 0.5), (24, 0.75)]
    assert page.rows("Example length") == [["0", "50", "10"], ["50", "100", "70"], ["100", "150", "16"]]
    bars = next(rows for title, rows in page.tables if title.startswith("Memory"))
    assert [row[:2] for row in bars] == [
        ["base", "95.4 MiB"], ["adapters", "0.954 MiB"], ["gradients", "0.954 MiB"], ["optimizer", "3.81 MiB"],
        ["activations", "0.84 GiB"], ["planned total", "0.94 GiB"], ["measured peak", "1.27 GiB"],
    ]  # fmt: skip
    longest = max(sum(BYTES.values()) / 2**30, 1.274)
    widths = [float(a["style"].removeprefix("width: ").rstrip("%")) for tag, a in page.tags if tag == "i"]
    assert widths[0] == pytest.approx(100 * BYTES["base"] / 2**30 / longest, abs=0.01) and widths[-1] == 100


def test_what_matters_comes_first(tmp_path: Path) -> None:
    """Against sums over the lines of the file."""
    run_ = read_run(write_whole_run(tmp_path))
    lines = [line for line in lines_of(tmp_path) if line.get("loss") is not None]
    tiles = {tile.label: (tile.value, tile.note) for tile in list_tiles(run_)}
    assert tiles["Held-out loss"] == ("1.188", "lowest 1.188, step 24")
    assert tiles["exact match"] == ("0.75", "highest 0.75, step 24")
    assert tiles["Training loss"][0] == f"{(lines[-1]['loss'] + lines[-2]['loss']) / 2:.3f}"
    assert tiles["Steps"] == ("24", "of 24")
    assert tiles["Tokens"] == (f"{sum(x['num_tokens'] for x in lines) / 1000:.3g} k", "9,200 of them learned")
    seconds = sum(x["num_tokens"] / x["tokens_per_second"] for x in lines)
    assert tiles["Tokens/s"] == ("513", f"median; {seconds:.3g} s in steps")
    assert tiles["Peak memory"] == ("1.27 GiB", "0.94 GiB planned")
    assert tiles["Trained parameters"] == ("461 k", "0.343% of 135 M")
    page = page_of(tmp_path)
    assert "The held-out loss fell from 1.732 (step 8) to 1.188 (step 24)." in page.text
    assert "1 step was skipped" in page.text and "Exact match went from 0.25 to 0.75 (step 24)." in page.text


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0"), (9_999, "9,999"), (10_000, "10 k"), (460_800, "461 k"), (999_700, "1 M"), (4_194_304, "4.19 M"),
     (6_742_609_920, "6.74 B"), (1_234_567_890_123, "1,235 B")],
)  # fmt: skip
def test_counts_in_short(count: float, told: str) -> None:
    assert short_count(count) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.1234, "0.123 s"), (59.4, "59.4 s"), (59.7, "1 min 0 s"), (399.6, "6 min 40 s"), (7140, "1 h 59 min")],
)
def test_times_in_short(seconds: float, told: str) -> None:
    assert span(seconds) == told


def test_steps_to_come_follow_from_the_data(tmp_path: Path) -> None:
    """96 examples, 16 a step on each of 3 processes: 2 steps an epoch."""
    train = {"batch_size": 8, "grad_accum": 2, "epochs": 5}
    assert read_run(write_run(tmp_path, [], facts=FACTS | {"num_processes": 3}, train=train)).total_steps == 10
    assert read_run(write_run(tmp_path, [], facts=None, train=train)).total_steps is None


def test_a_rise_of_the_held_out_loss_is_said(tmp_path: Path) -> None:
    losses = [
        {"step": s, "eval_loss": loss, "stale_evaluations": s} for s, loss in ((0, 2.0), (5, 1.0), (10, 1.5))
    ]
    text = page_of(write_run(tmp_path, [train_line(10), *losses])).text
    assert "stale" not in text.lower()  # a count is no score
    assert (
        "fell from 2.000 (step 0) to 1.500 (step 10). Its lowest was 1.000 at step 5; it has risen since" in text
    )


def test_settings_origin_and_command(tmp_path: Path) -> None:
    """The settings that differ from their defaults come first, each with its default."""
    settings = {"lora": {"rank": 4}, "data": {"packing": False, "data": "d.jsonl"}, "train": {"of_tomorrow": 1}}
    page = page_of(write_run(tmp_path, [train_line(1)], **settings))
    assert page.rows("Settings") == [
        ["--rank", "4", "8"],
        ["--data", "d.jsonl", "—"],
        ["--packing", "off", "on"],
        ["--of-tomorrow", "1", "unknown"],
    ]
    others = dict(page.rows("Settings", 1))
    assert others["--alpha"] == "16.0" and others["--use-4bit"] == "on" and "--rank" not in others
    assert FACTS["command"] in page.text
    for key, value in FACTS["versions"].items():
        assert key in page.text and value in page.text
    for told in ("2 cores of a CPU", "2026-11-24 07:00", "12,345", "6,789"):
        assert told in page.text


def test_the_adapter_s_summary(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    write_run(tmp_path, [train_line(1)])
    assert "Variant" not in page_of(tmp_path).text.title()
    described = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 16.0,
        "use_dora": True,
        "target_modules": ["q_proj", "v_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    save_file({"a": torch.zeros(4, 30), "b": torch.zeros(30, 4)}, tmp_path / "adapter_model.safetensors")
    text = " ".join(page_of(tmp_path).text.split())
    assert "variant DoRA rank 4 alpha 16.0 target modules q_proj, v_proj saved 240 parameters in 2 tensors" in text
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    assert "adapter_model.safetensors cannot be read" in page_of(tmp_path).text


# ---- what comes from data -----------------------------------------------------------------------------------


def test_text_of_the_data_stays_text(tmp_path: Path) -> None:
    """Wherever a file of the run can bring text, a tag is shown and not obeyed."""
    sample = {"prompt": HOSTILE, "expected": HOSTILE}
    directory = write_run(
        tmp_path / "out <b>&",
        [train_line(1), train_line(2), {"step": 2, "eval_loss": 1.0, "<script>": 1.0, "a<b": 2}],
        [sample | {"step": 1, "completion": HOSTILE}, sample | {"step": 2, "completion": HOSTILE + "!"}],
        FACTS | {"command": HOSTILE, "device": HOSTILE, "versions": {HOSTILE: 1}, "memory_plan": {HOSTILE: 5}},
        model={"model": HOSTILE}, data={HOSTILE: HOSTILE},
    )  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({"r": HOSTILE, "base_model_name_or_path": HOSTILE}))
    page = page_of(directory)
    assert page.text.count(SEEN) == 14
    assert not {"script", "b", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert "out <b>&: run report" in page.text


def test_the_page_is_whole_and_needs_nothing(tmp_path: Path) -> None:
    """Elements end in order (Page checks), names are there once, references lead into the page."""
    page = page_of(write_whole_run(tmp_path))
    text = (tmp_path / "report.html").read_text("utf-8")
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names)) > 10
    for tag, attributes in page.tags:
        assert not any(key in ("src", "srcset") or key.startswith("on") for key in attributes), (tag, attributes)
        target = attributes.get("href", "#")
        assert target.startswith("#") or (tag, target) == ("link", "data:,")
        used = attributes.get("aria-labelledby", "").split() + re.findall(r"url\(#(.*?)\)", str(attributes))
        assert set(used + re.findall("^#(.+)", target)) <= set(names)
    assert "://" not in text and "@import" not in text and "url(" not in text.partition("</style>")[0]
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 7 and all(a["role"] == "img" and a["aria-label"] for a in drawings)
    loss = next(a["aria-label"] for a in drawings)
    assert loss.startswith("Loss by optimizer step: training 2.010 at step 1, ")
    assert "held out 1.732 at step 8, 1.188 at step 24" in loss


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    secret = "hf_" + "aB3" * 12
    samples = [{"step": 1, "prompt": f"my token is {secret}", "completion": secret, "expected": None}]
    write_run(tmp_path, [train_line(1)], samples, FACTS | {"command": f"HF_TOKEN={secret} python train.py"})
    text = write_report(tmp_path).read_text("utf-8")
    assert secret not in text and text.count("[redacted]") == 3


# ---- samples ------------------------------------------------------------------------------------------------


def test_samples_as_they_change(tmp_path: Path) -> None:
    page = page_of(write_whole_run(tmp_path))
    assert page.texts["said"] == [
        "How many?\nSay it.", "three red mugs", "I do not know.", "three blue mugs", "three red mugs"
    ]  # fmt: skip
    for step in ("step 0", "step 8", "steps 16 to 24 ✓ as expected"):
        assert f"\n{step}\n" in page.text
    assert page.text.count("✓") == 1
    prompts, _ = trace_samples(read_run(tmp_path).samples)
    assert [answer.parts for answer in prompts[0].answers] == [
        [("I do not know.", False)],
        [("three blue mugs", True)],
        [("three", False), (" ", False), ("red", True), (" mugs", False)],
    ]


@given(st.text("ab \n"), st.text("ab \n"))
def test_marked_answers_are_whole(before: str, now: str) -> None:
    parts = mark_changes(before, now)
    assert "".join(text for text, _ in parts) == now
    assert "".join(text for text, _ in mark_changes(None, now)) == now
    new = {word for text, is_new in parts if is_new for word in text.split()}
    assert set(now.split()) - set(before.split()) <= new
    if now == before:
        assert not new


def test_many_samples_are_thinned_and_counted() -> None:
    samples = [
        {"step": step, "prompt": f"p{number}", "completion": f"{step} " * 2000}
        for step in range(50)
        for number in range(30)
    ]
    prompts, number = trace_samples(samples)
    assert number == 30 and [p.text for p in prompts] == [f"p{n}" for n in range(12)]
    for prompt in prompts:
        assert len(prompt.answers) == 8 and prompt.left_out == 42 and prompt.expected is None
        assert (prompt.answers[0].steps, prompt.answers[-1].steps) == ("step 0", "step 49")
        assert all(answer.is_expected is None and len(str(answer.parts)) < 2000 for answer in prompt.answers)


def test_an_answer_given_again_after_resuming_counts_once() -> None:
    samples = [
        {"step": step, "prompt": "p", "completion": text} for step, text in ((5, "a"), (9, "lost"), (9, "b"))
    ]
    answers = trace_samples(samples)[0][0].answers
    assert [(a.steps, "".join(text for text, _ in a.parts)) for a in answers] == [("step 5", "a"), ("step 9", "b")]


def test_choosing_evenly() -> None:
    assert choose_evenly([1, 2, 3], 3) == [1, 2, 3] and choose_evenly(range(101), 5) == [0, 25, 50, 75, 100]


# ---- small, broken and long runs ----------------------------------------------------------------------------


def test_a_run_of_one_step(tmp_path: Path) -> None:
    """One point is no curve, and what was not measured is not claimed."""
    page = page_of(write_run(tmp_path, [train_line(1)], facts=None))
    assert "There was no evaluation on held-out data" in page.text and "2.010" in page.text
    assert not any(tag == "svg" for tag, _ in page.tags)
    assert not {"What the model says", "Skipped steps", "Command", "Where it ran"} & set(page.text.split("\n"))
    assert (
        "planned" not in page.texts["note"]
        and "of " not in page.texts["tiles"][0].split("Steps")[1].split("Tokens")[0]
    )


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ("", "No step has finished yet."),
        ('{"step": 0, "eval_loss": 2.5}\n', "The held-out loss is 2.500 (step 0); one evaluation shows no trend."),
        ('{"step": 0, "eval_loss": 2.5, "a": NaN, "b": 1e300, "c": "x", "d": 0.5}\n', "D is 0.5 (step 0)."),
        ('{"step": 1, "loss": null, "skipped": 1}\n', "No step has finished yet. 1 step was skipped"),
        (json.dumps(train_line(1)) + '\n{"step": 2, "lo', "There was no evaluation"),
        ('{"step": 1, "loss": NaN}\n{"step": "x"}\n[]\n{"step": -1, "loss": 1}\n\xff\n', "1 step was skipped"),
        (f'{{"step": 1, "loss": 1e999}}\n{json.dumps(train_line(2, grad_norm="x", num_tokens=None))}\n', "1 step"),
        (f"{json.dumps(train_line(1, tokens_per_second=0))}\n{json.dumps(train_line(2, loss=0))}", "2 of 2"),
        (f'{{"step": 1, "loss": {10**30}}}\n{{"step": {10**30}, "loss": 1}}\n', "1 step was skipped"),
        ('{"step": 1, "loss": 0.0}\n{"step": 2, "loss": 0.0}\n', "0.000"),
    ],
)  # fmt: skip
def test_what_there_is_is_shown(tmp_path: Path, metrics: str, told: str) -> None:
    write_run(tmp_path, train={"max_steps": 2})
    (tmp_path / "metrics.jsonl").write_bytes(metrics.encode("latin-1"))
    page = page_of(tmp_path)
    assert told in " ".join(page.text.split())


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"facts": 3, "train": [1]}',
        '{"facts": {"examples": 3, "memory_plan": {"base": "x"}}}',
        '{"facts": {"examples": {"lengths": {"edges": [2, 1], "counts": [1]}}, "versions": 3, "command": []}}',
        '{"facts": {"examples": {"lengths": {"edges": "ab", "counts": [1]}}}, "train": {"max_steps": "x"}}',
    ],
)
def test_a_broken_run_json_leaves_the_rest(tmp_path: Path, content: str) -> None:
    write_whole_run(tmp_path)
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "adapter_config.json").write_text(content)
    page = page_of(tmp_path)
    assert len(page.rows("Gradient norm")) == 23
    assert ("run.json" in page.text) == (content in ("", "[]", "{"))


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    """100,000 steps: a spike of one step is in the curve all the same."""
    write_run(tmp_path, facts=None)
    line = json.dumps(train_line(3) | {"step": "@", "loss": "@"}).replace('"@"', "{}")[1:-1]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            loss = 9.75 if step == 43_210 else 1 + step % 7 / 100
            file.write("{" + line.format(step, loss) + "}\n")
            if step % 100 == 0:
                file.write(f'{{"step": {step}, "eval_loss": {1 + step % 13 / 100}}}\n')
    text = write_report(tmp_path).read_text("utf-8")
    assert len(text) < 500_000
    page = Page(text)
    shown = page.rows("Loss per target token")
    assert len(shown) == MOST_ROWS == 100 and (shown[0][0], shown[-1][0]) == ("1", "100,000")
    assert f"Training, {MOST_ROWS} of 100,000 rows" in page.text and "100 of 1,000 rows" in page.text
    curve = next(a["d"] for tag, a in page.tags if tag == "path" and "var(--each)" in a.get("style", ""))
    heights = sorted(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", curve))
    assert len(heights) <= 600 and heights[1] - heights[0] > 10 * (heights[-1] - heights[1])


# ---- the command --------------------------------------------------------------------------------------------


def test_the_command_writes_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_whole_run(tmp_path / "out")
    page = tmp_path / "page.html"
    for _ in range(2):  # a page takes the place of a page
        assert run(main, ["report", str(tmp_path / "out"), "--output", str(page)]) == 0
        assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text().startswith("<!doctype html>") and page.read_text().rstrip().endswith("</html>")
    assert not (tmp_path / "out" / "report.html").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text("{}\n")
    for argv, told in (
        ([str(tmp_path / "none")], "is not a directory; pass the --output-dir of a run"),
        ([str(rows)], "is not a directory"),
        ([str(tmp_path)], "holds no run (no metrics.jsonl or run.json)"),
        ([str(write_whole_run(tmp_path / "out")), "--output", str(rows)], "exists and is not a report; remove it"),
        ([str(tmp_path / "out"), "--output", str(tmp_path)], "exists and is not a report"),
        ([str(tmp_path / "out"), "--output", str(tmp_path / "no" / "page.html")], "No such file or directory"),
    ):
        assert run(main, ["report", *argv]) == 2
        assert told in capsys.readouterr().err
    assert rows.read_text() == "{}\n"
    with pytest.raises(InputError):
        read_run(tmp_path)
    assert "<!doctype" in render_report(read_run(tmp_path / "out"))
