"""Settings of an answer to a prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlora.system.errors import InputError


@dataclass
class GenerateConfig:
    """Prompt mode."""

    prompt: str | None = None
    """Answer this instead of training."""
    adapter: str | None = None
    """Adapter directory: to answer with, or to start training from."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 = greedy; higher is more random."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}; give --max-new-tokens 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}; give --temperature 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; give --top-p a number above 0, at most 1.")
