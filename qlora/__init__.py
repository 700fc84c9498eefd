"""QLoRA fine-tuning that is right and fast on any machine, GPU or not.

Names are imported when first used, so that `import qlora` and `--help` stay instant.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_HOME = {
    "InputError": "system.errors",
    # the base
    "load_base_model": "training.calibration",
    "load_tokenizer": "model.tokenizer",
    "QuantConfig": "quant.weight",
    # adapters
    "LoRAConfig": "config.lora",
    "LoRAModel": "adapters.model",
    "get_lora_model": "adapters.model",
    "create_lora_model": "adapters.model",
    "save_adapter": "adapters.peft_files",
    "load_adapter": "adapters.load",
    "inject_lora": "lora.adapter",
    "freeze_base": "lora.trainable",
    "unfreeze": "lora.trainable",
    "lora_parameters": "lora.trainable",
    "base_parameters": "lora.trainable",
    "lora_state_dict": "lora.state",
    "load_lora_state_dict": "lora.state",
    "merge_lora": "lora.trainable",
    "unmerge_lora": "lora.trainable",
    "merge_and_unload": "lora.unload",
    "unload": "lora.unload",
    "LoRALinear": "lora.layer",
    "register_linear": "quant.linear",
    "LinearShape": "quant.linear",
    "Part": "quant.parts",
    "parameter_summary": "lora.trainable",
    "count_trainable_parameters": "lora.trainable",
    "count_parameters": "lora.trainable",
    # jobs
    "RunConfig": "config.run",
    "train": "api",
    "Run": "api",
    "plan": "api",
    "generate": "generation",
    "merge_adapter": "export.merge",
    "export_gguf": "export.gguf",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(f"qlora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
