"""Compare the ways of merging an adapter: drift, exact match and seconds.

    python -m benchmarks.merge_drift --model M --adapter out --data held_out.jsonl --calibration train.jsonl \\
        [--match json] [--max-examples 30] [--max-new-tokens 100]

    base + adapter         nothing merged
    dequantized, bf16      the default of `python -m qlora merge`
    original, bf16         --base original
    4 bits                 --save-4bit, calibrated on the built-in texts
    4 bits, own data       --save-4bit --calibration
    4 bits, nearest        every weight rounded to the nearest code of new scales, as in plain quantization

Drift is measured against base + adapter in fp32, on the built-in texts and on the first 1,024 tokens of --data;
exact match on greedy answers to the first --max-examples of --data. Seconds are those of the merge alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from eval.exact_match import exact_match
from qlora.adapters.provenance import trained_base
from qlora.cli.exits import run
from qlora.config.merge import MergeOptions
from qlora.data.readers import read_records
from qlora.export.drift import load_drift_texts
from qlora.export.merge import measure_merged, merge_adapter
from qlora.export.mixture import read_mixture
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.gptq import requantize
from qlora.quant.library import Params4bit
from qlora.quant.weight import quantization_of, quantize_weight
from qlora.system.device import best_device


def round_to_nearest(target: torch.Tensor, base: Params4bit, moment: torch.Tensor) -> Params4bit:
    """Replacement for `requantize`: quantize the merged weight again."""
    return quantize_weight(target, quantization_of(base))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True, help="held-out data, for drift and exact match")
    parser.add_argument("--calibration", required=True, help="training data, to choose the 4-bit codes")
    parser.add_argument("--match", choices=("text", "json"), default="text")
    parser.add_argument("--max-examples", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=100)
    options = parser.parse_args(argv)

    tokenizer, mixture = load_tokenizer(options.model), read_mixture([options.adapter])
    quant = trained_base(options.adapter, options.model).quantization
    records = read_records(options.data)[: options.max_examples]

    def score(network: Any) -> str:
        found = exact_match(network, tokenizer, records, options.match, options.max_new_tokens)
        return f"{sum(p.correct for p in found)}/{len(found)}"

    table = Table("model", "KL", "same token", "perplexity", "KL on data", "same token", "exact match", "seconds")
    network = load_base_model(options.model, quant is not None, quant, device=best_device())
    mixture.load_onto(network)
    table.add_row("base + adapter", *["—"] * 5, score(network), "—")
    del network
    merges: dict[str, dict[str, Any]] = {
        "dequantized, bf16": {},
        "original, bf16": {"base": "original"},
        "4 bits": {"save_4bit": True},
        "4 bits, own data": {"save_4bit": True, "calibration": options.calibration},
        "4 bits, nearest": {"save_4bit": True},
    }
    for name, settings in merges.items():
        save_4bit = "save_4bit" in settings
        with tempfile.TemporaryDirectory() as folder:
            merged, start = Path(folder) / "merged", time.perf_counter()
            instead = round_to_nearest if name == "4 bits, nearest" else requantize
            with mock.patch("qlora.export.merged_weights.requantize", instead):
                merge_adapter(options.model, options.adapter, str(merged), MergeOptions(drift=False, **settings))
            seconds = time.perf_counter() - start
            network = load_base_model(str(merged), save_4bit, device=best_device())
            context, matched = network.config.max_position_embeddings, score(network)
            del network
            cells = []
            for source in (None, options.data):
                texts = load_drift_texts(tokenizer, source, context)
                drift = measure_merged(options.model, mixture, merged, save_4bit, texts)
                cells += [f"{drift.mean_kl:.2e}", f"{drift.greedy_agreement:.1%}"]
                if source is None:
                    cells.append(f"{drift.adapter_perplexity:.2f} → {drift.merged_perplexity:.2f}")
        table.add_row(name, *cells, matched, f"{seconds:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
