"""Read from an adapter's files which base it was trained on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora.adapters.files import is_one_file, recorded_quantization, weights_file
from qlora.adapters.peft_files import read_adapter
from qlora.model.hf_config import declared_quantization, load_config
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG
from qlora.system.files import read_json
from qlora.system.redact import redact
from qlora.system.wording import explain

RUN = "run.json"
NAMES_4BIT = re.compile(r"(?i)[-_.](bnb-?)?(4-?bit|nf4)\b")


@dataclass(frozen=True)
class TrainedBase:
    """What is known of the base that an adapter was trained on.

    Attributes:
        quantization: how it was quantized; None = 16 bits.
        is_known: False if nothing says so and 16 bits are assumed, as PEFT loads a base by its name.
    """

    quantization: QuantConfig | None
    is_known: bool


def trained_base(adapter: str, model: str | None = None) -> TrainedBase:
    """The base of an adapter, by the first that tells: its weights file, the base's name, the base's own config.

    This project records the quantization in the adapter's weights file. Other tools do not; a name such as
    "...-bnb-4bit" or a base that is stored in 4 bits tells it for them.

    Args:
        model: the base that it is used with: directory, hub id or .gguf; None = unknown.
    Raises:
        InputError: a record that cannot be read.
    """
    recorded = recorded_base(adapter)
    if recorded is not None:
        return recorded
    if NAMES_4BIT.search(str(read_adapter(adapter).description.get("base_model_name_or_path"))):
        return TrainedBase(QuantConfig(), True)
    stored = None if model is None else declared_quantization(load_config(model), model)
    return TrainedBase(stored, stored is not None)


def recorded_base(adapter: str) -> TrainedBase | None:
    """The base that an adapter's weights file records; None: it records none. Its tensors are not read.

    Raises:
        InputError: a record that cannot be read.
    """
    weights = weights_file(Path(adapter))
    try:
        recorded = recorded_quantization(Path(adapter))
        if recorded is None:
            return None
        fields = json.loads(recorded)
        return TrainedBase(None if fields is None else QuantConfig(**fields), True)
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise InputError(
            f"{weights} has no base_quantization that reads ({explain(error)}); save it again."
        ) from error


def calibration_of(adapters: Iterable[str | Path], quant: QuantConfig) -> QuantConfig:
    """`quant` with the calibration of the base that these adapters were trained on.

    Adapters that record no base, or one in 16 bits, go with any.

    Raises:
        InputError: two were trained on different ones.
    """
    known = {str(adapter): recorded_base(str(adapter)) for adapter in adapters}
    bases = {name: base.quantization for name, base in known.items() if base is not None}
    ids = {name: base.calibration for name, base in bases.items() if base is not None}
    different = set(ids.values())
    if len(different) > 1:
        listed = ", ".join(f"{name}: {found or 'none'}" for name, found in ids.items())
        raise InputError(f"These adapters need one base, but its calibrations differ ({listed}); use one of them.")
    return replace(quant, calibration=different.pop() if different else "")


def _kept_path(adapter: Path) -> str | None:
    """The base's absolute path, which a run keeps next to its adapter."""
    if not (adapter / RUN).is_file():
        return None
    facts = read_json(adapter / RUN, f"delete {adapter / RUN}").get("facts")
    path = facts.get("base_path") if isinstance(facts, dict) else None
    return path if isinstance(path, str) and path else None


def base_model_of(adapter: str, say: Callable[[str], Any] = print) -> str:
    """The base that an adapter names, for `merge` without --model; reported, since the name comes from a file.

    Adapters are untrusted, so the name may only refer to something on this machine: a directory, a .gguf file, or
    a hub id that was downloaded before.

    Args:
        say: called with the base and the file that names it.
    Raises:
        InputError: there is no name, or it refers to nothing on this machine.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = read_adapter(adapter).description.get("base_model_name_or_path")
    source = Path(adapter) if is_one_file(Path(adapter)) else Path(adapter) / CONFIG
    if not isinstance(name, str) or not name:
        raise InputError(f"The adapter {adapter} names no base; pass --model.")
    kept = _kept_path(Path(adapter))
    if not os.path.exists(name) and kept is not None and Path(kept).parts[-1:] == Path(name).parts[-1:]:
        name, source = kept, Path(adapter) / RUN  # a relative --model, from another directory
    shown = redact(name) if name.isprintable() else repr(name)
    on_network = name.startswith(("//", "\\\\"))  # a share of another machine, on Windows
    is_here = name.isprintable() and not on_network and os.path.exists(os.path.expanduser(name))
    with suppress(HFValidationError):  # it may not be a hub id
        is_here = is_here or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not is_here:
        raise InputError(
            f"{source} names {shown:.200} as its base, which is not on this machine; pass --model with the base's "
            "path, or with that name to download it."
        )
    say(f"base model: {shown}, as {source} names it")
    return name


def blocks_of_base(adapter: str) -> int | None:
    """How many decoder layers the base of an adapter has, if its config.json is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(InputError, OSError, ValueError):
        name = base_model_of(adapter, say=lambda line: None)
        file = Path(os.path.expanduser(name), "config.json")
        cached = None if file.is_file() else try_to_load_from_cache(name, "config.json")
        config = read_json(Path(cached) if isinstance(cached, str) else file, "")
        inner = config.get("text_config")
        for section in (config, inner if isinstance(inner, dict) else {}):
            for key in ("num_hidden_layers", "n_layer", "num_layers"):
                if type(section.get(key)) is int:
                    return int(section[key])
    return None
