"""Score a base model, an adapter or a merged model on held-out data.

A wheel installs eval/ as `qlora.evaluation`. A checkout keeps it beside qlora/; it is loaded by path under the
same name, so that an eval/ in the current directory is never imported by mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import qlora
from qlora.system.errors import InputError

NAME = "qlora.evaluation"
CHECKOUT = Path(__file__).resolve().parents[3] / "eval"


def find_evaluation() -> None:
    """Make `qlora.evaluation` importable.

    Raises:
        InputError: not installed, and not a checkout.
    """
    if find_spec(NAME) is not None:
        return
    file = CHECKOUT / "__init__.py"
    spec = spec_from_file_location(NAME, file, submodule_search_locations=[str(CHECKOUT)])
    if spec is None or spec.loader is None or not file.is_file():
        raise InputError(f"The evaluation code is missing: neither {NAME} nor {CHECKOUT} exists. Reinstall qlora.")
    module = module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    qlora.evaluation = module  # type: ignore[attr-defined]  # as an import statement would


def main(argv: Sequence[str]) -> None:
    find_evaluation()
    import_module(f"{NAME}.__main__").main(argv)
