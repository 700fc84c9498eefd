"""Names of an adapter's files, which several rooms read and write. The first two are PEFT's."""

from __future__ import annotations

WEIGHTS, CONFIG, BASE_SHIFT = "adapter_model.safetensors", "adapter_config.json", "base_shift.safetensors"
