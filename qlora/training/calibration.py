"""Which texts the 4-bit codes of a base are chosen on, as --calibrate says; `qlora.load_base_model` for Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from qlora.config.model import CalibrationConfig
from qlora.config.quantize import QuantizeConfig
from qlora.data.dataset import Encoder, Source, Sources, load_examples
from qlora.data.example import Example
from qlora.data.order import sources_of
from qlora.data.python_rows import PythonRows
from qlora.model import load
from qlora.model.calibrate import calibrate_base, choose_texts
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError


def load_base_model(
    model: str,
    use_4bit: bool = True,
    quant: QuantConfig | None = None,
    compute_dtype: str = "auto",
    device: torch.device | str = "cpu",
    cache: bool = True,
    calibrate: Any = "off",
    calibrate_tokens: int = CalibrationConfig.calibrate_tokens,
) -> Any:
    """Load a frozen base model, in 4 bits with the nearest codes or with codes chosen on text.

    Args:
        model, use_4bit, quant, compute_dtype, device, cache: as for `qlora.model.load.load_base_model`.
        calibrate: "off", or rows to choose the 4-bit codes on, as `qlora quantize --calibrate` does: a path or hub
            id, a list of dicts, a pandas DataFrame or a datasets.Dataset. What came out is printed.
        calibrate_tokens: of text to choose codes on.
    Raises:
        InputError: as there and as `calibrate_base`; or the arguments do not go together.
    """
    if isinstance(calibrate, str) and calibrate == "off":
        return load.load_base_model(model, use_4bit, quant, compute_dtype, device, cache)
    if isinstance(calibrate, str) and calibrate == "auto":
        raise InputError("calibrate='auto' is for training; give rows, the path of a file of rows, or 'off'.")
    quant = quant or QuantConfig()
    for is_there, what in (
        (not use_4bit, "use_4bit=False"),
        (not cache, "cache=False"),
        (quant.calibration, "a quant that names a calibration"),
    ):
        if is_there:
            raise InputError(f"calibrate and {what} do not go together; leave one out.")
    rows = str(calibrate) if isinstance(calibrate, (str, os.PathLike)) else PythonRows("calibrate", calibrate)
    encoder = Encoder(load_tokenizer(model), QuantizeConfig.max_length)
    named = calibrated(model, quant, rows, calibrate_tokens, [], encoder, compute_dtype, torch.device(device))
    return load.load_base_model(model, True, named, compute_dtype, device)


def calibrated(
    model: str,
    quant: QuantConfig,
    calibrate: Source,
    num_tokens: int,
    examples: Sequence[Example],
    encoder: Encoder,
    compute_dtype: str,
    device: torch.device,
    say: Callable[[str], Any] = print,
) -> QuantConfig:
    """`quant` with the calibration that was asked for; the base is then in the cache.

    Args:
        calibrate: "auto", or a source of rows.
        num_tokens: of text to choose codes on.
        examples: the training data, for "auto", of which each source gives its first rows.
        encoder: for the source's rows.
        say: receives what came out; for "auto" also why the nearest codes stay.
    Raises:
        InputError: as `calibrate_base`, for a source.
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
