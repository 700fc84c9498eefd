"""What choosing the 4-bit codes on texts is worth, before training: losses on held-out rows and on other text.

    python -m benchmarks.calibration --model M --data train.jsonl --eval-data test.jsonl,prose.jsonl \\
        [--tokens 8192] [--rows 60] [--compute-dtype float32]

Bases: 16 bits; NF4 with the nearest codes; NF4 with codes chosen on the training data's first rows ("own", as
`--calibrate auto` does), on general text ("general"), and on half of each ("mix"). For each file of --eval-data:
the loss per target token, and the gap to 16 bits with a 95 % interval over rows (paired, by Student's t).
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.cli.exits import run
from qlora.config.model import ComputeDtype
from qlora.config.parse import parse_args
from qlora.system.errors import InputError


@dataclass
class CalibrationConfig:
    """Losses of a base in 16 bits, NF4, and NF4 calibrated on several kinds of text."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    data: str | None = None
    """Rows to choose codes on."""
    eval_data: str = ""
    """Held-out rows: files, separated by commas."""
    tokens: int = 8192
    """Tokens of text to choose codes on, in every case."""
    rows: int = 60
    """Held-out rows of each file, from its start."""
    max_length: int = 512
    """Longest row, in tokens."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations."""
    debug: bool = False
    """Show the traceback of an error."""


def main(argv: Sequence[str]) -> None:
    config = parse_args(CalibrationConfig, "python -m benchmarks.calibration", argv)
    if config.model is None or config.data is None or not config.eval_data:
        raise InputError("--model, --data and --eval-data are required.")
    import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

    from qlora.data.dataset import Encoder, Sources, load_examples
    from qlora.data.encode import encode_records
    from qlora.data.rows import Record
    from qlora.model.calibrate import calibrate_base, choose_texts
    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer
    from qlora.quant.weight import QuantConfig
    from qlora.system.device import best_device

    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(tokenizer, config.max_length)

    def rows_of(name: str) -> Any:
        return load_examples(Sources([name]), encoder, lambda text: None)[0]

    own = rows_of(config.data)
    records = [Record({"text": text}, "general text") for text in general_texts()]
    general = encode_records(records[: config.tokens // 64], tokenizer, config.max_length)[0]
    half = config.tokens // 2
    texts = {
        "own": choose_texts(own, config.tokens),
        "general": choose_texts(general, config.tokens),
        "mix": choose_texts(own, half) + choose_texts(general, half),
    }
    held_out = {name: rows_of(name)[: config.rows] for name in config.eval_data.split(",")}
    results: dict[str, dict[str, list[tuple[float, int]]]] = {}
    heads = [f"{Path(name).name}, loss | gap to 16 bits | of NF4's" for name in held_out]
    print(f"| base | {' | '.join(heads)} | seconds |")
    print("| --- |" + " --- |" * (3 * len(held_out) + 1))
    for base in ("16 bits", "NF4", *texts):
        started = time.process_time()
        quant = QuantConfig()
        if base in texts:
            quant = calibrate_base(config.model, texts[base], quant, config.compute_dtype, best_device())[0]
        seconds = time.process_time() - started
        network = load_base_model(config.model, base != "16 bits", quant, config.compute_dtype, best_device())
        results[base] = {name: losses(network, rows) for name, rows in held_out.items()}
        cells = []
        for name in held_out:
            cells.append(f"{mean(results[base][name]):.4f}")
            if base == "16 bits":
                cells += ["", ""]
                continue
            gap, spread = paired(results[base][name], results["16 bits"][name])
            plain = paired(results["NF4"][name], results["16 bits"][name])[0]
            cells += [f"{gap:+.4f} ± {spread:.4f}", f"{gap / plain:.0%}"]
        print(f"| {base} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


def general_texts() -> list[str]:
    """English prose and code that every Python carries: pieces of its language reference, in a fixed order."""
    from pydoc_data.topics import topics

    texts = [" ".join(text.split()) for _, text in sorted(topics.items())]
    pieces = [text[start : start + 900] for text in texts for start in range(0, len(text) - 899, 900)]
    random.Random(0).shuffle(pieces)
    return pieces


def losses(network: Any, rows: Sequence[Any]) -> list[tuple[float, int]]:
    """(sum of losses, target tokens) of each row."""
    import torch

    from qlora.data.batches import collate_packed
    from qlora.model.loss import causal_lm_loss

    device = network.get_input_embeddings().weight.device
    found = []
    with torch.inference_mode():
        for row in rows:
            loss, count = causal_lm_loss(network, collate_packed([row]).to(device))
            found.append((float(loss), int(count)))
    return found


def mean(rows: Sequence[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in rows) / sum(count for _, count in rows)


def paired(rows: Sequence[tuple[float, int]], others: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """(difference of the losses per token, half of its 95 % interval over rows: a ratio of sums)."""
    import numpy
    from scipy import stats

    differences = numpy.array([a - b for (a, _), (b, _) in zip(rows, others, strict=True)])
    counts = numpy.array([count for _, count in rows])
    gap = differences.sum() / counts.sum()
    residuals = (differences - gap * counts) / counts.mean()
    spread = stats.t.ppf(0.975, len(rows) - 1) * residuals.std(ddof=1) / numpy.sqrt(len(rows))
    return float(gap), float(spread)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
