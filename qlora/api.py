"""The Python API: `train` and `plan`, with the command line's settings as keywords, and the `Run` they return.

    run = qlora.train(model="path/to/llama", data=rows, output_dir="out", rank=8)
    run.metrics[-1]["loss"], run.generate("Why is the sky blue?"), run.evaluate(held_out).perplexity
    run.merge("merged")

The command line also uses `start_run`, `publish` and `start_planner`; imports that only Python needs are local. No
function here ends the process, and a run leaves no thread, open file or signal handler.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.adapters.peft_files import read_adapter
from qlora.config.merge import MergeOptions
from qlora.config.parse import with_settings
from qlora.config.run import RunConfig
from qlora.data.batches import lengths_of
from qlora.data.dataset import Sources, load_examples
from qlora.data.python_rows import PythonRows, take_sources
from qlora.export.hub import check_destination, push_to_hub
from qlora.lora.state import load_lora_state_dict
from qlora.report.curve import part_metrics
from qlora.system.errors import InputError, StoppedOnRequest
from qlora.system.files import whole_lines
from qlora.training.held_out import evaluate
from qlora.training.observer import Observer
from qlora.training.run import TrainingRun, encoder_of

if TYPE_CHECKING:
    from qlora.config.devices import DevicesConfig
    from qlora.config.plan import PlanConfig
    from qlora.export.drift import Drift
    from qlora.planning.planner import Planner, RunPlan

C = TypeVar("C", bound=RunConfig)


def train(config: RunConfig | None = None, *, observers: Sequence[Observer] = (), **settings: Any) -> Run:
    """Fine-tune a model, as `qlora train` does.

    A request to stop (Ctrl-C, --stop-after, an observer's) finishes the step, saves, and returns the run so far
    with `stopped` set; resume="auto" continues it. A SIGTERM is then raised again in the program, and so is a
    Ctrl-C in a script (KeyboardInterrupt), not at a prompt or in a notebook. A second signal takes effect at once.

    Args:
        config: the settings; keywords change a copy of it.
        observers: added to the run's own (`qlora.training.observer.Observer`).
        settings: named as the flags, with underscores. `data` and `eval_data` take rows as well: a list of dicts,
            a pandas DataFrame or a datasets.Dataset; `data` also a list of these and of paths.
    Raises:
        InputError: a setting or the data cannot be used; for an unknown setting it names the closest one.
        TrainingStopped: training cannot go on; saved files stay.
    """
    call, rows = _describe_call(config, settings), _take_rows(settings)
    config = _configure(RunConfig() if config is None else config, settings)
    if config.generate.prompt is not None:
        raise InputError("prompt is for the command line; ask the run that train returns: run.generate(prompt).")
    training = start_run(config, call, observers, rows=rows, ends_process=False)
    stopped: str | None = None
    try:
        with training:
            training.train()
    except StoppedOnRequest as request:
        stopped = str(request)
        training.accelerator.print(stopped)
    else:
        publish(training)
    run, number = Run(training, stopped), training.stop.signal
    del training
    gc.collect()  # trainer and observers reference each other, which would keep the optimizer
    if number == signal.SIGTERM or (number == signal.SIGINT and not hasattr(sys, "ps1")):
        signal.raise_signal(number)  # to the handler from before the run
    return run


def start_run(
    config: RunConfig,
    call: Sequence[str] | str,
    observers: Sequence[Observer] = (),
    started: float | None = None,
    rows: Mapping[str, PythonRows] | None = None,
    ends_process: bool = True,
) -> TrainingRun:
    """Make the run that the settings describe, a context manager; arguments as `TrainingRun`.

    Raises:
        InputError: settings are missing or conflict, or the hub would not accept the adapter.
    """
    run = TrainingRun.from_config(config, call, observers, started, rows, ends_process)
    if config.saving.push_to_hub is not None:
        check_destination(config.saving.push_to_hub)
    return run


def publish(run: TrainingRun) -> None:
    """Upload the adapter where --push-to-hub says."""
    repository = run.config.saving.push_to_hub
    if repository is not None and run.directory.is_main:
        run.say(f"uploaded to {push_to_hub(run.directory.path, repository)}")


def plan(config: RunConfig | None = None, **settings: Any) -> RunPlan:
    """Estimate the memory that a run would need on each device: `plan(...).total` bytes.

    Args:
        config: the settings of the run; keywords change a copy of it.
        settings: named as the flags of `qlora plan`: those of training, device, device_memory, gpus, nodes, ...
    Raises:
        InputError: a setting cannot be used, or devices and settings conflict.
    """
    from qlora.config.plan import PlanConfig
    from qlora.planning.planner import Planner

    planned = PlanConfig() if config is None else PlanConfig(**vars(config))
    return Planner.plan(*start_planner(_configure(planned, settings)))


def start_planner(config: PlanConfig) -> tuple[Planner, PlanConfig, DevicesConfig | None]:
    """(planner, config with the settings of its --adapter, devices or None if nothing depends on them).

    Raises:
        InputError: no model is given, or the adapter cannot be read.
    """
    from qlora.planning.planner import Planner
    from qlora.system.device import best_device

    if config.model.model is None:
        raise InputError("No model given; pass --model with a Hugging Face directory, a hub id or a .gguf file.")
    if config.generate.adapter is not None:
        config.lora = read_adapter(config.generate.adapter).config
    planner = Planner(config.model.model, config.device or best_device().type, config.device_memory_bytes)
    return planner, config, config.devices if config.devices.is_given or config.parallel.is_split else None


@dataclass(frozen=True)
class Evaluation:
    """Loss on held-out data.

    Attributes:
        loss: mean over target tokens, in nats.
        num_examples, num_tokens, num_targets: what it was measured on.
    """

    loss: float
    num_examples: int
    num_tokens: int
    num_targets: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


class RunMetrics(list[dict[str, Any]]):
    """The lines of metrics.jsonl: a dict per step and per evaluation."""

    def to_pandas(self) -> Any:
        """The metrics as a DataFrame with a column per name.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas needs a package; pip install pandas.") from error
        return pandas.DataFrame(list(self))


class Run:
    """The result of a training run.

    Attributes:
        config: its settings.
        adapter_dir: holds the adapter, metrics, checkpoints and report.
        model: the base with the adapter from `adapter_dir`, in evaluation mode.
        tokenizer: as the run used it.
        metrics: a dict per step and per evaluation, including those before a resume.
        stopped: why the run was stopped on request before its last step; None: it was not.
    """

    def __init__(self, training: TrainingRun, stopped: str | None = None) -> None:
        self.config, self.adapter_dir, self.stopped = training.config, training.directory.path, stopped
        self.model, self.tokenizer = training.model.eval(), training.tokenizer
        self.model.zero_grad(set_to_none=True)
        if self.config.saving.load_best and stopped is None:
            best = read_adapter(self.adapter_dir)
            load_lora_state_dict(self.model, best.state, str(self.adapter_dir))
        training.accelerator.wait_for_everyone()  # the main process has written the last line
        self.metrics = RunMetrics(whole_lines(self.adapter_dir / "metrics.jsonl"))
        self._accelerator, self._held_out = training.accelerator, training.held_out

    def __repr__(self) -> str:
        steps = max((line["step"] for line in self.metrics), default=0)
        losses = [line["loss"] for line in self.metrics if line.get("loss") is not None]
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        end = f", {self.stopped}" if self.stopped else ""
        return f"<Run in {self.adapter_dir}: {steps} steps{loss}{end}>"

    def generate(self, prompt: str | Sequence[Any], **options: Any) -> Any:
        """The model's answer.

        Args:
            prompt: a question; or a conversation, as messages with role and content; or a list of either.
            options: max_new_tokens, temperature, top_p and seed; by default the run's settings. raw=True
                continues a text, or each of a list of texts, without a chat template.
        Returns:
            A text; a list of texts for a list of questions or conversations.
        Raises:
            InputError: an unknown option, no prompt, or the base is split over processes.
        """
        from qlora.generation import generate

        if self.config.parallel.is_split:
            raise InputError(f"{self.config.parallel.flag} has split the base; load the adapter on a whole one.")
        is_one = isinstance(prompt, str) or isinstance(next(iter(prompt), None), Mapping)
        asked = [prompt] if is_one else list(prompt)
        raw = options.pop("raw", False)
        turns: list[Any] = [
            text if raw else [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
            for text in asked
        ]
        if not (asked and all(asked)):
            raise InputError("prompt is empty; give a text, a list of messages, or a list of these.")
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        if unknown := sorted(options.keys() - set(names)):
            raise InputError(f"generate has no option {unknown[0]!r}; it has {', '.join(names)}, raw.")
        chosen = _configure(self.config, options)
        sampling = chosen.generate.sampling(chosen.loop.seed)
        answers = generate(self.model, self.tokenizer, turns, sampling, raw=raw)
        return answers[0] if is_one else answers

    def evaluate(self, data: Any = None) -> Evaluation:
        """Loss per target token on data tokenized like the run's.

        Args:
            data: as for `train`; by default the run's held-out data.
        Raises:
            InputError: the data cannot be used, or none was held out; or the run learned preferences.
        """
        if self.config.preference.objective != "sft":
            raise InputError("This run learned preferences; python -m eval preference measures them.")
        d, examples = self.config.data, self._held_out
        if data is not None:
            sources = data if isinstance(data, (str, os.PathLike)) else take_sources("data", data)
            named = os.fspath(sources) if isinstance(sources, os.PathLike) else sources
            encoder = encoder_of(d, self.tokenizer)
            examples, _ = load_examples(Sources(named), encoder, self._accelerator.print, on_bad_row=d.on_bad_row)
        if not examples:
            raise InputError("Nothing was held out from this run; give data to evaluate on.")
        budget = self.config.loop.batch_size * d.max_length
        loss = evaluate(self.model, examples, self._accelerator, budget, d.packing)
        assert loss is not None  # no request to stop is passed
        num_targets = sum(example.num_targets for example in examples)
        return Evaluation(loss, len(examples), sum(lengths_of(examples)), num_targets)

    def plot(self) -> Any:
        """The loss curve as a matplotlib Figure, as in loss.png."""
        from qlora.report.loss_figure import LossFigure

        return LossFigure(*part_metrics(self.metrics))

    def merge(self, output_dir: str | os.PathLike[str], **settings: Any) -> Drift | None:
        """Write base and adapter as one model.

        Args:
            settings: as the flags of `qlora merge` (`MergeOptions`), such as save_4bit=True.
        Returns:
            How far the written model is from base and adapter; None with drift=False.
        """
        from qlora.export.merge import merge_adapter

        options = with_settings(MergeOptions(), settings)
        return merge_adapter(str(self.config.model.model), str(self.adapter_dir), os.fspath(output_dir), options)


def _configure(config: C, settings: Mapping[str, Any]) -> C:
    if not isinstance(config, RunConfig):
        raise InputError(f"config is of type {type(config).__name__}; give a RunConfig, and settings as keywords.")
    return with_settings(config, settings)


def _take_rows(settings: dict[str, Any]) -> dict[str, PythonRows]:
    """Replace rows in the settings by names, in place; returns the rows by these names."""
    rows: dict[str, PythonRows] = {}
    for name in ("data", "eval_data"):
        value = settings.get(name)
        if value is None or isinstance(value, (str, os.PathLike)):
            continue
        sources = take_sources(name, value) if name == "data" else [PythonRows(name, value)]
        rows |= {str(source): source for source in sources if isinstance(source, PythonRows)}
        settings[name] = [str(source) for source in sources] if name == "data" else name
    return rows


def _describe_call(config: RunConfig | None, settings: Mapping[str, Any]) -> str:
    """The call as Python text without the rows, for run.json."""
    words = [] if config is None else ["config"]
    for name, value in settings.items():
        value = os.fspath(value) if isinstance(value, os.PathLike) else value
        is_rows = name in ("data", "eval_data") and not isinstance(value, str)
        words.append(f"{name}={'...' if is_rows else repr(value)}")
    return f"qlora.train({', '.join(words)})"
