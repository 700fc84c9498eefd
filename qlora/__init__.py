"""QLoRA fine-tuning that is right and fast on any machine, GPU or not.

Names are imported when first used, so that `import qlora` and `--help` stay instant.
"""

import os
from importlib import import_module
from typing import Any

# Threads that compute together wait for each other by spinning, for a millisecond where nothing else is said.
# Where another program has one of the cores, they so keep each other from theirs: training took 25 times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # read where torch is imported, so not if that came first

__version__ = "0.1.0"
_HOME = {
    "LoRAConfig": "config",
    "LoRAModel": "lora_model",
    "get_lora_model": "lora_model",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "load_base_model": "model",
    "load_tokenizer": "model",
    "inject_lora": "injection",
    "freeze_base": "injection",
    "unfreeze": "injection",
    "lora_parameters": "injection",
    "base_parameters": "injection",
    "lora_state_dict": "injection",
    "load_lora_state_dict": "injection",
    "merge_lora": "injection",
    "unmerge_lora": "injection",
    "parameter_summary": "injection",
    "count_trainable_parameters": "injection",
    "count_parameters": "injection",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qlora' has no attribute {name!r}")
    return getattr(import_module(f"qlora.{_HOME[name]}"), name)
