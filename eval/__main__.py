"""Score a base model, an adapter or a merged model on held-out data.

perplexity    of any text or data set: per token, per word, per byte
choice        the most likely of several answers: MMLU, ARC, HellaSwag and similar
exact_match   generated answers against expected ones
preference    the chosen answer of a pair against the rejected one
harness       any task of lm-eval
compare       two results, or two models, item by item
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from qlora.cli.exits import run
from qlora.system.errors import InputError

from . import PROGRAM

COMMANDS = ("perplexity", "choice", "exact_match", "preference", "harness", "compare")


def main(argv: Sequence[str]) -> None:
    if list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(f"usage: {PROGRAM} COMMAND [--help] [OPTIONS]\n\n{__doc__}")
    elif argv[0] in COMMANDS:
        import_module(f".{argv[0]}", __package__).main(argv[1:])
    else:
        raise InputError(f"Unknown evaluation {argv[0]!r}; choose {', '.join(COMMANDS)}.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
