"""Checkpoints: all that a run needs to go on as if it had never stopped.

    checkpoints/step-000050/
        adapter_model.safetensors, adapter_config.json    usable as an adapter by itself
        optimizer.safetensors                             fp32 masters and moments
        state.json                                        step, settings, versions, a checksum per file

The step is the whole position: data order, learning rate and random numbers are functions of (seed, step).
No pickle is written or read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from qlora.adapter import load_adapter, save_adapter
from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.files import new_directory
from qlora.optim import MasterOptimizer

FORMAT = 1
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the state after `step` optimizer steps is kept."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    path: Path,
    step: int,
    model: nn.Module,
    optimizer: MasterOptimizer,
    lora_config: LoRAConfig,
    settings: dict[str, Any],
    base_model: str,
) -> None:
    """Write one checkpoint, whole or not at all.

    Args:
        step: optimizer steps done.
        settings: what a resumed run must share (`load_checkpoint` compares them).
    """
    from importlib.metadata import version

    from safetensors.torch import save_file

    shutil.rmtree(path, ignore_errors=True)  # left by a run that was resumed from before it
    with new_directory(path) as staging:
        save_adapter(model, staging, lora_config, base_model)
        tensors = {k: t.contiguous().cpu() for k, t in optimizer.state_tensors().items()}
        save_file(tensors, staging / OPTIMIZER)
        state = {
            "format": FORMAT,
            "step": step,
            "settings": settings,
            "versions": {name: version(name) for name in ("torch", "transformers", "bitsandbytes", "accelerate")},
            "sha256": {file.name: _sha256(file) for file in sorted(staging.iterdir())},
        }
        (staging / STATE).write_text(json.dumps(state, indent=2) + "\n")


def find_checkpoint(resume: str, output_dir: Path) -> Path | None:
    """The checkpoint that --resume means: a directory, or for "auto" the newest one (None if there is none)."""
    if resume == "auto":
        return max((output_dir / "checkpoints").glob("step-*"), default=None)
    path = Path(resume)
    if not (path / STATE).is_file():
        raise InputError(
            f"--resume {resume} is no checkpoint (it has no {STATE}); give a step-N directory or auto."
        )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose files are all as they were written.

    Raises:
        InputError: a missing or damaged file.
    """
    try:
        state = json.loads((path / STATE).read_text())
        damaged = [name for name, digest in state["sha256"].items() if _sha256(path / name) != digest]
        step, settings = int(state["step"]), dict(state["settings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The checkpoint {path} is not readable ({error}); resume from an older one.") from error
    if damaged:
        raise InputError(f"The checkpoint {path} is damaged in {', '.join(damaged)}; resume from an older one.")
    return {"step": step, "settings": settings}


def load_checkpoint(
    path: Path,
    model: nn.Module,
    make_optimizer: Callable[[], MasterOptimizer],
    settings: dict[str, Any],
) -> tuple[int, MasterOptimizer]:
    """Restore adapter and optimizer.

    Args:
        model: with adapters in place.
        make_optimizer: builds the optimizer over the restored adapters.
        settings: this run's; every one must equal the checkpoint's.
    Returns:
        (steps done, the optimizer).
    Raises:
        InputError: a damaged file, or all the settings that differ.
    """
    from safetensors.torch import load_file

    state = read_state(path)
    saved = state["settings"]
    differing = [
        f"{key} was {saved.get(key)!r}, is {settings.get(key)!r}"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if differing:
        raise InputError(
            f"The checkpoint {path} belongs to another run: {'; '.join(differing)}. "
            "Start with the same settings, or in a new --output-dir."
        )
    load_adapter(model, path)
    optimizer = make_optimizer()
    optimizer.load_state_tensors(load_file(path / OPTIMIZER))
    return state["step"], optimizer


def _sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        digest = hashlib.sha256()
        for block in iter(lambda: handle.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
