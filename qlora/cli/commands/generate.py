"""Answer a prompt with a base model, with or without an adapter."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora.cli.program import program
from qlora.config.generate import GenerateConfig
from qlora.config.model import ModelConfig
from qlora.config.parse import parse_args
from qlora.system.errors import InputError
from qlora.system.startup import collection_paused, importing_transformers


@dataclass
class AnswerConfig:
    """Answer a --prompt with a base model, with or without an --adapter."""

    model: ModelConfig = field(default_factory=ModelConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    chat_template: str | None = None
    """Jinja file of the chat template; by default the adapter's, else the model's."""
    seed: int = 42
    """Seeds the answer at a --temperature above 0."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(AnswerConfig, program("generate"), argv)
    answer(config.model, config.generate, config.chat_template, config.seed)


def answer(model_config: ModelConfig, asked: GenerateConfig, chat_template: str | None, seed: int) -> None:
    """Print the answer to `asked.prompt` as it is made.

    Raises:
        InputError: no model or prompt is given, or one of the files cannot be used.
    """
    if model_config.model is None or asked.prompt is None:
        raise InputError("--model and --prompt are required.")
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.adapters.load import check_before_loading, load_adapter
        from qlora.adapters.provenance import calibration_of
        from qlora.data.row_encoder import set_chat_template
        from qlora.generation import stream_answer
        from qlora.model.load import load_base_model
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    m, name = model_config, model_config.model
    adapters = [] if asked.adapter is None else [asked.adapter]
    check_before_loading(adapters, name)
    quant = calibration_of(adapters, QuantConfig(m.quant_type, m.double_quant))
    model = load_base_model(name, m.use_4bit, quant, m.compute_dtype, best_device(), m.cache)
    if asked.adapter is not None:
        load_adapter(model, asked.adapter, name)
    tokenizer = load_tokenizer(name, asked.adapter)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    if tokenizer.chat_template is None:
        does = (
            "continues the prompt as plain text"
            if asked.raw
            else "answers in a plain one; --raw continues the text"
        )
        print(f"note: the model has no chat template and {does}", file=sys.stderr)
    stream_answer(model, tokenizer, asked.prompt, asked.sampling(seed), asked.raw)
