"""Random mixes of train.py's flags for tools/crash.py.

A mix takes one alternative of each group; "" leaves the defaults. Every mix must be accepted, so alternatives that
refuse each other share a group.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

GROUPS: tuple[tuple[str, ...], ...] = (
    # how A and B start and are used
    (
        "", "", "--use-dora", "--init pissa", "--init loftq", "--use-rslora --rank 4",
        "--use-adalora --rank 4 --adalora-interval 2",
    ),
    # what trains
    ("", "--target-modules all-linear", "--layers 0", "--bias lora_only", "--new-tokens <note>",
     "--modules-to-save lm_head"),
    # the base
    ("", "", "--no-4bit", "--no-double-quant", "--quant-type fp4"),
    # the optimizer
    ("", "--lora-plus-ratio 4", "--optim adamw", "--adapter-dtype float32",
     "--max-grad-norm 0.5 --weight-decay 0.1"),
    # the data
    ("", "--no-packing", "--no-token-cache", "--train-on all", "--on-long drop --max-length 48",
     "--objective dpo --data {work}/pairs.jsonl", "--objective kto --data {work}/labels.jsonl",
     "--objective dpo --data {work}/pairs.jsonl --reference-each-step"),
    # what happens beside the steps
    ("", "--load-best", "--early-stopping-patience 2 --load-best", "--score-examples 2", "--sample-every 3"),
    ("", "--gradient-checkpointing on", "--keep-last 1", "--save-every 3"),
)  # fmt: skip
PROCESSES = ("1", "1", "2", "2 --shard fsdp")


@dataclass(frozen=True)
class Mix:
    """Flags that are added to the job's, and how many processes run it."""

    flags: tuple[str, ...] = ()
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.processes} process(es), {' '.join(self.flags) or 'no more flags'}"


def draw_mix(rng: random.Random) -> Mix:
    """A mix; the later of two equal flags counts on the command line."""
    chosen = [rng.choice(group) for group in GROUPS]
    processes, *more = rng.choice(PROCESSES).split()
    return Mix(tuple(" ".join([*chosen, *more]).split()), int(processes))
