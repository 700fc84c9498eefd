"""From Python: the run of the command line, whatever holds the rows; errors that can be caught; no traces."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import psutil
import pytest
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from torch.nn.parameter import is_lazy

import qlora
from qlora.cli.commands.generate import main as answer
from qlora.cli.commands.train import main as train_by_flags
from qlora.planning.planner import Planner
from qlora.training.observer import Observer
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

ROWS = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(16)]
HELD_OUT = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(20, 24)]
SETTINGS: dict[str, Any] = dict(max_steps=4, batch_size=4, max_length=64, rank=4, compute_dtype="float32")
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
TIMING = ("tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("base"), tokenizer=tiny_tokenizer()))


@pytest.fixture(scope="module")
def by_flags(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of the command line on the rows in files."""
    folder = tmp_path_factory.mktemp("by-flags")
    for name, rows in (("train", ROWS), ("test", HELD_OUT)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--data", str(folder / "train.jsonl"), "--eval-data", str(folder / "test.jsonl"), "--eval-every", "2"]
    train_by_flags(["--model", base, *files, "--output-dir", str(folder / "out"), *FLAGS])
    return folder / "out"


@pytest.fixture
def train(base: str, tmp_path: Path) -> Any:
    def call(**settings: Any) -> Any:
        return qlora.train(**{"model": base, "data": ROWS, "output_dir": tmp_path / "out"} | SETTINGS | settings)

    return call


def adapter(directory: Path) -> bytes:
    return (directory / "adapter_model.safetensors").read_bytes()


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMING} for line in lines]


@pytest.mark.parametrize("kind", [list, pandas.DataFrame, Dataset.from_list, "path", "sources"])
def test_any_kind_of_data_trains_the_adapter_of_the_command_line(train: Any, by_flags: Path, kind: Any) -> None:
    data, held_out = ROWS, HELD_OUT
    if kind == "path":
        data, held_out = by_flags.parent / "train.jsonl", by_flags.parent / "test.jsonl"  # type: ignore[assignment]
    elif kind == "sources":
        data = [pandas.DataFrame(ROWS[:5]), ROWS[5:9], Dataset.from_list(ROWS[9:])]  # type: ignore[list-item]
    else:
        data, held_out = kind(data), kind(held_out)
    run = train(data=data, eval_data=held_out, eval_every=2)
    assert adapter(run.adapter_dir) == adapter(by_flags)
    expected = [json.loads(line) for line in (by_flags / "metrics.jsonl").read_text().splitlines()]
    assert timeless(run.metrics) == timeless(expected) and len(run.metrics) == 7 and run.stopped is None
    settings = [
        json.loads((out / "checkpoints/step-000004/state.json").read_text()) for out in (run.adapter_dir, by_flags)
    ]
    assert settings[0]["settings"] == settings[1]["settings"]


def test_what_a_run_leaves(train: Any, by_flags: Path, base: str, tmp_path: Path, capsys: Any) -> None:
    run = train(eval_data=HELD_OUT, eval_every=2)
    found = json.loads((run.adapter_dir / "run.json").read_text())
    call = "qlora.train(model='BASE', data=..., output_dir='OUT', max_steps=4,"
    assert found["facts"]["command"].startswith(call.replace("BASE", base).replace("OUT", str(run.adapter_dir)))
    assert (found["data"]["data"], found["data"]["eval_data"], found["lora"]["rank"]) == ("data", "eval_data", 4)
    assert repr(run).startswith(f"<Run in {run.adapter_dir}: 4 steps, loss ") and not run.model.training

    evaluation = run.evaluate(HELD_OUT)
    assert evaluation == run.evaluate() == run.evaluate(by_flags.parent / "test.jsonl")
    last = [line["eval_loss"] for line in run.metrics if "eval_loss" in line][-1]
    assert evaluation.loss == pytest.approx(last, rel=1e-6) and evaluation.num_examples == len(HELD_OUT)
    assert (
        evaluation.perplexity == pytest.approx(np.exp(last)) and 0 < evaluation.num_targets < evaluation.num_tokens
    )

    frame = run.metrics.to_pandas()
    assert frame["loss"].dropna().tolist() == [line["loss"] for line in run.metrics if "loss" in line]
    figure = run.plot()
    assert isinstance(figure, Figure) and len(figure.axes[0].lines) == 3

    capsys.readouterr()
    answer(["--model", base, "--adapter", str(run.adapter_dir), "--prompt", "3 + 1", "--compute-dtype", "float32",
            "--max-new-tokens", "8"])  # fmt: skip
    printed = capsys.readouterr().out.strip()
    assert run.generate("3 + 1", max_new_tokens=8) == printed
    turns = [{"role": "user", "content": "3 + 1"}]
    assert run.generate(turns, max_new_tokens=8) == printed
    assert run.generate(["3 + 1", turns], max_new_tokens=8) == [printed, printed]
    raw = run.generate("3 + 1", max_new_tokens=8, raw=True)
    assert run.generate(["3 + 1", "3 + 1"], max_new_tokens=8, raw=True) == [raw, raw]
    with pytest.raises(qlora.InputError, match="raw continues texts"):
        run.generate(turns, raw=True)
    drawn = [run.generate("3 + 1", max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    drift = run.merge(tmp_path / "merged")
    assert drift is not None and (tmp_path / "merged/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"learnin_rate": 1e-3}, "unknown setting 'learnin_rate'; did you mean learning_rate?"),
        ({"xyzzy": 1}, "unknown setting 'xyzzy'; known keys: adalora_end, "),
        ({"rank": 0}, "rank is 0; give --rank"),
        ({"rank": "eight"}, "rank is 'eight'; give --rank"),
        ({"schedule": "triangle"}, "schedule is 'triangle'; choose one of cosine"),
        ({"eval_every": 2}, "--eval-every needs held-out data"),
        ({"data": 7}, "data is of type int; give a path, a list of dicts"),
        ({"data": []}, "data has no records"),
        ({"data": "missing.jsonl"}, "missing.jsonl does not exist"),
        ({"data": None}, "Nothing to do; pass --data FILE to train"),
        ({"data": [*ROWS, "oops"]}, "data[16]: the row is 'oops' (str); write an object"),
        ({"data": [*ROWS, {"a": 1}]}, "data[16]: unknown columns ['a']; rename them to one of"),
        ({"data": [ROWS, [{"prompt": "a", "completion": None}]]}, "data[1][0]: completion is null, not text"),
        ({"eval_data": [{"text": 1}]}, "eval_data[0]: text is 1 (int), not text"),
        ({"eval_data": 7}, "eval_data is of type int; give a path, a list of dicts"),
        ({"model": None}, "No model given"),
        ({"prompt": "hello"}, "prompt is for the command line"),
        ({"config": "demo.yaml"}, "config is of type str; give a RunConfig"),
        ({"report_to": "nothing"}, "report_to names 'nothing'"),
    ],
)
def test_wrong_input_is_an_input_error(train: Any, settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(qlora.InputError) as raised:
        train(**settings)
    assert str(raised.value).startswith(problem)


def test_after_an_error_the_same_directory_can_be_used(train: Any, tmp_path: Path) -> None:
    with pytest.raises(qlora.InputError, match="unknown columns"):
        train(data=[{"a": 1}])
    run = train(data=[*ROWS, {"a": 1}], on_bad_row="skip", max_steps=1)
    bad = json.loads((run.adapter_dir / "bad_rows.jsonl").read_text())
    assert bad["where"] == "data[16]" and "unknown columns" in bad["problem"]
    with pytest.raises(qlora.InputError, match="holds another run"):
        train()
    for call, problem in (
        (lambda: run.generate(""), "prompt is empty"),
        (lambda: run.generate([]), "prompt is empty"),
        (lambda: run.generate("a", top_k=3), "generate has no option 'top_k'; it has max_new_tokens, temperature"),
        (lambda: run.generate("a", temperature=-1), "temperature is -1.0; give --temperature"),
        (lambda: run.evaluate(), "Nothing was held out from this run"),
        (lambda: run.evaluate([]), "data has no records"),
        (lambda: run.merge(run.adapter_dir), "exists already"),
        (lambda: run.merge("new", save_4bits=True), "unknown setting 'save_4bits'; did you mean save_4bit"),
        (lambda: run.merge("new", base="other"), "base is 'other'; choose one of auto, dequantized, original"),
    ):
        with pytest.raises(qlora.InputError) as raised:
            call()
        assert problem in str(raised.value)


def test_a_config_gives_the_settings_and_keywords_change_a_copy(base: str, by_flags: Path, tmp_path: Path) -> None:
    config = qlora.RunConfig()
    config.model.model, config.data.max_length, config.lora.rank = base, 64, 4
    config.model.compute_dtype, config.loop.max_steps, config.loop.batch_size = "float32", 4, 8
    config.data.data = [str(by_flags.parent / "train.jsonl")]
    before = repr(config)
    run = qlora.train(config, batch_size=4, output_dir=str(tmp_path / "out"))
    assert adapter(run.adapter_dir) == adapter(by_flags) and repr(config) == before
    assert run.config.loop.batch_size == 4


class Stopper(Observer):
    """Gives a reason to stop after some steps; or raises a signal there, more than once."""

    def __init__(self, step: int, number: int | None = None, times: int = 1) -> None:
        self.step, self.number, self.times, self.lines = step, number, times, list[dict[str, Any]]()

    def after_step(self, trainer: Any, line: dict[str, Any]) -> None:
        self.lines.append(line)
        for _ in range(self.times if line["step"] == self.step and self.number is not None else 0):
            signal.raise_signal(self.number)  # type: ignore[arg-type]

    def before_step(self, trainer: Any) -> str | None:
        return "enough" if self.number is None and trainer.progress.step == self.step else None


def test_an_observer_watches_and_stops_a_run_that_goes_on_later(train: Any, by_flags: Path) -> None:
    watcher = Stopper(2)
    run = train(observers=[watcher])
    assert run.stopped is not None and "stopped after step 2 of 4 (enough)" in run.stopped
    assert watcher.lines == run.metrics and len(watcher.lines) == 2 and "stopped after step 2" in repr(run)
    assert run.generate("3 + 1", max_new_tokens=2) is not None
    again = train(resume="auto")
    assert again.stopped is None and adapter(again.adapter_dir) == adapter(by_flags)
    changed = [ROWS[0] | {"completion": "2"}, *ROWS[1:]]
    with pytest.raises(qlora.InputError, match="the training data "):
        train(resume="auto", data=changed)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own; a process in the background may have been started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("is_prompt", [False, True])
def test_ctrl_c_saves_and_returns_at_a_prompt_and_ends_a_script(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_prompt: bool
) -> None:
    monkeypatch.delattr(sys, "ps1", raising=False)
    if is_prompt:
        monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
        run = train(observers=[Stopper(2, signal.SIGINT)])
        assert "stopped after step 2 of 4 (SIGINT)" in run.stopped and len(run.metrics) == 2
    else:
        with pytest.raises(KeyboardInterrupt):
            train(observers=[Stopper(2, signal.SIGINT)])
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-000002"]
    assert train(resume="auto").metrics[-1]["step"] == 4


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_has_its_usual_effect_at_once(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.system.signals.SAME_REQUEST_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(observers=[Stopper(2, signal.SIGINT, times=2)])
    assert train(resume="auto").metrics[-1]["step"] == 4  # nothing holds the directory


def test_a_sigterm_reaches_the_program_after_all_is_saved(train: Any, tmp_path: Path) -> None:
    saved: list[bool] = []
    before = signal.signal(
        signal.SIGTERM, lambda *_: saved.append((tmp_path / "out/checkpoints/step-000002/state.json").is_file())
    )
    try:
        run = train(observers=[Stopper(2, signal.SIGTERM)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert saved == [True] and "SIGTERM" in run.stopped


def test_an_error_of_an_observer_is_the_user_s_to_catch(train: Any) -> None:
    class Faulty(Observer):
        def after_step(self, trainer: Any, line: dict[str, Any]) -> None:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        train(observers=[Faulty()])


def traces() -> dict[str, Any]:
    """What a run could leave behind in a process."""
    gc.collect()
    return {
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": sorted(file.path for file in psutil.Process().open_files()),
        "children": [process.pid for process in psutil.Process().children()],
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "temporary": sorted(os.listdir(tempfile.gettempdir())),
        "collected": gc.isenabled(),
        "gradients": torch.is_grad_enabled(),
    }


def test_a_second_run_works_and_neither_leaves_a_trace(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run of all may leave what libraries keep for good; from then on nothing is added."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    models, seen, sizes, results = [], [], [], []
    for number in range(4):
        run = train(output_dir=str(tmp_path / f"{number}"), eval_data=HELD_OUT, eval_every=2, token_cache=False)
        models.append(weakref.ref(run.model))
        results.append((adapter(run.adapter_dir), timeless(run.metrics)))
        del run
        seen.append(traces())
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        sizes.append(sum(t.numel() for t in tensors if not is_lazy(t)))  # another test may have left a lazy one
        del tensors
    assert all(result == results[0] for result in results)
    assert all(model() is None for model in models)
    assert seen[1] == seen[2] == seen[3] and seen[0]["signals"] == seen[1]["signals"]
    assert sizes[1] == sizes[2] == sizes[3]


def test_a_run_that_is_held_keeps_no_optimizer(train: Any) -> None:
    class Peek(Observer):
        def before_step(self, trainer: Any) -> None:
            self.seen = [weakref.ref(trainer), weakref.ref(trainer.optimizer)]

    peek = Peek()
    run = train(observers=[peek], max_steps=1)
    assert [seen() for seen in peek.seen] == [None, None] and run.model is not None
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_rows_are_tokenized_once(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    said = []
    for number, rows in enumerate([ROWS, list(ROWS), [*ROWS[1:], {"prompt": "x", "completion": "y"}]]):
        train(data=rows, max_steps=1, output_dir=str(tmp_path / f"{number}"))
        said.append("read from the token cache" in capsys.readouterr().out)
    assert said == [False, True, False]


def test_the_best_state_is_in_the_model_as_well(train: Any) -> None:
    run = train(eval_data=HELD_OUT, eval_every=1, load_best=True, learning_rate=3.0, warmup_steps=0, max_steps=3)
    losses = [line["eval_loss"] for line in run.metrics if "eval_loss" in line]
    assert min(losses) < losses[-1]  # or it would not show
    assert run.evaluate().loss == pytest.approx(min(losses), rel=1e-6)


def test_a_plan_is_the_command_s(base: str) -> None:
    config = qlora.RunConfig()
    config.model.model, config.lora.rank = base, 4
    expected = Planner(base, "cpu", 2**30).plan(config)
    assert qlora.plan(config, device="cpu", device_memory="1GiB").memory == expected.memory
    many = qlora.plan(model=base, rank=4, device="cpu", gpus=4, device_memory="1GiB")
    assert many.layout.ranks == 4 and many.flops > 0
    for settings, problem in (
        ({}, "No model given"),
        ({"model": base, "gpu": 2}, "unknown setting 'gpu'; did you mean gpus?"),
        ({"model": base, "device_memory": "much"}, "device_memory is 'much'; give --device-memory a size"),
    ):
        with pytest.raises(qlora.InputError) as raised:
            qlora.plan(**settings)
        assert str(raised.value).startswith(problem)


ADAPTERS = """LoRAConfig LoRAModel get_lora_model inject_lora freeze_base unfreeze lora_parameters base_parameters
    lora_state_dict load_lora_state_dict save_adapter load_adapter merge_lora unmerge_lora parameter_summary
    count_trainable_parameters count_parameters create_lora_model merge_and_unload unload
    LoRALinear register_linear LinearShape Part"""
PUBLIC = {
    *("load_base_model", "load_tokenizer", "QuantConfig"),
    *ADAPTERS.split(),
    *("RunConfig", "train", "Run", "generate", "merge_adapter", "export_gguf", "plan"),
    "InputError",
}


def test_the_public_names_are_these() -> None:
    assert set(qlora.__all__) == PUBLIC and set(qlora.__all__) <= set(dir(qlora))
    for name in PUBLIC:
        found = getattr(qlora, name)
        assert found.__name__ == name and found.__module__.startswith("qlora.") and found.__doc__
    with pytest.raises(AttributeError):
        _ = qlora.learn


def test_names_are_loaded_when_they_are_used() -> None:
    code = (
        "import sys, qlora; dir(qlora); qlora.RunConfig(); qlora.InputError\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib', 'rich'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "from qlora import *\n"
        "assert callable(train) and 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
