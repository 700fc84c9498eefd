"""Facts of a run for run.json: its command, versions, machine, sizes and data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qlora.data.batches import lengths_of
from qlora.data.example import Example
from qlora.lora.trainable import count_parameters, count_trainable_parameters
from qlora.model.base import find_base_info
from qlora.planning.memory import MemoryPlan
from qlora.system.device import describe_device
from qlora.system.versions import versions

NUM_BINS = 20
PACKAGES = ("python", "torch", "bitsandbytes", "transformers", "accelerate", "datasets", "qlora")


def gather_facts(
    call: Sequence[str] | str,
    accelerator: Any,
    model: nn.Module,
    plan: MemoryPlan,
    examples: Sequence[Example],
    num_held_out: int,
) -> dict[str, Any]:
    """The facts of this start of the run, ready for JSON.

    Args:
        call: the arguments of train.py, or Python's call as text.
        plan: planned memory in bytes.
    """
    lengths = [int(length) for length in lengths_of(examples)]
    num_targets = getattr(examples, "num_targets", None)  # a plain list has no such attribute and is counted
    if num_targets is None:
        num_targets = sum(example.num_targets for example in examples)
    return {
        "command": call if isinstance(call, str) else describe_command(call, accelerator.num_processes),
        "versions": versions(*PACKAGES),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "base_path": _absolute_path(model),
        "device": describe_device(accelerator.device),
        "num_processes": accelerator.num_processes,
        "parameters": {"trainable": count_trainable_parameters(model), "total": count_parameters(model)},
        "memory_plan": dict(vars(plan)),
        "examples": {
            "num_train": len(lengths),
            "num_held_out": num_held_out,
            "num_tokens": sum(lengths),
            "num_targets": int(num_targets),
            "lengths": count_lengths(lengths),
            "notes": list(getattr(examples, "notes", ())),
        },
    }


def _absolute_path(model: nn.Module) -> str | None:
    """The base's path, which --model may give relative to a directory that others do not know; None: a hub id."""
    info = find_base_info(model)
    path = None if info is None else Path(info.source).expanduser()
    return str(path.absolute()) if path is not None and path.exists() else None


def describe_command(arguments: Sequence[str], num_processes: int = 1) -> str:
    """The command line that starts this run from the project's directory."""
    start = ["python", "train.py"]
    if num_processes > 1:
        start = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(num_processes), "train.py"]
    return shlex.join([*start, *arguments])


def count_lengths(lengths: Sequence[int]) -> dict[str, list[int]]:
    """A histogram in at most NUM_BINS equal steps: {"edges": n + 1 lengths from 0, "counts": n}."""
    width = max(1, -(-(max(lengths) + 1) // NUM_BINS))
    edges = list(range(0, max(lengths) + width + 1, width))
    counts, _ = np.histogram(lengths, bins=edges)
    return {"edges": edges, "counts": counts.tolist()}
