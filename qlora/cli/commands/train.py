"""Fine-tune a 4-bit model with LoRA, or answer a prompt with one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora.cli.commands.generate import answer
from qlora.cli.program import program
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.system.errors import InputError
from qlora.system.startup import collection_paused, importing_transformers

if TYPE_CHECKING:
    from qlora.training.run import TrainingRun


def main(argv: Sequence[str]) -> None:
    config = parse_args(RunConfig, program("train"), argv)
    if config.generate.prompt is not None:
        answer_prompt(config)
        return
    with start_run(config, argv) as run:
        run.train()
    publish(run)


def answer_prompt(config: RunConfig) -> None:
    """Answer --prompt instead of training."""
    if config.parallel.is_split:
        raise InputError(f"{config.parallel.flag} is for training; leave it out to answer a --prompt.")
    answer(config.model, config.generate, config.data.chat_template, config.loop.seed)


def start_run(config: RunConfig, argv: Sequence[str]) -> TrainingRun:
    """The run that the settings describe, to be entered.

    Args:
        argv: the command line, for run.json.
    Raises:
        InputError: settings are missing or do not go together, or the hub would not take the adapter.
    """
    started = time.monotonic()
    with collection_paused(), importing_transformers():
        from qlora import api
    return api.start_run(config, argv, started=started)


def publish(run: TrainingRun) -> None:
    """Upload the adapter where --push-to-hub says."""
    from qlora import api

    api.publish(run)
