"""Checkpoints: everything a run needs to continue as if it had never stopped.

    checkpoints/step-000050/
        adapter_model.safetensors, adapter_config.json    usable as an adapter by itself
        optimizer.safetensors                             fp32 masters and moments
        state.json                                        progress, settings, versions, a checksum per file

The step defines the whole position: data order, learning rate and random numbers are functions of (seed, step).
No pickle is written or read. A checkpoint is written under another name, synced to disk and renamed: a directory
called step-N is complete. Checksums detect later damage by the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora.adapters.peft_files import AdapterSnapshot, read_adapter, write_adapter
from qlora.config.lora import canonical
from qlora.lora.base_shift import shift_base
from qlora.lora.optimizer import MasterOptimizer
from qlora.lora.state import load_lora_state_dict
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import is_file_name, new_directory, sha256_of
from qlora.system.versions import NUMERIC, versions
from qlora.training.progress import Progress, badness

FORMAT = 2
STATE, OPTIMIZER = "state.json", "optimizer.safetensors"
# Settings that are digests, which say nothing to a reader.
_HASHED = {
    "data": "the training data (its rows, or how they become tokens) differs",
    "base": "the base differs",
    "chat_template": "the chat template differs",
}
FILES = (CONFIG, WEIGHTS, OPTIMIZER)  # plus a tokenizer or base shift, if any


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Path of the checkpoint after `step` optimizer steps."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for other names."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, complete or not, oldest first."""
    return sorted((p for p in (output_dir / "checkpoints").glob("step-*") if step_of(p) >= 0), key=step_of)


def save_checkpoint(
    path: Path,
    progress: Progress,
    adapter: AdapterSnapshot,
    optimizer: dict[str, Tensor],
    settings: dict[str, Any],
    run: dict[str, Any] | None = None,
) -> None:
    """Write one checkpoint, completely or not at all. It touches no model, so it may run during training.

    Args:
        optimizer: copies of `MasterOptimizer.state_tensors()`.
        settings: must be the same when the run is resumed (`load_checkpoint` compares them).
        run: all other settings, for readers of the file.
    """
    from safetensors.torch import save_file

    with new_directory(path) as staging:
        write_adapter(adapter, staging)
        save_file(optimizer, staging / OPTIMIZER)
        state = {
            "format": FORMAT,
            **asdict(progress),
            "settings": settings,
            "run": run,
            "versions": versions(*NUMERIC),
            "sha256": {file.name: sha256_of(file) for file in sorted(staging.iterdir())},
        }
        (staging / STATE).write_text(json.dumps(state, indent=2) + "\n")
        if path.exists():  # left by a run that was resumed from an earlier step
            discard(path)


def discard(path: Path) -> None:
    """Remove a directory so that it never appears half removed."""
    doomed = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def prune_checkpoints(output_dir: Path, keep_last: int) -> None:
    """Delete all but the `keep_last` newest checkpoints and the best one by evaluation; 0 keeps all."""
    paths = list_checkpoints(output_dir)
    if keep_last == 0 or len(paths) <= keep_last:
        return
    best = best_checkpoint(output_dir)
    for path in paths[:-keep_last]:
        if path != best:
            discard(path)


def best_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint with the best evaluation (`Progress`), the earliest of equals; None if none was evaluated."""
    evaluated: list[tuple[Progress, Path]] = []
    for path in list_checkpoints(output_dir):
        try:
            progress = _read_progress(json.loads((path / STATE).read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged or from another version: resuming reports it
        if progress.eval_loss is not None:
            evaluated.append((progress, path))
    # If the metric changed during the run, compare by the newest.
    alike = [(p, path) for p, path in evaluated if (p.score is None) == (evaluated[-1][0].score is None)]
    return min(alike, key=lambda pair: badness(pair[0].eval_loss, pair[0].score))[1] if alike else None


def find_checkpoint(resume: str, output_dir: Path, say: Callable[[str], object] = print) -> Path | None:
    """The checkpoint that --resume means.

    Args:
        resume: a directory, or "auto" for the newest complete one in `output_dir` (None if there is none).
        say: called with the damaged ones that were skipped.
    Raises:
        InputError: no such checkpoint, or it (under "auto", every one) is damaged.
    """
    if resume != "auto":
        path = Path(resume)
        if not (path / STATE).is_file():
            raise InputError(
                f"--resume {resume} is no checkpoint (it has no {STATE}); give a step-N directory or auto."
            )
        read_state(path)
        return path
    damage = []
    for path in reversed(list_checkpoints(output_dir)):
        try:
            read_state(path)
        except InputError as error:
            damage.append(str(error))
            continue
        for line in damage:
            say(f"passed over: {line}")
        return path
    if damage:
        raise InputError(
            f"No checkpoint in {output_dir} is whole, and starting afresh would replace them: {damage[0]}"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint and verify all its files.

    Returns:
        {"progress": Progress, "settings": ..., "versions": ...}.
    Raises:
        InputError: a missing or damaged file, or another version's format.
    """
    remedy = "pass --resume with an older one, or --resume auto"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise InputError(
                f"The checkpoint {path} has format {state['format']!r}, this version reads {FORMAT}; {remedy}."
            )
        progress = _read_progress(state)
        settings, libraries, checksums = dict(state["settings"]), dict(state["versions"]), dict(state["sha256"])
        files = sorted({*FILES, *filter(is_file_name, checksums)})
        damaged = [name for name in files if checksums[name] != sha256_of(path / name)]
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"The checkpoint {path} is not readable ({error!r}); {remedy}.") from error
    if damaged:
        raise InputError(f"The checkpoint {path} is damaged in {', '.join(damaged)}; {remedy}.")
    return {"progress": progress, "settings": settings, "versions": libraries}


def _read_progress(state: dict[str, Any]) -> Progress:
    """The progress in a state.json; old ones lack scores and samples."""
    always = ("step", "skipped", "eval_loss", "best_loss")
    names = Progress.__dataclass_fields__
    return Progress(**{name: state[name] for name in names if name in always or name in state})


def load_checkpoint(
    path: Path,
    model: nn.Module,
    make_optimizer: Callable[[], MasterOptimizer],
    settings: dict[str, Any],
    force: bool = False,
    say: Callable[[str], object] = print,
) -> tuple[Progress, MasterOptimizer]:
    """Restore adapter and optimizer.

    Args:
        model: with adapters in place.
        make_optimizer: builds the optimizer over the restored adapters.
        settings: this run's; all except total_steps must equal the checkpoint's.
        force: continue even if some differ; `say` names them.
    Returns:
        (where the run was, the optimizer).
    Raises:
        InputError: a damaged file, or lists all settings that differ.
    """
    from safetensors.torch import load_file

    state = read_state(path)
    saved, settings = canonical(state["settings"]), dict(settings)
    planned, plan = saved.pop("total_steps", None), settings.pop("total_steps", None)
    differing = [
        _HASHED.get(key) or f"{key} was {saved.get(key)!r}, is {settings.get(key)!r}"
        for key in sorted({*saved, *settings})
        if saved.get(key) != settings.get(key)
    ]
    if differing and not force:
        raise InputError(
            f"The checkpoint {path} belongs to another run: {'; '.join(differing)}. Start with the same "
            "settings, in a new --output-dir, or pass --force-resume to go on with the new ones."
        )
    if planned != plan:
        say(f"the run was planned for {planned} steps, now for {plan}; the learning rate follows the new plan")
    if differing:
        say(f"--force-resume overrides: {'; '.join(differing)}")
    current = versions(*NUMERIC)
    moved = [
        f"{name} {old} -> {current.get(name)}"
        for name, old in state["versions"].items()
        if old != current.get(name)
    ]
    if moved:
        say(f"libraries changed since the checkpoint, so that roundings may differ: {', '.join(moved)}")
    adapter = read_adapter(path)
    shift_base(model, adapter.base_shift)
    load_lora_state_dict(model, adapter.state, origin=str(path))
    optimizer = make_optimizer()
    optimizer.load_state_tensors(load_file(path / OPTIMIZER))
    return state["progress"], optimizer
