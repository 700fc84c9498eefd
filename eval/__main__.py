"""python -m eval exact_match: score a base model, an adapter or a merged model on held-out data."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from qlora.config import ComputeDtype, parse_args
from qlora.errors import InputError, run


@dataclass
class ExactMatchConfig:
    """Greedy answers to held-out prompts, compared with the expected ones."""

    model: str | None = None
    """A Hugging Face directory, a hub id, or a .gguf file."""
    adapter: str | None = None
    """Adapter directory; without one the base answers."""
    data: str | None = None
    """Held-out data, in any format that training takes."""
    use_4bit: bool = True
    """Quantize the base to 4 bits; --no-4bit keeps it in bf16."""
    compute_dtype: ComputeDtype = "auto"
    """Dtype of activations."""
    match: Literal["text", "json"] = "text"
    """Compare as text or as JSON values."""
    max_examples: int = 0
    """Only the first so many; 0 = all."""
    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    batch_size: int = 16
    """Prompts decoded together."""
    output: str | None = None
    """Write score and predictions to this JSON file."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        for name, low in (("max_examples", 0), ("max_new_tokens", 1), ("batch_size", 1)):
            if getattr(self, name) < low:
                raise InputError(
                    f"{name} is {getattr(self, name)}; give --{name.replace('_', '-')} {low} or more."
                )


def run_exact_match(argv: Sequence[str]) -> None:
    config = parse_args(ExactMatchConfig, "python -m eval exact_match", argv)
    if config.model is None or config.data is None:
        raise InputError("Something is missing; pass --model and --data.")
    from eval.exact_match import exact_match
    from qlora.adapter import load_adapter
    from qlora.device import best_device
    from qlora.model import load_base_model, load_tokenizer
    from qlora.records import read_records

    records = read_records(config.data)[: config.max_examples or None]
    tokenizer = load_tokenizer(config.model, config.adapter)
    model = load_base_model(
        config.model, config.use_4bit, compute_dtype=config.compute_dtype, device=best_device()
    )
    if config.adapter is not None:
        load_adapter(model, config.adapter, config.model)
    found = exact_match(model, tokenizer, records, config.match, config.max_new_tokens, config.batch_size)
    correct = sum(p.correct for p in found)
    result = {"exact_match": correct / len(found), "correct": correct, "examples": len(found)}
    if config.output is not None:
        predictions = [asdict(p) for p in found]
        Path(config.output).write_text(json.dumps({**result, "predictions": predictions}, indent=2) + "\n")
    print(f"exact match {correct}/{len(found)} = {correct / len(found):.1%}")


def main(argv: Sequence[str]) -> None:
    if list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n\nusage: python -m eval exact_match [--help] [OPTIONS]")
    elif argv[0] == "exact_match":
        run_exact_match(argv[1:])
    else:
        raise InputError(f"Unknown evaluation {argv[0]!r}; choose exact_match.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
