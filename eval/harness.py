"""python -m eval harness: run any lm-eval task on our model, in 4 or 16 bits, with or without an adapter."""

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
    """Tasks of lm-eval: built-in ones by name, or your own as .yaml files."""

    tasks: str | None = None
    """Names of tasks or groups, or .yaml files, separated by commas."""
    num_fewshot: Annotated[int | None, at_least(0)] = None
    """Solved examples before each question; default: as the task says."""
    limit: Count = 0
    """Use only this many questions of each task; 0 = all."""
    include_path: str | None = None
    """Directory with more task files."""
    max_length: Window = 2048
    """Longest window in tokens, at most the model's limit."""
    apply_chat_template: bool = False
    """Apply the model's chat template."""


def import_lm_eval() -> Any:
    """Import the optional package.

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
    """(lm-eval's TaskManager, tasks to load).

    Raises:
        InputError: an unknown task, or a missing file.
    """
    from lm_eval.tasks import TaskManager

    files = [name.endswith((".yaml", ".yml")) for name in names]
    missing = [name for name, is_file in zip(names, files, strict=True) if is_file and not Path(name).is_file()]
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path} is not a directory; give one with task files.")
    named = [name for name, is_file in zip(names, files, strict=True) if not is_file]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not missing and not set(named) <= set(
        manager.all_tasks
    ):  # listing the built-in tasks reads thousands of files
        manager = TaskManager(include_path=include_path)
    missing += [name for name in named if name not in set(manager.all_tasks)]
    if missing:
        raise InputError(
            f"lm-eval has no task {', '.join(missing)}; see `lm-eval ls tasks`, or give a .yaml file."
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
    """Run tasks; returns the result of lm_eval.simple_evaluate: results by task, and samples.

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
    except (KeyError, ValueError, TypeError, AttributeError, ImportError) as error:  # it checks little
        name = type(error).__name__
        raise InputError(
            f"lm-eval cannot run {', '.join(tasks)} ({name}: {error}); --debug shows where."
        ) from error
    return found


def task_scores(found: dict[str, Any], seed: int = 0, confidence: float = 0.95) -> list[Score]:
    """Every metric of every task, with an interval if each sample has a value.

    Hits get Wilson's interval, other means a bootstrap; a value that lm-eval computes from all samples at once,
    such as a perplexity or a group's mean, gets none.
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
            if abs(score.value - value) > 1e-9:  # lm-eval's value is not a mean of its samples
                score = Score(name, float(value), None, None, confidence, "none", len(mine))
            scores.append(score)
    return scores


def main(argv: Sequence[str]) -> None:
    config = parse_args(HarnessConfig, f"{PROGRAM} harness", argv)
    require(config, "model", "tasks")
    if config.data is not None or config.max_examples:
        raise InputError(
            "Tasks have their own data; leave out --data, and use --limit N instead of --max-examples."
        )
    check_output(config.output)
    import_lm_eval()
    names = [name.strip() for name in (config.tasks or "").split(",") if name.strip()]
    if not names:
        raise InputError("--tasks is empty; give the name of an lm-eval task or a .yaml file.")
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
    """A sample's id, answer, responses and metrics; the task has its prompt."""
    kept = sample.get("filter", "none")
    row: dict[str, Any] = {"id": f"{task}:{sample['doc_id']}" + (f":{kept}" if kept != "none" else "")}
    row |= {"target": str(sample["target"]), "responses": sample["filtered_resps"]}
    for name in sample["metrics"]:
        value = sample[name]
        if isinstance(value, (int, float)):
            row[name] = bool(value) if value in (0, 1) else value
    return row


def _pairing(rows: Sequence[dict[str, Any]]) -> dict[str, Sequence[str]]:
    """The metrics of every sample, for the paired test of two models."""
    names = [name for name in rows[0] if name not in ("id", "target", "responses")] if rows else []
    return {name: (name,) for name in names if all(name in row for row in rows)}
