"""The table of variants; lora/variant.py says how to add one."""

from __future__ import annotations

from qlora.config.lora import LoRAConfig
from qlora.lora.adalora import AdaLoRA
from qlora.lora.dora import DoRA
from qlora.lora.variant import Variant

VARIANTS: tuple[Variant, ...] = (DoRA(), AdaLoRA())
PEFT_TYPES = ("LORA", *(variant.peft_type for variant in VARIANTS if variant.peft_type != "LORA"))


def variant_of(config: LoRAConfig) -> Variant | None:
    """The variant of an adapter; None for LoRA. LoRAConfig allows one at a time."""
    return next((variant for variant in VARIANTS if getattr(config, variant.flag)), None)
