"""An Ollama Modelfile for a .gguf file: what it is made of and where answers end.

It has no TEMPLATE: Ollama goes by the chat template inside the .gguf.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.export.gguf_vocabulary import stop_ids
from qlora.system.errors import InputError
from qlora.system.files import new_file


def write_modelfile(gguf: Path, tokenizer: Any, base: str | None = None) -> None:
    """Write `Modelfile` beside a .gguf file.

    Args:
        gguf: a model; or an adapter alone, where `base` is the name of the .gguf it is loaded onto.
    Raises:
        InputError: there is a Modelfile already.
    """
    target = check_modelfile(gguf)
    parts = [f"FROM ./{gguf.name}"] if base is None else [f"FROM ./{base}", f"ADAPTER ./{gguf.name}"]
    ends = tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))
    with new_file(target) as file:
        file.write_text("\n".join([*parts, *(f"PARAMETER stop {json.dumps(end)}" for end in ends)]) + "\n")


def check_modelfile(gguf: Path) -> Path:
    """Where the Modelfile of a .gguf file goes.

    Raises:
        InputError: there is one already.
    """
    target = gguf.parent / "Modelfile"
    if target.exists():
        raise InputError(f"{target} exists already; remove it or choose another directory for --output.")
    return target
