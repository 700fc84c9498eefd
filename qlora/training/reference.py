"""What the reference thinks of a run's preferences: computed once before training, and kept in the token cache.

The key of the file holds everything that the values depend on: the rows, the base and its quantization, the
adapter on it, dtype, device and library versions. It is safe to delete at any time.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import SavedAdapter, read_adapter
from qlora.config.run import RunConfig
from qlora.data.dataset import Examples
from qlora.data.example import Example
from qlora.data.token_cache import digests_of, token_cache
from qlora.lora.adapter import active_adapter
from qlora.lora.unload import unload
from qlora.model.base import base_info, ranks_of
from qlora.model.preference_loss import PreferenceLoss
from qlora.system.errors import InputError
from qlora.system.files import make_directories, new_file
from qlora.system.versions import versions
from qlora.training.fingerprint import base_fingerprint
from qlora.training.preferences import Preferences, score_all

FORMAT = 1  # increase it when the same rows and reference give other values


def prepare_preferences(
    config: RunConfig,
    model: nn.Module,
    accelerator: Accelerator,
    data: Sequence[Sequence[Example]],
    say: Callable[[str], Any],
) -> Preferences | None:
    """The loss of a run's preferences; None: it learns from single answers.

    Args:
        model: the base without an adapter; so it is afterwards.
        data: training and held-out examples, which get the reference's log-probabilities.
    Raises:
        InputError: --reference-adapter cannot be read, or does not fit the base.
    """
    own = config.preference
    if own.objective == "sft":
        return None
    constants = own.constants()
    maths = PreferenceLoss(own.objective, **constants)
    found = Preferences(maths, own.reference_each_step, settings={"objective": own.objective, **constants})
    if not maths.needs_reference:
        return found
    name = ""
    if own.reference_adapter is not None:
        saved = read_adapter(own.reference_adapter)
        if saved.config.starts_from_base:
            raise InputError(
                f"--reference-adapter {own.reference_adapter} changes the base (--init {saved.config.init}); "
                "merge it, and train on the merged model."
            )
        name = found.settings["reference_adapter"] = adapter_digest(saved)
        load_adapter(model, own.reference_adapter, str(config.model.model), say)
        found.reference = active_adapter(model)
    if not own.reference_each_step:
        started = time.perf_counter()
        done = [add_reference(model, rows, accelerator, config.data.packing, name) for rows in data if len(rows)]
        how = "read from the token cache" if all(done) else "computed"
        took = f"{time.perf_counter() - started:.1f} s"
        say(f"the reference's log-probabilities of {sum(map(len, data)):,} rows: {how} in {took}")
    if found.reference is not None:
        unload(model)
    return found


def add_reference(
    model: nn.Module, examples: Sequence[Example], accelerator: Accelerator, packing: bool, name: str
) -> bool:
    """Let the examples bring the log-probabilities that the model as it is gives them; whether they were cached.

    Args:
        name: identifies the model's adapter; "" = none.
    """
    assert isinstance(examples, Examples)
    data = hashlib.sha256(digests_of(examples).tobytes()).hexdigest()
    own = [str(base_info(model).compute_dtype), accelerator.device.type, packing, name]
    key = [FORMAT, data, base_fingerprint(model), *own, versions("torch", "transformers")]
    file = token_cache() / f"reference-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}" / "log_p.bin"
    values = _read_values(file, len(examples))
    was_there = not ranks_of(model, accelerator).max(values is None, accelerator.device)
    if not was_there:
        scores = score_all(model, examples, accelerator, 0, packing)
        assert scores is not None  # nothing asks to stop
        values = scores.numpy().astype(np.float32)
        if accelerator.is_main_process:
            content = values.tobytes()
            with suppress(OSError):  # it is computed again at the next start
                make_directories(file.parent)
                with new_file(file) as staging:
                    staging.write_bytes(content + _check(content))
    examples.reference = values
    return was_there


def _read_values(file: Path, num_rows: int) -> np.ndarray | None:
    """(num_rows, 2) fp32; None: the file is missing or damaged."""
    try:
        whole = file.read_bytes()
    except OSError:
        return None
    content = whole[:-4]
    if len(content) != 8 * num_rows or _check(content) != whole[-4:]:
        return None
    return np.frombuffer(content, np.float32).reshape(-1, 2)


def _check(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def adapter_digest(saved: SavedAdapter) -> str:
    """Identity of an adapter's values and settings."""
    digest = hashlib.sha256(repr(saved.config).encode())
    for name, tensor in sorted(saved.state.items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
