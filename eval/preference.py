"""python -m eval preference: how often a model finds the chosen answer of a pair likelier than the rejected one.

With p the log-probability of an answer's tokens, its end-of-turn token among them, and m = p / their number,

    accuracy            share of pairs with p of the chosen answer above that of the rejected one
    accuracy per token  the same by m, so that a longer answer is not less likely for its length
    margin              mean of p chosen - p rejected, in nats
    margin per token    the same of m

Equal values count as not chosen. Rows are pairs, as --objective dpo trains them. No reference is involved: a base,
an adapter on it and a merged model are measured alike, and `eval compare` tests two of them pair by pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qlora.config.parse import parse_args

from . import PROGRAM
from .model import EvalConfig, Window, load_evaluated, require
from .results import check_output, print_scores, write_result
from .scores import Score, mean_score, proportion

SCORES = {
    "accuracy": "correct",
    "accuracy per token": "correct_per_token",
    "margin": "margin",
    "margin per token": "margin_per_token",
}


@dataclass
class PreferenceConfig(EvalConfig):
    """Share of pairs whose chosen answer the model finds likelier, and by how much."""

    max_length: Window = 1024
    """Longest answer with its prompt, in tokens; a longer one is cut."""


def evaluate_preferences(config: PreferenceConfig) -> dict[str, Any]:
    """Evaluate; prints the table and writes --output.

    Raises:
        InputError: the model, the adapter or the data cannot be used.
    """
    require(config, "model", "data")
    check_output(config.output)
    from qlora.data.encode import encode_records
    from qlora.data.readers import read_records
    from qlora.training.preferences import score_all

    records = read_records(str(config.data))[: config.max_examples or None]
    model, tokenizer, accelerator = load_evaluated(config)
    pairs, report = encode_records(records, tokenizer, config.max_length, kind="pairs")
    accelerator.print(f"{config.data}: {report}")
    budget = config.batch_size * 2 * max(map(len, pairs))
    log_p = score_all(model, pairs, accelerator, budget, packing=True)
    assert log_p is not None  # nothing asks to stop
    rows: list[dict[str, Any]] = []
    for pair, (chosen, rejected) in zip(pairs, log_p.tolist(), strict=True):
        means = [p / part.num_targets for p, part in zip((chosen, rejected), pair.sequences, strict=True)]
        margins = {"margin": chosen - rejected, "margin_per_token": means[0] - means[1]}
        hits = {name.replace("margin", "correct"): margin > 0 for name, margin in margins.items()}
        rows.append({"id": pair.origin, "chosen": chosen, "rejected": rejected, **margins, **hits})
    scores = score_rows(rows, config.seed, config.confidence)
    if not accelerator.is_main_process:
        return {}
    print_scores(f"preference: {config.data}", scores)
    pairing = {name: [key] for name, key in SCORES.items()}
    return write_result(config.output, "preference", scores, asdict(config), rows, pairing)


def score_rows(rows: Sequence[dict[str, Any]], seed: int = 0, confidence: float = 0.95) -> list[Score]:
    """The scores of the module docstring, with intervals."""
    values = {name: [row[key] for row in rows] for name, key in SCORES.items()}
    return [
        proportion(name, found, confidence)
        if name.startswith("accuracy")
        else mean_score(name, found, seed=seed, confidence=confidence)
        for name, found in values.items()
    ]


def main(argv: Sequence[str]) -> None:
    evaluate_preferences(parse_args(PreferenceConfig, f"{PROGRAM} preference", argv))
