"""Measure a model on held-out data; imports qlora, never the reverse.

In a checkout this folder is the package `eval`. A wheel installs it as `qlora.evaluation`, the name under which
`qlora eval` always runs it (qlora/cli/commands/eval.py). So its files use relative imports.
"""

from qlora.cli.program import program

PROGRAM = "python -m eval" if __name__ == "eval" else program("eval")  # the name on help pages
