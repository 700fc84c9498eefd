"""Write a model, or an adapter alone, as a .gguf file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class ExportConfig:
    """Write a model, or an adapter alone, as a .gguf file for llama.cpp, Ollama and LM Studio."""

    model: str | None = None
    """The base or a merged model; default: the base that the adapter names."""
    adapter: str | None = None
    """Adapter directory to merge during the export."""
    adapter_only: bool = False
    """Write only the adapter, for use with a .gguf of its base."""
    output: str = "model.gguf"
    """Output file; must not exist."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    """Encoding of the matrices; with --adapter-only f32, f16, bf16 or q8_0."""
    pre_tokenizer: str | None = None
    """llama.cpp's name for the tokenizer's splitter, if it is not recognized."""
    modelfile: bool = False
    """Write an Ollama Modelfile next to it."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(ExportConfig, program("export"), argv)
    if config.model is None and config.adapter is None:
        raise InputError("Nothing to export; pass --model, --adapter or both.")
    if config.adapter_only and config.adapter is None:
        raise InputError("--adapter-only needs an adapter; pass --adapter with the output directory of a run.")
    from qlora.adapters.provenance import base_model_of
    from qlora.export.gguf import export_adapter, export_gguf
    from qlora.export.ollama import check_modelfile, write_modelfile
    from qlora.model.tokenizer import load_tokenizer

    model, output = config.model or base_model_of(str(config.adapter)), Path(config.output)
    if config.modelfile:
        check_modelfile(output)
    if config.adapter_only:
        export_adapter(model, str(config.adapter), output, config.type)
        print(
            f"Adapter saved to {output}. Load it with a .gguf of its base: llama-cli -m BASE.gguf --lora {output}"
        )
    else:
        export_gguf(model, output, config.type, config.adapter, config.pre_tokenizer)
        print(f"Model saved to {output} ({output.stat().st_size / 1e6:,.1f} MB)")
    if config.modelfile:
        base = f"{Path(model).stem}.gguf" if config.adapter_only else None
        write_modelfile(output, load_tokenizer(model, config.adapter), base)
        print("Modelfile saved next to it; the chat template is in the .gguf")
        if base is not None:
            print(f"It expects the base next to it as {base}")
