"""Settings of what a run learns: answers, or preferences between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from qlora.config.fields import flag_of
from qlora.config.settings import ABOVE_ZERO, Settings, at_least, between
from qlora.system.errors import InputError

Objective = Literal["sft", "dpo", "ipo", "orpo", "simpo", "kto"]
REFERRING = ("dpo", "ipo", "kto")
# Setting -> the objectives that it means something to.
MEANT_FOR = {
    "beta": ("dpo", "ipo", "orpo", "simpo", "kto"),
    "label_smoothing": ("dpo",),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_adapter": REFERRING,
    "reference_each_step": REFERRING,
}


@dataclass
class PreferenceConfig(Settings):
    """Objective."""

    objective: Objective = "sft"
    """Learn answers (sft), pairs of a chosen and a rejected answer (dpo, ipo, orpo, simpo), or good and bad
    answers (kto)."""
    beta: Annotated[float | None, ABOVE_ZERO] = None
    """Strength: how closely dpo, ipo and kto keep to the reference, orpo's weight of the odds, simpo's scale of
    rewards; default: 0.1, for simpo 2."""
    label_smoothing: Annotated[float, between(0, 0.5, "a share from 0 to below 0.5")] = 0.0
    """dpo: the share of pairs taken to be the wrong way round."""
    simpo_gamma: Annotated[float, at_least(0)] = 1.0
    """simpo: the margin that a chosen answer's reward should have."""
    desirable_weight: Annotated[float, ABOVE_ZERO] = 1.0
    """kto: weight of the good answers."""
    undesirable_weight: Annotated[float, ABOVE_ZERO] = 1.0
    """kto: weight of the bad ones."""
    reference_adapter: str | None = None
    """dpo, ipo, kto: measure against the base with this adapter instead of the base alone."""
    reference_each_step: bool = False
    """dpo, ipo, kto: compute the reference in each step, instead of once before training into the cache."""

    @property
    def strength(self) -> float:
        """--beta, or its default for the objective."""
        return self.beta or (2.0 if self.objective == "simpo" else 0.1)

    def constants(self) -> dict[str, float]:
        """The objective's constants by name."""
        constants = {name: getattr(self, name) for name in list(MEANT_FOR)[1:5] if self._means(name)}
        return {"beta": self.strength} | constants

    def check_objective(self) -> None:
        """Whether every setting means something to the objective.

        Raises:
            InputError: names one that does not.
        """
        fresh = PreferenceConfig()
        for name, objectives in MEANT_FOR.items():
            if getattr(self, name) != getattr(fresh, name) and not self._means(name):
                raise InputError(
                    f"{flag_of(name)} means nothing to --objective {self.objective}; leave it out, or pass "
                    f"--objective {' or '.join(objectives)}."
                )

    def _means(self, name: str) -> bool:
        return self.objective in MEANT_FOR[name]
