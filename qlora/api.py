"""From Python: `train` and `plan`, with the settings of the command line as keywords, and what a run leaves.

    run = qlora.train(model="path/to/llama", data=rows, output_dir="out", rank=8)
    run.metrics[-1]["loss"], run.generate("Why is the sky blue?"), run.evaluate(held_out).perplexity
    run.merge("merged")

The command line runs through `start_run` and `publish`, too. No function here ends the process, and nothing of a
run outlives its `Run`: no thread, no open file, no signal handler.
"""

from __future__ import annotations

import gc
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qlora.adapters.peft_files import read_adapter
from qlora.config.parse import with_settings
from qlora.config.plan import PlanConfig
from qlora.config.run import RunConfig
from qlora.data.dataset import load_examples
from qlora.data.python_rows import PythonRows, read_sources
from qlora.export.drift import Drift
from qlora.export.hub import check_destination, push_to_hub
from qlora.export.merge import merge_adapter
from qlora.generation import generate
from qlora.lora.state import load_lora_state_dict
from qlora.planning.planner import Planner, RunPlan
from qlora.report.curve import draw_loss
from qlora.system.device import best_device
from qlora.system.errors import InputError, StoppedOnRequest
from qlora.system.files import whole_lines
from qlora.training.held_out import evaluate
from qlora.training.observer import Observer
from qlora.training.run import TrainingRun, reading

C = TypeVar("C", bound=RunConfig)


def train(config: RunConfig | None = None, *, observers: Sequence[Observer] = (), **settings: Any) -> Run:
    """Fine-tune a model, as `qlora train` does.

    The first Ctrl-C, as every other request to stop, lets the step end and saves; the run can be resumed. At a
    prompt (a notebook, a REPL) the run so far is then returned, with `stopped`; in a script KeyboardInterrupt is
    raised. A SIGTERM has its usual effect once all is saved. A second signal has it at once.

    Args:
        config: the settings; keywords change a copy of it.
        observers: watch beside the run's own (`qlora.training.observer.Observer`).
        settings: named as the flags, with underscores; `data` and `eval_data` take rows as well: a list of dicts,
            a pandas DataFrame, a datasets.Dataset, and `data` a list of these and of paths.
    Raises:
        InputError: a setting or the data cannot be used; an unknown setting is told with the nearest name.
        TrainingStopped: training cannot go on; what was saved stays.
    """
    call = _describe_call(config, settings)
    rows: dict[str, PythonRows] = {}
    for name in ("data", "eval_data"):
        if settings.get(name) is not None:
            settings[name] = _take_rows(name, settings[name], rows)
    config = configure(RunConfig, config, settings)
    if config.generate.prompt is not None:
        raise InputError("prompt is for the command line; ask the run that train returns: run.generate(prompt).")
    run = start_run(config, call, observers, rows=rows, ends_process=False)
    stopped: str | None = None
    try:
        with run:
            run.train()
    except StoppedOnRequest as request:
        stopped = str(request)
        run.say(stopped)
    else:
        publish(run)
    done = Run._of(run, stopped)
    number, run = run.stop.signal, None  # type: ignore[assignment]
    gc.collect()  # trainer and observers know each other: without it the optimizer would stay
    if number == signal.SIGTERM or (number == signal.SIGINT and not hasattr(sys, "ps1")):
        signal.raise_signal(number)  # the handlers are those of before the run
    return done


def plan(
    config: RunConfig | None = None, **settings: Any
) -> RunPlan:
    """What a run would take of each device, before it is made: `print(plan.total / 2**30, "GiB")`.

    Args:
        config: the settings of the run; keywords change a copy of it.
        settings: named as the flags of `qlora plan`: those of training, device, device_memory, gpus, nodes, ...
    Raises:
        InputError: a setting cannot be used, or devices that do not go together.
    """
    planned = PlanConfig() if config is None else PlanConfig(**{**PlanConfig().__dict__, **config.__dict__})
    planner, planned = make_planner(configure(PlanConfig, planned, settings))
    return planner.plan(planned, planned.asked_devices)


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
        return math.exp(self.loss) if self.loss < 700 else math.inf


class RunMetrics(list[dict[str, Any]]):
    """The lines of metrics.jsonl: a dict per step and per evaluation."""

    def to_pandas(self) -> Any:
        """As a DataFrame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_pandas needs a package; pip install pandas.") from error
        return pandas.DataFrame(self)


@dataclass(eq=False)
class Run:
    """What a run of training leaves.

    Attributes:
        config: its settings.
        adapter_dir: holds the adapter, metrics, checkpoints and report.
        model: the base with the adapter of `adapter_dir` in it, in evaluation mode.
        metrics: a dict per step and per evaluation.
        stopped: why the run ended before its last step, on request; None: it did not.
    """

    config: RunConfig
    adapter_dir: Path
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    metrics: RunMetrics = field(repr=False)
    stopped: str | None = None
    _accelerator: Any = field(default=None, repr=False)
