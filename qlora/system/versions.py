"""Versions of this project and of the libraries."""

from __future__ import annotations

import platform

NUMERIC = ("torch", "transformers", "bitsandbytes", "accelerate")  # what the numbers of a run depend on


def versions(*names: str) -> dict[str, str]:
    """name -> version of each package ("python" is one, too); those not installed are left out."""
    from importlib.metadata import PackageNotFoundError, version

    import qlora

    found = {"python": platform.python_version(), "qlora": qlora.__version__}
    for name in names:
        try:
            found[name] = found.get(name) or version(name)
        except PackageNotFoundError:
            continue
    return {name: found[name] for name in names if name in found}
