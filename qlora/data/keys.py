"""The columns of a record and the keys of a turn that have a meaning, under every name that they go by.

Each one of a file is used (its name is in a table here), refused (other tools would use it, and this project
cannot), or named to the user: counted in the source's `EncodeReport` and told once, with the rows that have it. A
value that is null or empty counts as absent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qlora.data.rows import BadRow, Record
from qlora.system.wording import list_first, quote, shorten, show_value

Note = Callable[[str, str], Any]  # (what is said, of which name)
Notes = dict[str, dict[str, int]]  # what is said -> of which name -> in how many rows
MAX_NAMES = 200  # that are counted of one kind
COLUMNS, TURN_KEYS, PART_KEYS = "columns not used", "keys of turns not used", "keys of content parts not used"
EQUAL = "pairs dropped, whose answers are equal"
TURNS, EMPTY, NOT_PRINTED = "turns not used", "nothing to learn in", "not printed by the chat template"

TOOLS = ("tools", "functions")  # OpenAI's, and its older name
SYSTEM = ("system", "system_prompt", "systemInstruction", "system_instruction")  # the last two are Gemini's
_CHAT = (*SYSTEM, *TOOLS)
_SINGLE = (*_CHAT, "history")
# (format, columns, optional columns); the first whose columns are all present wins.
SHAPES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("messages", ("messages",), _CHAT),
    ("sharegpt", ("conversations",), _CHAT),
    ("alpaca", ("instruction", "output"), ("input", "context", *_SINGLE)),
    ("alpaca", ("instruction", "response"), ("input", "context", *_SINGLE)),
    ("prompt_completion", ("prompt", "completion"), _SINGLE),
    ("prompt_completion", ("prompt", "response"), _SINGLE),
    ("question_answer", ("question", "answer"), _SINGLE),
    ("question_answer", ("question", "response"), _SINGLE),
    ("text", ("text",), ()),
    ("tokenized", ("input_ids",), ("labels", "attention_mask", "completion_mask", "assistant_masks")),
    ("gemini", ("contents",), _CHAT),
)
# Of pairs, the answer is in two columns; of labelled answers (KTO), one more column says whether it is good.
_PAIR = ("chosen", "rejected")
PAIR_SHAPES = tuple(
    ("pair", (*question, *_PAIR), optional)
    for question, optional in (
        (("prompt",), _SINGLE),
        (("question",), _SINGLE),
        (("instruction",), ("input", "context", *_SINGLE)),
        (("conversations",), _CHAT),
        (("messages",), _CHAT),
        ((), _CHAT),
    )
)
LABELS = ("label", "kto_tag")
LABEL_SHAPES = tuple(
    ("labelled", (*columns, label), optional)
    for label in LABELS
    for shape, columns, optional in SHAPES
    if shape not in ("text", "tokenized")
)
SHAPES_OF = {"answers": SHAPES, "pairs": PAIR_SHAPES, "labels": LABEL_SHAPES}
_MEDIA = "is not text, and this project trains on text alone; remove the column, or the rows that need it"
_PREFERENCE = "belongs to a preference pair; pass --objective dpo to learn from pairs, or pass --columns "
_PACKED = "marks several examples packed into one row; write one example per row (this project packs them itself)"
REFUSED = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA)
REFUSED |= dict.fromkeys(("chosen", "rejected"), _PREFERENCE)
REFUSED |= dict.fromkeys(LABELS, "")  # if true or false: see _refusal
REFUSED |= dict.fromkeys(("seq_lengths", "position_ids"), _PACKED)
REFUSED["chat_template_kwargs"] = "would change the chat template row by row; pass --chat-template FILE instead"
_OF_TOKENS = ("seq_lengths", "position_ids")
_ASKING = "prompt question query input inputs input_text instruction user human problem".split()
_ANSWERING = "completion response answer output outputs output_text assistant gpt solution target targets".split()

# Upper and lower case count as equal.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "model": "assistant", "chatbot": "assistant", "function_call": "assistant"}
ROLES |= dict.fromkeys(("tool", "function", "observation", "ipython"), "tool")
# Meaning -> the names of a turn's keys.
TURN = {
    "role": ("role", "from"),
    "content": ("content", "value", "parts"),
    "thought": ("reasoning_content", "reasoning", "thinking", "thought"),
    "calls": ("tool_calls", "function_call"),
    "trained": ("weight", "train", "training"),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
}
TURN_REFUSED = {"train_detail": "selects parts of an answer to train; use whole turns, by weight 0 or 1"}
TURN_REFUSED |= dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA)
KNOWN = frozenset(name for names in TURN.values() for name in names)


def ignore(what: str, name: str) -> None:
    """A `Note` for readers who need no notes."""


def count_notes(notes: Notes, found: Iterable[tuple[str, str]]) -> None:
    """Add what was noted about one row."""
    for what, name in sorted(found):
        names = notes.setdefault(what, {})
        if name in names or len(names) < MAX_NAMES:
            names[name] = names.get(name, 0) + 1


def describe_notes(notes: Notes) -> list[str]:
    """A line for each kind, such as `columns not used: id (3 rows), source (2 rows)`."""
    lines = []
    for what, names in notes.items():
        named = [f"{show_value(name)} ({rows:,} {'row' if rows == 1 else 'rows'})" for name, rows in names.items()]
        lines.append(f"{what}: {list_first(named, 20, ', ')}")
    return lines


def is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def match_shape(
    fields: dict[str, Any], origin: str, kind: str = "answers"
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The shape of a record among those of its kind (SHAPES_OF); BadRow if none fits."""
    filled = {name for name, value in fields.items() if value is not None}
    for columns in (filled, set(fields)):  # the second pass is for the error that names the null column
        for shape in SHAPES_OF[kind]:
            if columns.issuperset(shape[1]):
                return shape
    if kind != "answers":
        raise BadRow(origin, _explain_kind(fields, filled, kind))
    for name in ("rejected", "chosen"):
        if name in filled:
            raise BadRow(origin, f"the column {quote(name)} {_PREFERENCE}{_of_chosen(fields)}.")
    known = "; ".join(" + ".join(columns) for _, columns, _ in SHAPES)
    names = shorten(", ".join(sorted(map(quote, fields))), 160)
    first, last = "", ", or name yours with --columns (as prompt=YOURS,completion=YOURS)"
    if likely := _likely(fields):
        first, last = f"pass --columns {likely}, or ", ""
    raise BadRow(origin, f"unknown columns [{names}]; {first}rename them to one of: {known}{last}.")


def _explain_kind(fields: dict[str, Any], filled: set[str], kind: str) -> str:
    """Why a record is no pair, or has no label, and which objective its columns are for."""
    names = shorten(", ".join(sorted(map(quote, fields))), 200)
    if kind == "pairs":
        wanted = "pairs have the columns prompt, chosen and rejected"
        other = "kto" if filled & {*LABELS} else "sft"
    else:
        wanted = "labelled answers have the columns prompt, completion and label (true or false)"
        other = "dpo" if filled >= {*_PAIR} else "sft"
    return f"{wanted}, but the columns are [{names}]; rename them with --columns, or pass --objective {other}."


def _likely(fields: dict[str, Any]) -> str:
    """--columns for the one column of turns, or for the one question and the one answer; "" without them."""
    found = [[name for name in fields if name.strip().lower() in likely] for likely in (_ASKING, _ANSWERING)]
    turns = [name for name, value in fields.items() if re.fullmatch(r"[\w.-]+", name) and _are_turns(value)]
    if len(turns) == 1 and not found[1]:
        return f"messages={turns[0]}"
    return "prompt={},completion={}".format(*(n[0] for n in found)) if all(len(n) == 1 for n in found) else ""


def _are_turns(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(isinstance(first.get(key), str) for key in TURN["role"])


def _of_chosen(fields: dict[str, Any]) -> str:
    """--columns that train on the wanted answers of preference pairs."""
    chosen: Any = fields.get("chosen")
    if match := next((name for name in ("messages", "conversations") if fields.get(name)), None):
        return f"{match}={match} to train on that column"
    if _are_turns(chosen) and {chosen[0].get(key) for key in TURN["role"]} & {"system", "user", "human"}:
        return "messages=chosen to train on the chosen ones"
    wanted = "prompt=prompt,completion=chosen" if fields.get("prompt") else "text=chosen"
    return f"{wanted} to train on the chosen ones"


def used_columns(record: Record, note: Note, kind: str = "answers") -> set[str]:
    """The columns that a record's shape uses; the others are noted. BadRow for one of REFUSED."""
    used = set()
    name, columns, optional = match_shape(record.fields, record.origin, kind)
    for column, value in record.fields.items():
        is_odd = column in TOOLS and len(columns) > 1 and not _may_be_tools(value)
        if column in columns or (column in optional and not is_odd):
            used.add(column)
            continue
        if is_empty(value):
            continue
        if column in REFUSED and (reason := _refusal(name, column, record.fields)):
            raise BadRow(record.origin, f"the column {quote(column)} {reason}.")
        note(COLUMNS, column)
    for what, column in record.notes:
        if column in used or column not in record.fields:
            note(what, column)
    return used


def _may_be_tools(value: Any) -> bool:
    """Whether `tools` of a shape that rarely has any is a list of tools, and not of hammers."""
    if isinstance(value, str):
        return value.lstrip().startswith(("[{", "[ {"))
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _refusal(shape: str, column: str, fields: dict[str, Any]) -> str | None:
    """Why a column of REFUSED cannot be left out of a record of this shape; None if it can."""
    value = fields[column]
    if column in LABELS:
        wanted = "says whether the answer is wanted, and --objective sft would train unwanted ones as well"
        remedy = "pass --objective kto, or keep the rows where it is true and remove the column"
        is_free = shape in ("text", "tokenized", "pair", "labelled")
        return None if is_free or not isinstance(value, bool) else f"{wanted}; {remedy}"
    if column in _PAIR:
        of_pair = "belongs to a pair; pass --objective dpo, or remove the column"
        return of_pair if shape == "labelled" else _PREFERENCE + _of_chosen(fields)
    if (column in _OF_TOKENS) != (shape == "tokenized") or (column == "position_ids" and _is_one_run(value)):
        return None
    return REFUSED[column]


def _is_one_run(positions: Any) -> bool:
    """Whether positions count from 0 without a new start."""
    return isinstance(positions, list) and positions == list(range(len(positions)))


def pick(fields: dict[str, Any], names: Sequence[str], where: str, origin: str) -> Any:
    """The value under any of the names that stand for one thing, or None.

    Raises:
        BadRow: two of them are filled in and differ.
    """
    filled = [name for name in names if not is_empty(fields.get(name))]
    if any(fields[name] != fields[filled[0]] for name in filled[1:]):
        raise BadRow(origin, f"{where} has {' and '.join(filled)}, which disagree; keep one of them.")
    present = filled or [name for name in names if fields.get(name) is not None]
    return fields[present[0]] if present else None


def check_turn_keys(turn: dict[str, Any], where: str, origin: str, note: Note) -> None:
    """Note the keys of a turn that have no meaning here; BadRow for one of TURN_REFUSED."""
    for key, value in turn.items():
        if key in KNOWN or is_empty(value):
            continue
        if key in TURN_REFUSED:
            raise BadRow(origin, f"{where} has {quote(key)}, which {TURN_REFUSED[key]}.")
        note(TURN_KEYS, key)
