"""Prompts to answer during training, from the data or from a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from qlora.data.conversations import to_messages
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.readers import read_records
from qlora.data.row_encoder import RowEncoder
from qlora.data.rows import Record


@dataclass
class Prompt:
    """A prompt as token ids and as text, and the expected answer if known."""

    ids: list[int]
    text: str
    expected: str | None = None


def prompt_of(example: Example, tokenizer: Any) -> Prompt:
    """Make a prompt of a training row: the tokens before its last answer, which is the expected answer.

    Of a pair that is the chosen one; a bad answer (KTO) is not expected.
    If the row is all targets (a document, --train-on all), its first half is the prompt.
    """
    is_wanted, example = example.is_wanted, example.sequences[0]
    ids, targets = example.input_ids.tolist(), example.targets.tolist()
    last = max(place for place, target in enumerate(targets) if target != IGNORE_INDEX)
    masked = [place for place in range(last) if targets[place] == IGNORE_INDEX]
    first = masked[-1] + 1 if masked else len(ids) // 2
    expected = str(tokenizer.decode(targets[first : last + 1], skip_special_tokens=True)).strip()
    return Prompt(ids[: first + 1], _text_of(ids[: first + 1], tokenizer), expected if is_wanted else None)


def choose_prompts(
    examples: Sequence[Example], tokenizer: Any, count: int, source: str | None = None, parse_special: bool = False
) -> list[Prompt]:
    """The first `count` prompts of a data file, or else of `examples`.

    Args:
        source: records as for `read_records`; also a prompt or messages without an answer.
    Raises:
        InputError: `source` cannot be read, or a record has no prompt.
    """
    if count == 0:
        return []
    if source is None:
        return [prompt_of(examples[number], tokenizer) for number in range(min(count, len(examples)))]
    encoder = RowEncoder(tokenizer, parse_special)
    return [_read_prompt(record, encoder) for record in islice(read_records(source), count)]


def _read_prompt(record: Record, encoder: RowEncoder) -> Prompt:
    question, expected = _question(record.fields), None
    if question is not None:  # with an empty answer it reads like any record
        messages = to_messages(Record({"prompt": question, "completion": "-"}, record.origin))[:-1]
    else:
        messages = to_messages(record)
        if messages[-1]["role"] == "assistant":
            expected = messages.pop()["content"].strip()
    ids = encoder.encode_prompt(messages)
    return Prompt(ids, _text_of(ids, encoder.tokenizer), expected)


def _question(fields: dict[str, Any]) -> Any:
    """A prompt, or messages that end with a user's turn, without an answer; None for a training record."""
    turns = fields.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user":
        return turns
    return fields.get("prompt") if "completion" not in fields else None


def _text_of(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
