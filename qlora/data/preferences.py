"""Rows of preferences as conversations: pairs of a chosen and a rejected answer, or labelled answers (KTO).

What a pair's conversations begin with in common is their prompt: its answers are context. Of a labelled row the
last answer alone is trained.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

import torch

from qlora.data.conversations import to_messages
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.keys import COLUMNS, ROLES, TURN, Note, ignore, match_shape, used_columns
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError
from qlora.system.wording import describe

Kind = Literal["answers", "pairs", "labels"]
Messages = list[dict[str, Any]]
_ANSWERS = {"prompt": "completion", "question": "answer", "instruction": "output"}


def kind_of(objective: str) -> Kind:
    """What rows an objective learns from."""
    return "answers" if objective == "sft" else "labels" if objective == "kto" else "pairs"


def read_row(record: Record, kind: Kind = "answers", note: Note = ignore) -> tuple[list[Messages], bool]:
    """(the conversations of a record: one, or chosen and rejected; whether the answer is wanted).

    Raises:
        BadRow: as `to_messages`; or the record is of another kind.
    """
    if kind == "answers":
        return [to_messages(record, note)], True
    _, columns, _ = match_shape(record.fields, record.origin, kind)
    used = used_columns(record, note, kind)
    fields, origin = record.fields, record.origin
    rest = {name: fields[name] for name in fields if name in used}
    if kind == "labels":
        is_wanted = rest.pop(columns[-1])
        if not isinstance(is_wanted, bool):
            raise BadRow(origin, f"{columns[-1]} is {describe(is_wanted)}; write true or false.")
        messages = to_messages(Record(rest, origin), note)
        return [[*_as_context(messages[:-1]), messages[-1]]], is_wanted
    answers = {side: rest.pop(side) for side in ("chosen", "rejected")}
    question = columns[0] if len(columns) == 3 else None
    pair = [_read_side(rest, question, side, answers[side], origin, note) for side in answers]
    both = zip(pair[0][:-1], pair[1][:-1], strict=False)
    num_shared = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
    if not any(turn["role"] == "user" for turn in pair[0][:num_shared]):
        raise BadRow(origin, "the chosen and the rejected conversation begin differently; give both one prompt.")
    return [_as_context(messages[:num_shared]) + messages[num_shared:] for messages in pair], True


def _read_side(
    rest: dict[str, Any], question: str | None, side: str, answer: Any, origin: str, note: Note
) -> Messages:
    """The conversation that ends with one of a pair's answers."""
    if not isinstance(answer, (str, list, dict)) or answer in ([], {}):
        raise BadRow(origin, f"{side} is {describe(answer)}; write an answer as text or as messages.")
    turns = [answer] if isinstance(answer, dict) else answer
    if isinstance(turns, list) and _begins_conversation(turns):
        if question is not None:
            note(COLUMNS, question)
        fields = {name: value for name, value in rest.items() if name != question} | {"messages": turns}
    elif question is None:
        raise BadRow(origin, f"{side} is an answer without its prompt; add a column prompt.")
    elif question in _ANSWERS:
        fields = rest | {_ANSWERS[question]: turns}
    else:
        last = [{"role": "assistant", "content": turns}] if isinstance(turns, str) else turns
        asked = rest[question]
        fields = rest | {question: asked + last if isinstance(asked, list) else asked}
    try:
        return to_messages(Record(fields, origin), note)
    except BadRow as error:
        raise BadRow(origin, f"with its {side} answer: {error.problem}") from None


def _begins_conversation(turns: list[Any]) -> bool:
    """Whether messages begin with a turn that is not the assistant's."""
    first = turns[0] if isinstance(turns[0], dict) else {}
    roles = [ROLES.get(str(first.get(name))) for name in TURN["role"] if first.get(name)]
    return bool(roles) and roles[0] != "assistant"


def _as_context(messages: Messages) -> Messages:
    """The messages, with no answer to train."""
    return [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in messages]


def join_pair(first: Example, second: Example, is_wanted: bool = True) -> Example:
    """Two sequences as one row."""
    ids, targets = (
        torch.cat([getattr(part, name) for part in (first, second)]) for name in ("input_ids", "targets")
    )
    return Example(ids, targets, first.origin, len(first), is_wanted)


def with_other_answers(
    rows: Iterable[Example | BadRow], max_length: int
) -> Generator[Example | BadRow, None, None]:
    """Labelled rows in their order, each with a second sequence: its prompt and the answer of another prompt.

    That is the answer of the last row before it with another prompt; rows without one wait for the first after.

    Raises:
        InputError: all prompts are equal.
    """
    waiting: list[Example] = []
    last: Example | None = None  # with its predecessor of another prompt
    before: Example | None = None
    for row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        if last is not None and not torch.equal(_prompt_of(last), _prompt_of(row)):
            before = last
        last = row
        if before is None:
            waiting.append(row)
            continue
        for early in waiting:
            yield _with_answer(early, row, max_length)
        waiting = []
        yield _with_answer(row, before, max_length)
    if waiting:
        raise InputError(
            f"All {len(waiting)} rows have the same prompt; --objective kto compares with the answers of other "
            "prompts, so give it at least two."
        )


def _prompt_of(row: Example) -> torch.Tensor:
    """The tokens before a row's first target."""
    return row.input_ids[: _first_target(row) + 1]


def _first_target(row: Example) -> int:
    return int((row.targets != IGNORE_INDEX).nonzero()[0])


def _with_answer(row: Example, other: Example, max_length: int) -> Example:
    place, start = _first_target(row), _first_target(other)
    ids = torch.cat([row.input_ids[: place + 1], other.input_ids[start + 1 :]])
    targets = torch.cat([row.targets[:place], other.targets[start:]])
    return join_pair(row, replace(row, input_ids=ids[:max_length], targets=targets[:max_length]), row.is_wanted)
