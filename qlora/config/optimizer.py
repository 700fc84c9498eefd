"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.settings import ABOVE_ZERO, Settings, at_least


@dataclass
class OptimizerConfig(Settings):
    """Optimizer and learning rate."""

    learning_rate: Annotated[float, ABOVE_ZERO] = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up: down to zero as a cosine or a line, or constant."""
    warmup_steps: Annotated[int | None, at_least(0)] = None
    """Optimizer steps over which the learning rate rises from zero; default: 10, or a tenth of a shorter run."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, at_least(0, infinite=True)] = 1.0
    """Clip the adapter's gradient to this norm; 0 = never."""
    optim: Literal["auto", "adamw", "paged_adamw_32bit", "paged_adamw_8bit"] = "auto"
    """auto: paged_adamw_32bit on CUDA, else fused adamw."""
