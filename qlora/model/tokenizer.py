"""Load a tokenizer; its files are checked first, and custom code is never run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qlora.model.hf_config import load_config, metadata_directory, named_failure, refuse_own_code
from qlora.model.safetensors_source import REMEDY
from qlora.system.errors import InputError
from qlora.system.files import read_json


def load_tokenizer(model: str, adapter: str | Path | None = None) -> Any:
    """The model's tokenizer with its chat template, if it has one; custom code is never run.

    Args:
        adapter: an adapter's directory; if it holds a tokenizer (new tokens, a chat template), that one is loaded,
            since the adapter was trained with it.
    """
    from transformers import AutoTokenizer

    config = load_config(model)  # transformers reads it too, and would blame the tokenizer for what is wrong in it
    path, where = metadata_directory(model), f"--model {model}"
    if adapter is not None and Path(adapter, "tokenizer_config.json").is_file():
        path, where = Path(adapter), f"The adapter {adapter}"
    ignored: dict[str, Any] = dict(_check_tokenizer_files(path))
    with named_failure(
        f"{where} has no tokenizer that can be loaded", "give a directory with its tokenizer's files"
    ):
        if not (path / "config.json").is_file():  # an adapter's: the class may depend on the kind of model
            ignored["config"] = config
        if _is_bare_llama(path, config):
            return _load_llama(path, ignored)
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **ignored)


def _is_bare_llama(path: Path, config: Any) -> bool:
    """Whether a LLaMA's directory has its tokenizer as tokenizer.model alone, and says nothing of BOS.

    Its tokenizer puts BOS first, and did so in transformers 4; transformers 5 leaves BOS out, and without a
    tokenizer_class also the space before a text.
    """
    file = path / "tokenizer_config.json"
    declared = read_json(file, REMEDY) if file.is_file() else {}
    kinds = (None, "LlamaTokenizer", "LlamaTokenizerFast")
    is_alone = (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file()
    says_nothing = declared.get("add_bos_token") is None and declared.get("tokenizer_class") in kinds
    return is_alone and says_nothing and config.model_type in ("llama", "mistral", "mixtral")


def _load_llama(path: Path, ignored: dict[str, Any]) -> Any:
    from transformers import LlamaTokenizer

    if find_spec("sentencepiece") is None:
        raise InputError(f"{path}/tokenizer.model takes sentencepiece to read; pip install sentencepiece.")
    return LlamaTokenizer.from_pretrained(path, add_bos_token=True, **ignored)


def _check_tokenizer_files(path: Path) -> dict[str, None]:
    """Refuse entries that would run code or read files elsewhere when the tokenizer of a directory is made.

    transformers passes every entry of tokenizer_config.json to the tokenizer class, and every entry of
    special_tokens_map.json after it has added the directory's own files.

    Returns:
        Arguments that replace paths, which old files keep from their author's machine, by None.
    """
    file = path / "tokenizer_config.json"
    declared = read_json(file, REMEDY) if file.is_file() else {}
    refuse_own_code(declared, file)
    own = path / "config.json"
    for source, entries in ((file, declared), (own, read_json(own, REMEDY) if own.is_file() else {})):
        if entries.get("tokenizer_class") is not None:
            _check_tokenizer_class(entries["tokenizer_class"], source)
    paths = [key for key in ("vocab", "merges", "tokenizer_object") if isinstance(declared.get(key), str)]
    paths += [key for key in ("init_inputs", "fast_tokenizer_files") if declared.get(key)]
    if paths:
        raise InputError(f"{file} names other files to read as {paths[0]}; remove that entry.")
    special = path / "special_tokens_map.json"
    tokens = read_json(special, REMEDY) if special.is_file() else {}
    others = [name for name in tokens if not name.endswith(("_token", "_tokens"))]
    if others:
        raise InputError(f"{special} holds {others[0]!r:.60}, which is not a special token; remove that entry.")
    return dict.fromkeys(key for key in declared if key.endswith("_file"))


def _check_tokenizer_class(name: Any, file: Path) -> None:
    """Accept only tokenizers: transformers would load any of its classes, even a model's."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with named_failure(f"{file} has no good tokenizer_class", "correct that entry"):
        found: Any = tokenizer_class_from_name(name)
    if found is None and not (file.parent / "tokenizer.json").is_file():  # any fast tokenizer can read it
        raise InputError(
            f"{file} wants the tokenizer_class {name!r:.60}, which is none of transformers' own; it would take "
            "trust_remote_code, which is off: use a model with a built-in tokenizer."
        )
    # If an optional package is missing, transformers has a placeholder that says so when used.
    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    if found is not None and not is_tokenizer and not hasattr(found, "_backends"):
        raise InputError(f"{file} has the tokenizer_class {name!r:.60}, which is not a tokenizer; correct it.")
