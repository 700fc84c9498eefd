"""python -m eval perplexity: how well a model predicts text, per token, word and byte.

With nats_d = -log p(document d) and its tokens, words and bytes counted,

    perplexity per token = exp(sum of nats_d / sum of tokens_d)      likewise per word and per byte
    bits per byte        = sum of nats_d / (ln 2 * sum of bytes_d)

Models with different tokenizers are comparable per word or byte, not per token.

A document (a .txt or .md file, a "text" record, or any --text-column) begins as in training: with BOS if the
tokenizer puts it before a text, else with its own first token, which is then not scored. --document-start lm-eval
scores it as lm-eval's loglikelihood_rolling does, after BOS (else EOS), whether training puts one or not. Windows
of --max-length tokens score disjoint parts of it. In a conversation the assistant's turns are scored as in
training, each with its end-of-turn token; a long one continues in further windows instead of being cut. Words and
bytes are those of the scored tokens' text.

Intervals come from resampling documents. A single document is resampled by its windows; their words and bytes are
estimated in proportion to their tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora.config.parse import parse_args
from qlora.config.settings import Count
from qlora.data.conversations import to_messages
from qlora.data.readers import read_records
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError
from qlora.system.wording import quote

from . import PROGRAM
from .model import EvalConfig, Window, load_evaluated, require, share_out
from .results import check_output, print_scores, write_result
from .scores import Score, mean_score


@dataclass
class PerplexityConfig(EvalConfig):
    """Perplexity of a text or data set: per token, word and byte."""

    text_column: str | None = None
    """Use this column of --data as documents and ignore the others."""
    train_on: Literal["completion", "all"] = "completion"
    """In conversations, score the assistant's turns only, or every token."""
    document_start: Literal["training", "lm-eval"] = "training"
    """A document begins as in training (with BOS if the tokenizer puts it), or as in lm-eval (BOS, else EOS)."""
    max_length: Window = 2048
    """Window in tokens, at most the model's limit."""
    stride: Count = 0
    """Tokens scored per further window; the rest of --max-length is context. 0 = --max-length."""


@dataclass
class Document:
    """One item to score: ids t_0 .. t_T, which of them count, and the words and bytes of those."""

    origin: str
    ids: list[int]
    is_scored: list[bool]
    words: int
    bytes: int


@dataclass
class DocumentScore:
    """Sums over one document; `windows`: (nats, tokens) per window."""

    nats: float
    tokens: int
    windows: list[tuple[float, int]]


def read_texts(source: str, text_column: str | None = None) -> list[Record]:
    """The records of a data set, or a .txt or .md file as a single document."""
    if Path(source).suffix.lower() not in (".txt", ".md"):
        records = read_records(source)
        return records if text_column is None else [_column(record, text_column) for record in records]
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as UTF-8 text ({error}); check path and encoding.") from error
    return [Record({"text": text}, source)]


def _column(record: Record, column: str) -> Record:
    text = record.fields.get(column)
    if not isinstance(text, str):
        known = ", ".join(map(quote, record.fields))
        raise BadRow(record.origin, f"the column {column!r} holds {quote(text)}, not text; columns here: {known}.")
    return Record({"text": text}, record.origin)


def encode_documents(
    records: Sequence[Record], tokenizer: Any, train_on: str = "completion", document_start: str = "training"
) -> list[Document]:
    """Encode records as rows of ids; those without a token to score are dropped.

    Args:
        train_on, document_start: as in `PerplexityConfig`.
    Raises:
        InputError: nothing is left.
    """
    from qlora.data.chat_template import bos_ids
    from qlora.data.row_encoder import RowEncoder

    from .likelihood import prefix_token, text_ids

    encoder, documents = RowEncoder(tokenizer), []
    for record in records:
        messages = to_messages(record)
        if messages[0]["role"] == "document":
            text = messages[0]["content"]
            if document_start == "lm-eval":
                ids = [prefix_token(tokenizer), *text_ids(text, tokenizer)]
            else:
                ids = encoder.encode_prompt(messages)
                if ids[:1] != bos_ids(tokenizer):  # nothing is before the first token
                    text = text.removeprefix(tokenizer.decode(ids[:1]))
            is_scored = [True] * len(ids)
        else:
            ids, is_scored = encoder.encode_row(messages, train_on, record.origin)
            scored = [token for token, counts in zip(ids[1:], is_scored[1:], strict=True) if counts]
            text = tokenizer.decode(scored, skip_special_tokens=True)
        if any(is_scored[1:]):
            words = len(re.split(r"\s+", text))  # as in lm-eval, with empty ones at the ends
            documents.append(Document(record.origin, ids, is_scored, words, len(text.encode("utf-8"))))
    if not documents:
        raise InputError("The data has no token to score; give texts that are not empty.")
    return documents


def describe_start(tokenizer: Any, document_start: str) -> str:
    """What stands before a document's first scored token."""
    from qlora.data.chat_template import bos_ids

    from .likelihood import prefix_token

    if document_start == "lm-eval":
        return f"Documents follow {tokenizer.decode(prefix_token(tokenizer))}, as in lm-eval."
    if bos := bos_ids(tokenizer):
        return f"Documents begin with {tokenizer.decode(bos)}, as in training."
    return "Documents begin with their own first token, as in training; it is not scored."


def score_documents(
    model: Any, documents: Sequence[Document], max_length: int, stride: int, budget: int, is_shown: bool = False
) -> list[DocumentScore]:
    """Nats and tokens of every document; arguments as for `rolling_windows` and `score_passages`."""
    from .likelihood import rolling_windows, score_passages

    passages, places = [], []
    for index, document in enumerate(documents):
        for passage in rolling_windows(document.ids, document.is_scored, max_length, stride):
            passages.append(passage)
            places.append(index)
    found = [DocumentScore(0.0, 0, []) for _ in documents]
    for index, passage, sums in zip(
        places, passages, score_passages(model, passages, budget, is_shown), strict=True
    ):
        nats, tokens, score = -sums[0][0], len(passage.tokens), found[index]
        score.nats, score.tokens = score.nats + nats, score.tokens + tokens
        score.windows.append((nats, tokens))
    return found


def perplexity_scores(
    documents: Sequence[Document], found: Sequence[DocumentScore], seed: int = 0, confidence: float = 0.95
) -> list[Score]:
    """Perplexities, bits per byte and nats per token, with their intervals."""
    import numpy as np

    nats = [score.nats for score in found]
    units: dict[str, list[float]] = {
        "token": [score.tokens for score in found],
        "word": [document.words for document in documents],
        "byte": [document.bytes for document in documents],
    }
    is_single = len(found) == 1
    if is_single:
        windows, tokens = found[0].windows, found[0].tokens
        nats = [window[0] for window in windows]
        units = {name: [n * counts[0] / tokens for _, n in windows] for name, counts in units.items()}

    def score(name: str, unit: str, transform: Any) -> Score:
        scored = mean_score(name, nats, units[unit], transform, seed, confidence)
        return replace(scored, method="bootstrap of windows" if is_single else "bootstrap of documents")

    with np.errstate(over="ignore"):
        return [
            score("perplexity per token", "token", np.exp),
            score("perplexity per word", "word", np.exp),
            score("perplexity per byte", "byte", np.exp),
            score("bits per byte", "byte", lambda x: x / math.log(2)),
            score("nats per token", "token", None),
        ]


def main(argv: Sequence[str]) -> None:
    config = parse_args(PerplexityConfig, f"{PROGRAM} perplexity", argv)
    require(config, "model", "data")
    check_output(config.output)
    records = read_texts(config.data or "", config.text_column)[: config.max_examples or None]
    model, tokenizer, accelerator = load_evaluated(config)
    from .likelihood import longest_window

    documents = encode_documents(records, tokenizer, config.train_on, config.document_start)
    max_length = longest_window(model, config.max_length)
    stride = min(config.stride or max_length, max_length)
    is_shown = accelerator.is_main_process

    def compute(mine: list[Document]) -> list[DocumentScore]:
        return score_documents(model, mine, max_length, stride, config.batch_size * max_length, is_shown)

    lengths = [len(document.ids) for document in documents]
    found = share_out(accelerator, documents, compute, lengths)
    if not accelerator.is_main_process:
        return
    scores = perplexity_scores(documents, found, config.seed, config.confidence)
    rows = [
        {"id": d.origin, "log_likelihood": -s.nats, "tokens": s.tokens, "words": d.words, "bytes": d.bytes}
        for d, s in zip(documents, found, strict=True)
    ]
    pairing = {f"log p per {unit}": ("log_likelihood", f"{unit}s") for unit in ("byte", "token")}
    settings = {**asdict(config), "max_length": max_length, "stride": stride}
    write_result(config.output, "perplexity", scores, settings, rows, pairing)
    print_scores(f"Perplexity of {config.data}: {sum(s.tokens for s in found):,} tokens", scores)
    if any(to_messages(record)[0]["role"] == "document" for record in records):
        print(describe_start(tokenizer, config.document_start))
    if len(documents) < len(records):
        print(f"{len(records) - len(documents)} of {len(records)} records have nothing to score and are left out")
