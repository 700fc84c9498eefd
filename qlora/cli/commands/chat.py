"""Chat with a base model and its adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from qlora.cli.program import program
from qlora.config.generate import SamplingConfig
from qlora.config.loop import LoopConfig
from qlora.config.model import ModelConfig
from qlora.config.parse import parse_args
from qlora.config.settings import Count
from qlora.system.errors import InputError
from qlora.system.startup import collection_paused, importing_transformers


@dataclass
class ChatConfig(SamplingConfig):
    """Chat with a base model and its adapters; /help in the chat lists its commands."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: tuple[str, ...] = ()
    """Adapters, each as DIRECTORY or NAME=DIRECTORY; the first one is active at the start and names the default
    --model."""
    system: str = ""
    """System message."""
    seed: Count = LoopConfig.seed
    """Sampling seed; each answer adds 1."""
    history: str | None = None
    """Save the conversation to this .jsonl file, as training data, and continue its newest conversation."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(ChatConfig, program("chat"), argv)
    if config.model.model is None and not config.adapter:
        raise InputError("Nothing to chat with: pass --model, --adapter or both.")
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.adapters.load import check_before_loading
        from qlora.adapters.model import LoRAModel
        from qlora.adapters.provenance import base_model_of, calibration_of
        from qlora.chat.session import Chat, split_adapter
        from qlora.model.load import load_base_model
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    m, directories = config.model, [split_adapter(text)[1] for text in config.adapter]
    name = m.model or base_model_of(str(directories[0]), lambda text: print(text, file=sys.stderr))
    check_before_loading(directories, name)
    quant = calibration_of(directories, QuantConfig(m.quant_type, m.double_quant))
    model = load_base_model(name, m.use_4bit, quant, m.compute_dtype, best_device(), m.cache)
    session = Chat(LoRAModel(model, base_name=name), name, config.sampling(config.seed), config.system)
    names = [session.load_adapter(text) for text in config.adapter]
    session.model.set_adapter(names[0] if names else None)
    if config.history is not None:
        session.open_history(config.history)
    session.run()
