"""Versions of the libraries."""

from __future__ import annotations

import platform

PACKAGES = ("torch", "bitsandbytes", "transformers", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of Python, of what computes, and of this project."""
    from importlib.metadata import version

    import qlora

    found = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return found | {"qlora": qlora.__version__}
