"""Where an adapter's tensors and settings are: in a directory with PEFT's two files, or in one .safetensors file.

One file carries its settings in its own metadata, under one key, since safetensors writes several in random order
and equal adapters should give equal files. A file without them may lie next to an adapter_config.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import read_json
from qlora.system.wording import explain

QUANTIZATION = "base_quantization"  # in the metadata, and in one file's settings
SETTINGS = "adapter_config"  # in the metadata of an adapter in one file


def adapter_path(path: Any, to_write: bool = False) -> Path:
    """A given path as a Path.

    Raises:
        InputError: it is none; or, to write, it names a file, or something within one.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise InputError(f"The adapter's path is {path!r:.80}; give a directory or a .safetensors file.")
    path = Path(path)
    if not to_write:
        return path
    files = [] if is_one_file(path) else [path]
    in_the_way = next((one for one in [*files, *path.parents] if one.is_file()), None)
    if in_the_way is not None:
        raise InputError(f"{in_the_way} is a file; give a directory or a .safetensors file.")
    if files and path.suffix in (".bin", ".pt", ".pth"):
        raise InputError(f"{path} is no kind of file that adapters have; give a directory or a .safetensors file.")
    return path


def is_one_file(path: Path) -> bool:
    """Whether this names an adapter in one file; it need not exist."""
    return path.suffix == ".safetensors" and not path.is_dir()


def weights_file(path: Path) -> Path:
    """The file with the tensors."""
    return path if is_one_file(path) else path / WEIGHTS


def metadata_of(path: Path) -> dict[str, str]:
    """What the tensor file says of itself.

    Raises:
        InputError: the file cannot be read.
    """
    file = weights_file(path)
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is not a complete safetensors file ({explain(error)}); save it again."
        ) from error


def read_description(path: Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    if not is_one_file(path):
        return read_json(path / CONFIG, "save the adapter again", unique_keys=True)
    recorded = metadata_of(path).get(SETTINGS)
    if recorded is None:
        beside = path.parent / CONFIG
        if not beside.is_file():
            raise InputError(
                f"{path} carries no settings; put its {CONFIG} next to it, or save the adapter again."
            )
        return read_json(beside, "save the adapter again", unique_keys=True)
    try:
        description = json.loads(recorded)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has settings that do not read ({explain(error)}); save it again.") from error
    if not isinstance(description, dict):
        raise InputError(f"{path} has settings that are not a JSON object; save the adapter again.")
    return {key: value for key, value in description.items() if key != QUANTIZATION}


def recorded_quantization(path: Path) -> str | None:
    """How the base was quantized, as JSON; None: not recorded."""
    metadata = metadata_of(path)
    if SETTINGS not in metadata:
        return metadata.get(QUANTIZATION)
    settings = json.loads(metadata[SETTINGS])
    return json.dumps(settings[QUANTIZATION]) if QUANTIZATION in settings else None


def metadata_of_one_file(description: dict[str, Any], metadata: dict[str, str]) -> dict[str, str]:
    """The metadata of an adapter in one file, from its settings and a directory's metadata."""
    own = {QUANTIZATION: json.loads(metadata[QUANTIZATION])} if QUANTIZATION in metadata else {}
    return {SETTINGS: json.dumps(dict(sorted({**description, **own}.items())))}
