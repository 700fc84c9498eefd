"""Measure a model on held-out data; imports qlora, never the reverse.

In a checkout this folder is the package `eval`. A wheel installs it as `qlora.evaluation`, and `qlora eval` runs
it under that name everywhere (qlora/cli/commands/eval.py). So its files import each other relatively.
"""

from qlora.cli.program import program

PROGRAM = "python -m eval" if __name__ == "eval" else program("eval")  # the name that help pages show
