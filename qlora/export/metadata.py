"""What a merged model's directory holds besides its weights: configs, tokenizer, template.

transformers 4 takes the rotary base from `rope_theta` (it reads 10,000 where only transformers 5's
`rope_parameters` is written) and the dtype from `torch_dtype`; both versions' names are written. The tokenizer's
class and its extra special tokens get the names that both versions read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from qlora.data.chat_template import fallback_template
from qlora.data.tokenizer_files import read_tokenizer_files
from qlora.export.gguf_vocabulary import stop_ids
from qlora.export.merged_weights import DenseWriter, PackedWriter
from qlora.export.mixture import Mixture
from qlora.lora.full_parameters import vocabulary_names
from qlora.model.hf_config import load_config, metadata_directory
from qlora.model.skeleton import empty_model
from qlora.model.tokenizer import load_tokenizer


def write_metadata(model: str, mixture: Mixture, directory: Path, writer: DenseWriter | PackedWriter) -> None:
    """Write everything that a merged model needs next to its weights.

    Args:
        model: the base: directory, hub id or .gguf.
    """
    config = load_config(model)
    config.tie_word_embeddings = config.tie_word_embeddings and not mixture.untied
    config.vocab_size = writer.shapes[vocabulary_names(empty_model(model))[0]][0]
    tokenizer_files = read_tokenizer_files(mixture.adapters[0].directory) if mixture.is_plain else {}
    _write_all(model, config, writer.quantization_config, tokenizer_files, directory)


def write_base_metadata(model: str, quantization: dict[str, Any], directory: Path) -> None:
    """Write everything that a quantized base needs next to its weights.

    Args:
        quantization: the entry of config.json.
    """
    _write_all(model, load_config(model), quantization, {}, directory)


def _write_all(
    model: str,
    config: Any,
    quantization: dict[str, Any] | None,
    tokenizer_files: dict[str, bytes],
    directory: Path,
) -> None:
    """Write configs, tokenizer and template; `tokenizer_files` replace the base's."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = quantization
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    change_json(directory / "config.json", lambda written: legacy_config_keys(written) | written)
    base = metadata_directory(model)
    tokenizer = _write_tokenizer(model, base, tokenizer_files, directory)
    _write_generation_config(config, base / "generation_config.json", directory, set(stop_ids(tokenizer)))


def legacy_config_keys(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 4's keys for the content of a config.json of transformers 5.

    Models with a rotary embedding per kind of layer (Gemma 3) keep their global one in `rope_theta` and
    `rope_scaling`, the one of sliding windows in `rope_local_base_freq`.
    """
    legacy = {"torch_dtype": config["dtype"]} if "dtype" in config else {}
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:
        local = rope.get("sliding_attention") or {}
        legacy |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        legacy |= {key: rope[key]} if key in rope else {}
    if rope:
        scaling = {key: value for key, value in rope.items() if key not in legacy}
        legacy["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else scaling
    return legacy


def _write_tokenizer(model: str, base: Path, own_files: dict[str, bytes], directory: Path) -> Any:
    """Write the tokenizer that was trained with, as its own files where it is the base's, and return it."""
    tokenizer = load_tokenizer(model)
    tokenizer.save_pretrained(directory)
    # With new tokens, the adapter's. Else the base's own, which all of its readers know.
    for name, content in (own_files or read_tokenizer_files(base)).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    tokenizer = load_tokenizer(str(directory))
    if tokenizer.chat_template is None:  # training used the fallback
        tokenizer.chat_template = fallback_template(tokenizer)
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template)
    change_json(directory / "tokenizer_config.json", _named_as_before)
    return tokenizer


def _named_as_before(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json with the names that transformers 4 and 5 both read."""
    named = dict(config)
    if named.get("tokenizer_class") == "TokenizersBackend":
        named["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(named.get("extra_special_tokens"), list):
        named["additional_special_tokens"] = named.pop("extra_special_tokens")
    return named


def _write_generation_config(config: Any, base: Path, directory: Path, stops: set[int]) -> None:
    """Write generation_config.json: the base's, which also stops at every token that training taught as an end."""
    from transformers import GenerationConfig

    target = directory / "generation_config.json"
    # Copied, not loaded: transformers refuses to save some configs that it loads (a temperature without sampling).
    if base.is_file():
        shutil.copy(base, target)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(directory)

    def with_stops(written: dict[str, Any]) -> dict[str, Any]:
        own = written.get("eos_token_id")
        known = own if isinstance(own, list) else [] if own is None else [own]
        both = [*known, *sorted(stops - set(known))]
        return written | ({"eos_token_id": both[0] if len(both) == 1 else both} if both != known else {})

    change_json(target, with_stops)


def change_json(file: Path, change: Any) -> None:
    """Rewrite a JSON file if `change` of its content is another."""
    content = json.loads(file.read_text(encoding="utf-8"))
    changed = change(content)
    if changed != content:
        file.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
