"""Read a model's config.json or a .gguf's metadata; custom code is never run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.model.fingerprint import fingerprint_files
from qlora.model.gguf_source import GGUFSource
from qlora.model.resolve import resolve_model
from qlora.model.safetensors_source import REMEDY
from qlora.quant.weight import QuantConfig
from qlora.system.cache import cache_directory, make_cache
from qlora.system.errors import InputError
from qlora.system.files import new_directory, read_json
from qlora.system.wording import explain

SIZE_LIMITS = {  # for values of a model's config: many times today's largest
    "num_hidden_layers": 2**12,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "head_dim": 2**16,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "vocab_size": 2**28,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "n_routed_experts": 2**14,
}


def load_config(model: str) -> Any:
    """The transformers config of a model; custom code is never run."""
    from transformers import AutoConfig

    path = metadata_directory(model)
    file = path / "config.json"
    declared = read_json(file, REMEDY)
    refuse_own_code(declared, file)
    if "configuration_files" in declared:  # transformers would read one of those instead of this file
        raise InputError(f"{file} names other configuration_files; remove that entry.")
    with named_failure(f"{file} describes no model that loads", "download it again, or choose another model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        # A config can declare modules of any size; making them takes time and, for buffers, memory.
        for field, limit in SIZE_LIMITS.items():
            value = getattr(config, field, None)
            if isinstance(value, int) and value > limit:
                raise ValueError(f"{field} is {value}, more than {limit}")
    return config


def refuse_own_code(declared: dict[str, Any], file: Path) -> None:
    if "auto_map" in declared:
        raise InputError(
            f"{file} brings code of its own to run (auto_map), which would take trust_remote_code; it is off, and "
            "only built-in architectures and tokenizers load."
        )


@contextmanager
def named_failure(what: str, remedy: str) -> Iterator[None]:
    """Turn any error that transformers raises on untrusted files into an InputError.

    Its parsers check little, so a wrong type may surface as any exception. The tokenizers library raises plain
    Exceptions or, if it panicked, not even those.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or "Panic" in type(error).__name__:
            raise InputError(f"{what} ({explain(error)}); {remedy}.") from error
        raise


def metadata_directory(model: str) -> Path:
    """The directory with config.json and the tokenizer; for a .gguf they are converted once and cached.

    For a hub id no weights are downloaded.
    """
    path = resolve_model(model, weights=False)
    if path.suffix != ".gguf":
        return path
    target = cache_directory() / f"gguf-{fingerprint_files([path])}"
    if not target.is_dir():
        from transformers import AutoConfig, AutoTokenizer

        make_cache()

        GGUFSource(path)  # names a damaged file or an unknown architecture before transformers trips on it
        failure = named_failure(f"{path} has no config or tokenizer that loads", "download it again")
        with tempfile.TemporaryDirectory() as alone, failure:
            # In its own directory: transformers would use a tokenizer.json that happens to be next to it.
            Path(alone, "model.gguf").symlink_to(path.resolve())
            config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        with new_directory(target) as staging:
            config.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    return target


def declared_quantization(config: Any, model: str) -> QuantConfig | None:
    """How the weights are quantized according to a checkpoint's config; None: they are not."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    entries = declared if isinstance(declared, dict) else declared.to_dict()
    if not entries.get("load_in_4bit"):
        method = entries.get("quant_method")
        raise InputError(
            f"--model {model} is stored in another quantization ({method!r:.60}); choose the original."
        )
    return QuantConfig(entries.get("bnb_4bit_quant_type", "fp4"), entries.get("bnb_4bit_use_double_quant", False))


def generation_config_of(network: Any, directory: Path) -> Any:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if file.is_file():
        with named_failure(f"{file} is not valid", "mend or remove it"):
            config = GenerationConfig.from_pretrained(directory)
            stops = config.eos_token_id
            if not all(type(stop) is int for stop in (stops if isinstance(stops, list) else [stops or 0])):
                raise ValueError(f"eos_token_id is {stops!r:.60}")
            return config
    return GenerationConfig.from_model_config(network.config)
