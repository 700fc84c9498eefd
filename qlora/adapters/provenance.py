"""Read from an adapter's files which base it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qlora.adapters.files import is_one_file, recorded_quantization, weights_file
from qlora.adapters.peft_files import read_adapter
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG
from qlora.system.redact import redact
from qlora.system.wording import explain


def adapter_quantization(adapter: str) -> QuantConfig | None:
    """How the base was quantized when the adapter was trained; None for a 16-bit base.

    Other tools' adapters do not say; then it is QLoRA's default, NF4 with double quantization.
    """
    weights = weights_file(Path(adapter))
    try:
        recorded = recorded_quantization(Path(adapter))
        if recorded is None:
            return QuantConfig()
        fields = json.loads(recorded)
        return None if fields is None else QuantConfig(**fields)
    except (ValueError, TypeError, RecursionError, InputError) as error:
        raise InputError(
            f"{weights} has no base_quantization that reads ({explain(error)}); save it again."
        ) from error


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
