"""English prose and code that every Python carries: its own language reference, as `help()` shows it."""

from __future__ import annotations

import random
from importlib import import_module

PIECE = 900  # characters


def general_texts() -> list[str]:
    """Pieces of the reference, in an order that is always the same; empty where Python lacks it."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    texts = [" ".join(text.split()) for _, text in sorted(topics.items())]
    pieces = [text[start : start + PIECE] for text in texts for start in range(0, len(text) - PIECE + 1, PIECE)]
    random.Random(0).shuffle(pieces)
    return pieces
