"""Experiment trackers (TensorBoard, wandb, trackio, ...), through accelerate's wrappers.

Training does not depend on them: one that fails is reported once, then disabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.system.errors import InputError
from qlora.system.redact import redact
from qlora.training.observer import Observer

if TYPE_CHECKING:
    from qlora.training.loop import Trainer

# tracker -> its pip name, if different, and -> its argument for the name of a run
PACKAGES = {"comet_ml": "comet-ml"}
NAME_OF_RUN = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name", "mlflow": "run_name"}


def start_accelerator(trackers: Sequence[str], output_dir: str | Path) -> Any:
    """Make the run's Accelerator, which logs to these trackers; tracker files go to OUTPUT_DIR/logs.

    Raises:
        InputError: as `check_trackers`.
    """
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, ProjectConfiguration

    from qlora.system.device import best_device

    check_trackers(trackers)
    project = ProjectConfiguration(str(output_dir), logging_dir=str(Path(output_dir) / "logs"))
    # Without cpu=True, several processes on a machine without a GPU would each train alone.
    is_cpu = best_device().type == "cpu"
    # The others wait while the main process reads, tokenizes and quantizes: NCCL's ten minutes are not enough.
    # Dead processes are detected without this limit (parallel/watchdog.py).
    waiting = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(
        cpu=is_cpu, mixed_precision="no", log_with=list(trackers) or None, project_config=project,
        kwargs_handlers=[waiting],
        # A plugin, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS would divide every gradient again.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )  # fmt: skip


def check_trackers(names: Sequence[str]) -> None:
    """Check that accelerate knows these trackers and their packages are installed.

    Raises:
        InputError: it does not, or they are not.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, installed = list(LOGGER_TYPE_TO_CLASS), {str(name) for name in get_available_trackers()}
    for name in names:
        if name == "all":
            if not installed:
                raise InputError("--report-to all finds no tracker; pip install tensorboard, or another.")
        elif name not in known:
            raise InputError(f"report_to names {name!r}; give --report-to names of {', '.join(known)}, or all.")
        elif name not in installed:
            raise InputError(f"--report-to {name} needs a package; pip install {PACKAGES.get(name, name)}.")


def start_trackers(
    accelerator: Any, project: str, run: str, settings: dict[str, dict[str, Any]], first_step: int = 0
) -> None:
    """Start a run in all trackers of the accelerator.

    Args:
        project, run: names, for trackers that have them.
        settings: section -> name -> value, free of secrets.
        first_step: steps done already; TensorBoard hides its data of later ones.
    Raises:
        InputError: a tracker does not start, for example without a login.
    """
    if not accelerator.log_with:
        return
    options: dict[str, dict[str, Any]] = {tracker: {word: run} for tracker, word in NAME_OF_RUN.items()}
    options["tensorboard"] = {"purge_step": first_step + 1} if first_step else {}
    try:
        accelerator.init_trackers(project, flatten(settings), options)
    except Exception as error:
        names = ", ".join(str(getattr(tracker, "name", tracker)) for tracker in accelerator.log_with)
        raise InputError(
            f"A tracker does not start ({names}: {type(error).__name__}: {error}); mend it, or leave it out."
        ) from error


def flatten(settings: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """{"train": {"seed": 1}} -> {"train.seed": 1}; drops None and converts values that are not plain to text."""
    flat: dict[str, int | float | str | bool] = {}
    for section, values in settings.items():
        for name, value in values.items() if isinstance(values, dict) else [("", values)]:
            if value is not None:
                key = f"{section}.{name}" if name else section
                flat[key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


class Trackers(Observer):
    """Logs to each tracker until it fails.

    Args:
        trackers: accelerate's `GeneralTracker`s, started.
        say: called once for each that fails.
    """

    def __init__(self, trackers: Iterable[Any], say: Callable[[str], object] = print) -> None:
        self.trackers, self.say = list(trackers), say

    def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
        self.log(line)

    def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
        self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Log the numbers in one line of metrics.jsonl."""
        values = {k: v for k, v in line.items() if k != "step" and type(v) in (int, float)}
        self._each(lambda tracker: tracker.log(values, step=line["step"]))

    def log_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        """Log samples of one step, as text or as a table if a tracker supports either."""
        columns = ["prompt", "completion", "expected"]
        rows = [[sample[name] or "" for name in columns] for sample in samples]

        def send(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                parts = [[f"**{name}**\n\n{indent(sample[name] or '')}" for name in columns] for sample in samples]
                texts = {f"sample {number}": "\n\n".join(part) for number, part in enumerate(parts, start=1)}
                tracker.log(texts, step=samples[0]["step"])
            elif hasattr(tracker, "log_table"):
                tracker.log_table("samples", columns=columns, data=rows, step=samples[0]["step"])

        self._each(send)

    def finish(self) -> None:
        """Close them all."""
        self._each(lambda tracker: tracker.finish())
        self.trackers = []

    def _each(self, use: Callable[[Any], object]) -> None:
        for tracker in list(self.trackers):
            try:
                use(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                problem = redact(f"{type(error).__name__}: {error}")
                self.say(f"the tracker {tracker.name} failed and is left out ({problem}); training goes on")


def indent(text: str) -> str:
    """Text as a preformatted Markdown block."""
    return "\n".join(f"    {line}" for line in text.splitlines())
