"""lm-eval's own Hugging Face model, which our scores are compared with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


def save_rounded_llama(directory: Path, **tokenizer: Any) -> Path:
    """A tiny random LLaMA in fp32 whose weights are bf16 numbers: our 16-bit base holds the same."""
    from transformers import AutoModelForCausalLM

    save_tiny_llama(directory, tokenizer=tiny_tokenizer(**tokenizer))
    network = AutoModelForCausalLM.from_pretrained(directory)
    network.bfloat16().float().save_pretrained(directory)
    return directory


def load_lm_eval(directory: Path | str, max_length: int, **options: Any) -> Any:
    """lm_eval.models.huggingface.HFLM in fp32 on the CPU; the test is skipped without lm-eval."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return huggingface.HFLM(
        pretrained=str(directory), dtype=torch.float32, device="cpu", max_length=max_length, **options
    )


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    """Requests as lm-eval's tasks make them."""
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, index) for index, pair in enumerate(arguments)]  # type: ignore[arg-type]


TASKS = {
    "letters": {
        "description": "The following are multiple choice questions (with answers) about {{subject}}.\n\n",
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "answer",
    },
    "text": {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
    },
    "continued": {"doc_to_text": "{{ctx}}", "doc_to_choice": "{{endings}}", "doc_to_target": "{{label}}"},
}


def write_choice_task(folder: Path, kind: str, data: str, few_shot_data: str, shots: int) -> str:
    """A task file of lm-eval over local data, like its own for MMLU, ARC and HellaSwag; returns its name."""
    import yaml

    norms = ["acc"] if kind == "letters" else ["acc", "acc_norm", "acc_bytes"]
    task = {
        "task": f"local_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data, "train": few_shot_data}},
        "test_split": "test",
        "fewshot_split": "train",
        "fewshot_config": {"sampler": "first_n"},
        "num_fewshot": shots,
        "output_type": "multiple_choice",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in norms],
        **TASKS[kind],
    }
    (folder / f"local_{kind}.yaml").write_text(yaml.safe_dump(task))
    return f"local_{kind}"


def evaluate_by_lm_eval(
    model: Any, tasks: list[str], folder: Path, model_args: str | None = None
) -> dict[str, Any]:
    """lm_eval.simple_evaluate on the task files of a folder, samples included."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    result: Any = simple_evaluate(model, model_args, tasks, task_manager=manager, bootstrap_iters=0)
    return result
