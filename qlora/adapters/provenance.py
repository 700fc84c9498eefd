"""What an adapter's files say about the base it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora.adapters.peft_files import read_adapter
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.redact import redact
from qlora.system.wording import explain


def adapter_quantization(adapter: str) -> QuantConfig | None:
    """How the base was quantized when the adapter was trained; None for a 16-bit base.

    Adapters of other tools do not say; NF4 with double quantization is taken, as QLoRA's default.
    """
    from safetensors import SafetensorError, safe_open

    weights = Path(adapter) / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            recorded = (file.metadata() or {}).get("base_quantization")
        if recorded is None:
            return QuantConfig()
        fields = json.loads(recorded)
        return None if fields is None else QuantConfig(**fields)
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{weights} has no base_quantization that reads ({explain(error)}); save it again."
        ) from error


def base_model_of(adapter: str, say: Callable[[str], Any] = print) -> str:
    """The base that an adapter names, for `merge` without --model: said aloud, for the name is the file's.

    An adapter may come from anyone, so its word reads nothing that is not on this machine: a directory, a
    .gguf file, or a hub id that was downloaded before.

    Args:
        say: hears which base it is and where the name stands.
    Raises:
        InputError: no name, or one of nothing that is here.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name = read_adapter(adapter).description.get("base_model_name_or_path")
    source = Path(adapter) / CONFIG
    if not isinstance(name, str) or not name:
        raise InputError(f"The adapter {adapter} names no base; pass --model.")
    shown = redact(name) if name.isprintable() else repr(name)
    on_network = name.startswith(("//", "\\\\"))  # a share of another machine, on Windows
    is_here = name.isprintable() and not on_network and os.path.exists(os.path.expanduser(name))
    with suppress(HFValidationError):  # it need not be a hub id
        is_here = is_here or isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not is_here:
        raise InputError(
            f"{source} names {shown:.200} as its base, which is not on this machine; pass --model with the base's "
            "path, or with that name to download it."
        )
    say(f"base model: {shown}, as {source} names it")
    return name
