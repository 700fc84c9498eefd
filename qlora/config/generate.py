"""Settings of answers to prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from qlora.config.settings import Check, Count, Positive, Settings, at_least


@dataclass
class SamplingConfig(Settings):
    """Answers."""

    max_new_tokens: Positive = 256
    """Longest answer, in tokens."""
    temperature: Annotated[float, at_least(0, "0 (greedy) or more")] = 0.0
    """0 = greedy; higher is more random."""
    top_p: Annotated[float, Check("a number above 0, at most 1", lambda x: 0 < x <= 1)] = 1.0
    """Sample from the smallest set of tokens with this much probability."""

    def sampling(self, seed: int) -> Sampling:
        """These settings with the seed of the run."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, seed)


@dataclass
class Sampling(SamplingConfig):
    """How an answer is drawn: greedily at temperature 0, else from the `top_p` nucleus, seeded by `seed`."""

    seed: Count = 0
    """Seeds what is drawn."""
    stop_texts: list[str] = field(default_factory=list)
    """An answer ends before the first of these; for `continue_prompts`."""


@dataclass
class GenerateConfig(SamplingConfig):
    """Prompt mode: answer instead of training."""

    prompt: str | None = None
    """Answer this instead of training."""
    raw: bool = False
    """Continue the prompt as plain text, without a chat template."""
    adapter: str | None = None
    """Adapter directory: to answer with, or to start training from."""
