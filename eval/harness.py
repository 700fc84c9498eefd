"""python -m eval harness: any task of lm-eval on our model, in 4 bits with an adapter or otherwise."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from qlora.config.parse import parse_args
from qlora.config.settings import Count, at_least
from qlora.system.errors import InputError

from . import PROGRAM
from .model import EvalConfig, Window, load_evaluated, require
from .results import check_output, print_scores, write_result
from .scores import Score, proportion


@dataclass
class HarnessConfig(EvalConfig):
    """Tasks of lm-eval: its own by name, or one of yours as a .yaml file."""

    tasks: str | None = None
    """Names of tasks or groups, or .yaml files, separated by commas."""
    num_fewshot: Annotated[int | None, at_least(0)] = None
    """Solved examples before each question; by default the task's own number."""
    limit: Count = 0
    """Only the first so many questions of each task; 0 = all."""
    include_path: str | None = None
    """Directory with more task files."""
    max_length: Window = 2048
    """Longest window, in tokens; the model's own limit where that is lower."""
    apply_chat_template: bool = False
    """Ask through the model's chat template."""


def import_lm_eval() -> Any:
    """The optional package.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise InputError('The harness needs lm-eval; install it with: pip install "lm-eval>=0.4.9"') from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def find_tasks(names: Sequence[str], include_path: str | None = None) -> tuple[Any, list[str]]:
    """(lm-eval's TaskManager, what it loads).

    Raises:
        InputError: a name that it does not know, or no such file.
    """
    from lm_eval.tasks import TaskManager

    files = [name.endswith((".yaml", ".yml")) for name in names]
    missing = [name for name, is_file in zip(names, files, strict=True) if is_file and not Path(name).is_file()]
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path} is no directory; give one that holds task files.")
    named = [name for name, is_file in zip(names, files, strict=True) if not is_file]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not missing and not set(named) <= set(manager.all_tasks):  # lm-eval's own are thousands of files to read
        manager = TaskManager(include_path=include_path)
    missing += [name for name in named if name not in set(manager.all_tasks)]
    if missing:
        raise InputError(
            f"lm-eval knows no task {', '.join(missing)}; see `lm-eval ls tasks`, or give a .yaml file."
        )
    return manager, list(names)


def run_tasks(
    model: Any,
    tasks: Sequence[str],
    manager: Any,
    num_fewshot: int | None,
    limit: int,
    use_template: bool,
    seed: int,
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate returns: results by task, and samples.

    Raises:
        InputError: lm-eval cannot load the task or its data.
    """
    from lm_eval import simple_evaluate

    try:
        found: Any = simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, num_fewshot=num_fewshot, limit=limit or None,
            apply_chat_template=use_template, bootstrap_iters=0, random_seed=seed, numpy_random_seed=seed,
            torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, ImportError) as error:  # it checks little itself
        name = type(error).__name__
        raise InputError(
            f"lm-eval cannot run {', '.join(tasks)} ({name}: {error}); --debug shows where."
        ) from error
    return found


def task_scores(found: dict[str, Any], seed: int = 0, confidence: float = 0.95) -> list[Score]:
    """Every metric of every task, with an interval from its samples where it has a value for each of them.

    Hits have Wilson's interval, other means a bootstrap; a figure that lm-eval computes from all samples at once,
    such as a perplexity or a group's mean, has none.
    """
    from .scores import mean_score

    scores = []
    for task, metrics in found["results"].items():
        samples = found["samples"].get(task, [])
        for key, value in metrics.items():
            metric, _, kept = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or not kept:
                continue
            mine = [s for s in samples if s.get("filter", "none") == kept]
            name = f"{task}: {metric}" + (f" ({kept})" if kept != "none" else "")
            values = [s.get(metric) for s in mine]
            if values and all(isinstance(v, (bool, int, float)) and v in (0, 1) for v in values):
                score = proportion(name, [v == 1 for v in values], confidence)
            elif values and all(isinstance(v, (int, float)) for v in values):
                score = mean_score(name, values, seed=seed, confidence=confidence)
            else:
                score = Score(name, float(value), None, None, confidence, "none", len(mine))
            if abs(score.value - value) > 1e-9:  # lm-eval's figure is no mean of its samples
                score = Score(name, float(value), None, None, confidence, "none", len(mine))
            scores.append(score)
    return scores


def main(argv: Sequence[str]) -> None:
    config = parse_args(HarnessConfig, f"{PROGRAM} harness", argv)
    require(config, "model", "tasks")
    if config.data is not None or config.max_examples:
        raise InputError("A task names its own data; leave out --data and --max-examples, and pass --limit N.")
    check_output(config.output)
    import_lm_eval()
    names = [name.strip() for name in (config.tasks or "").split(",") if name.strip()]
    if not names:
        raise InputError("--tasks is empty; give the name of a task of lm-eval, or a .yaml file.")
    manager, tasks = find_tasks(names, config.include_path)
    model, tokenizer, accelerator = load_evaluated(config)
    from .lm_eval_model import TaskModel

    asked = TaskModel(model, None, tokenizer, accelerator, config.max_length, config.batch_size, config.seed)
    found = run_tasks(
        asked, tasks, manager, config.num_fewshot, config.limit, config.apply_chat_template, config.seed
    )
    if not accelerator.is_main_process:
        return
    scores = task_scores(found, config.seed, config.confidence)
    rows = [_row(task, sample) for task, samples in found["samples"].items() for sample in samples]
    write_result(
        config.output, "harness", scores, asdict(config), rows, _pairing(rows),
        results=found["results"], n_samples=found["n-samples"], n_shot=found["n-shot"],
    )  # fmt: skip
    print_scores(f"lm-eval: {', '.join(tasks)}", scores)


def _row(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """A sample's id, answer, responses and metrics; its prompt can be had from the task."""
    kept = sample.get("filter", "none")
    row: dict[str, Any] = {"id": f"{task}:{sample['doc_id']}" + (f":{kept}" if kept != "none" else "")}
    row |= {"target": str(sample["target"]), "responses": sample["filtered_resps"]}
    for name in sample["metrics"]:
        value = sample[name]
        if isinstance(value, (int, float)):
            row[name] = bool(value) if value in (0, 1) else value
    return row


def _pairing(rows: Sequence[dict[str, Any]]) -> dict[str, Sequence[str]]:
    """The metrics that every sample has, for the paired test of two models."""
    names = [name for name in rows[0] if name not in ("id", "target", "responses")] if rows else []
    return {name: (name,) for name in names if all(name in row for row in rows)}
