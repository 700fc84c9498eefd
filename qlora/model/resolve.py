"""Find the files of a model, given as a directory, hub id or .gguf file."""

from __future__ import annotations

import os
from functools import cache as _cache
from pathlib import Path

from qlora.model.gguf_source import GGUFSource
from qlora.model.safetensors_source import SafetensorsSource
from qlora.system.errors import InputError


def resolve_model(model: str, weights: bool = True) -> Path:
    """A local directory or .gguf file for a path or hub id (downloaded through huggingface_hub).

    Args:
        weights: False leaves them on the hub.
    Raises:
        InputError: neither a path nor an id on the hub, or the hub cannot be reached.
    """
    path = Path(os.path.expanduser(model))  # keeps "~nobody" unchanged; pathlib would raise
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise InputError(f"--model {model} is a file but no .gguf; give the model's directory instead.")
        if path.is_dir() and not (path / "config.json").is_file():
            raise InputError(f"--model {model} has no config.json; give a Hugging Face model directory.")
        return path
    if path.suffix == ".gguf" or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"--model {model} does not exist; check the path.")
    return _download(model, weights)


@_cache
def _download(model: str, weights: bool) -> Path:
    """Download the hub's snapshot of a model, without the second copy of the weights that some repositories hold.

    Weights and config come from the same commit.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = _download(model, False).name if weights else None  # a snapshot's directory is named by its commit
    patterns = ["*.json", "*.txt", "*.jinja", "tokenizer.model", *(["*.safetensors"] if weights else [])]
    others = ["consolidated*", "*/*.json", "*/*.txt", "*/*.safetensors"]  # not */*.jinja: a second chat template
    try:
        found = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=others)
        return Path(found)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"--model {model} is neither a local path nor a model the hub could give ({reason}); "
            "check the spelling and the connection."
        ) from error


def open_source(path: Path) -> SafetensorsSource | GGUFSource:
    """The weights of a resolved model."""
    return GGUFSource(path) if path.suffix == ".gguf" else SafetensorsSource(path)
