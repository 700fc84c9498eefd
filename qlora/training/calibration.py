"""Which texts the 4-bit codes of a base are chosen on, as --calibrate says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.example import Example
from qlora.data.order import sources_of
from qlora.model.calibrate import calibrate_base, choose_texts
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError


def calibrated(
    model: str,
    quant: QuantConfig,
    calibrate: str,
    num_tokens: int,
    examples: Sequence[Example],
    encoder: Encoder,
    compute_dtype: str,
    device: torch.device,
    say: Callable[[str], Any] = print,
) -> QuantConfig:
    """`quant` with the calibration that was asked for; the base is then in the cache.

    Args:
        calibrate: "auto", or a file of rows.
        num_tokens: of text to choose codes on.
        examples: the training data, for "auto", of which each source gives its first rows.
        encoder: for the file's rows.
        say: receives what came out; for "auto" also why the nearest codes stay.
    Raises:
        InputError: as `calibrate_base`, for a file.
    """
    if calibrate != "auto":
        rows = load_examples(Sources([calibrate], [], None, 0.0, 0), encoder, say)[0]
        return _calibrate(model, quant, choose_texts(rows, num_tokens), compute_dtype, device, say)
    try:
        return _calibrate(model, quant, _first_rows(examples, num_tokens), compute_dtype, device, say)
    except InputError as error:
        say(f"calibrate auto: {error} The nearest codes stay.")
        return quant


def _first_rows(examples: Sequence[Example], num_tokens: int) -> list[Example]:
    """The first rows of each source, in proportion to the rows that an epoch sees of it."""
    sources, chosen, start = sources_of(examples), list[Example](), 0
    total = sum(num_rows * weight for num_rows, weight in sources)
    for num_rows, weight in sources:
        rows = (examples[i] for i in range(start, start + num_rows))
        chosen += choose_texts(rows, round(num_tokens * num_rows * weight / total))
        start += num_rows
    return chosen


def _calibrate(
    model: str,
    quant: QuantConfig,
    texts: Sequence[Example],
    compute_dtype: str,
    device: torch.device,
    say: Callable[[str], Any],
) -> QuantConfig:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal or console.is_jupyter) as bar:
        task = bar.add_task("choosing 4-bit codes", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        named, found = calibrate_base(model, texts, quant, compute_dtype, device, show)
    say(str(found))
    return named
