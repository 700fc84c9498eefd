"""Read a model's config.json or a .gguf's metadata; custom code is never run."""

from __future__ import annotations

import math
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
from qlora.system.digests import damaged_file, make_verified
from qlora.system.errors import InputError
from qlora.system.files import read_json
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
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
SHARES = ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "partial_rotary_factor")

CALIBRATION = "qlora_calibration"  # in a checkpoint's config.json: what is known of its calibration


def load_config(model: str) -> Any:
    """The transformers config of a model; custom code is never run."""
    from transformers import AutoConfig

    path = metadata_directory(model)
    file = path / "config.json"
    declared = read_json(file, REMEDY)
    refuse_own_code(declared, file)
    if "configuration_files" in declared:  # transformers would read one of those instead of this file
        raise InputError(f"{file} names other configuration_files; remove that entry.")
    with named_failure(
        f"{file} describes a model that cannot be loaded", "download it again, or choose another model"
    ):
        # What transformers computes from a value out of its range, it may compute as it reads the file. A window
        # of 0 may stand for none: only the config object knows.
        _check_values({k: v for k, v in declared.items() if (k, v) != ("sliding_window", 0)})
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        text = config.get_text_config()
        names = (*SIZE_LIMITS, *EPSILONS, *SHARES, "pad_token_id", "num_experts_per_tok", "hidden_act")
        values = {name: getattr(text, name, None) for name in names} | _rotary_values(text)
        if not getattr(text, "use_sliding_window", True):  # Qwen2-MoE's window is 0 then
            del values["sliding_window"]
        _check_values(values)
    return config


def _rotary_values(config: Any) -> dict[str, Any]:
    """Values that only matter, or are only there, for a model with rotary positions."""
    rotary = getattr(config, "rope_parameters", None)
    if not isinstance(rotary, dict):
        return {}
    each = [rotary, *(values for values in rotary.values() if isinstance(values, dict))]  # some have one per kind
    thetas = [value for values in each if (value := values.get("rope_theta")) is not None]
    return {"rope_theta": min(thetas, default=None), "rotary head_dim": getattr(config, "head_dim", None)}


def _check_values(values: dict[str, Any]) -> None:
    """Check numbers of a config that would fail, or compute nonsense, somewhere inside the model.

    A config can also declare modules of any size; making them takes time and, for buffers, memory.

    Raises:
        ValueError: names the first that is out of its range.
    """

    def check(name: str, is_good: Any, wanted: str) -> None:
        value = values.get(name)
        if isinstance(value, (int, float)) and not is_good(value):  # a wrong type is transformers' to report
            raise ValueError(f"{name.rpartition(' ')[2]} is {value}, but should be {wanted}")

    for field, limit in SIZE_LIMITS.items():
        least = 0 if field == "num_hidden_layers" else 1
        check(field, lambda n, least=least, limit=limit: least <= n <= limit, f"{least} to {limit}")
    for field in EPSILONS:
        check(field, lambda x: 0 <= x < 1, "at least 0 and below 1")
    for field in SHARES:
        check(field, lambda x: 0 <= x <= 1, "0 to 1")
    check("rope_theta", lambda x: 0 < x < math.inf, "above 0")
    check("rotary head_dim", lambda n: n % 2 == 0, "even, since positions rotate pairs")
    size, heads, kv_heads = (
        values.get(name) for name in ("vocab_size", "num_attention_heads", "num_key_value_heads")
    )
    if isinstance(size, int):
        check("pad_token_id", lambda n: -size <= n < size, f"below vocab_size, which is {size}")
    if isinstance(heads, int) and isinstance(kv_heads, int):
        check(
            "num_key_value_heads", lambda n: heads % n == 0, f"a divisor of num_attention_heads, which is {heads}"
        )
    for field in ("num_experts", "num_local_experts", "n_routed_experts"):
        most = values.get(field)
        if isinstance(most, int):
            check("num_experts_per_tok", lambda n, most=most: 1 <= n <= most, f"1 to {field}, which is {most}")
    activation = values.get("hidden_act")
    if activation is not None and not _is_activation(activation):
        raise ValueError(f"hidden_act is {activation!r:.60}, which transformers does not know")


def _is_activation(name: Any) -> bool:
    from transformers.activations import ACT2FN

    return isinstance(name, str) and name in ACT2FN


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
    if damaged_file(target) is not None:
        from transformers import AutoConfig, AutoTokenizer

        make_cache()
        GGUFSource(path)  # names a damaged file or an unknown architecture before transformers trips on it
        failure = named_failure(f"{path} has no config or tokenizer that can be loaded", "download it again")
        with tempfile.TemporaryDirectory() as alone, failure:
            # In its own directory: transformers would use a tokenizer.json that happens to be next to it.
            Path(alone, "model.gguf").symlink_to(path.resolve())
            config = AutoConfig.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf", trust_remote_code=False)
        make_verified(
            target, lambda staging: (config.save_pretrained(staging), tokenizer.save_pretrained(staging))
        )
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
    known = getattr(config, CALIBRATION, None) or {}
    return QuantConfig(
        entries.get("bnb_4bit_quant_type", "fp4"),
        entries.get("bnb_4bit_use_double_quant", False),
        calibration=known.get("id", "") if isinstance(known, dict) else "",
    )


def generation_config_of(network: Any, directory: Path) -> Any:
    from transformers import GenerationConfig

    file = directory / "generation_config.json"
    if file.is_file():
        with named_failure(f"{file} is not valid", "fix or remove it"):
            config = GenerationConfig.from_pretrained(directory)
            stops = config.eos_token_id
            if not all(type(stop) is int for stop in (stops if isinstance(stops, list) else [stops or 0])):
                raise ValueError(f"eos_token_id is {stops!r:.60}")
            return config
    return GenerationConfig.from_model_config(network.config)
