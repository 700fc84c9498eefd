"""Answer a prompt with a base model and an adapter: train with --prompt."""

from qlora.cli.commands.train import main

__all__ = ["main"]
