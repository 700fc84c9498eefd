"""Convert rows of known shapes to [{"role", "content"}] messages, and check the turns."""

from __future__ import annotations

import re
from typing import Any

from qlora.data.rows import BadRow, Record
from qlora.data.tool_calls import read_tool_calls, read_tools
from qlora.system.wording import describe, quote, shorten

# Limit for a line of JSONL in bytes, and for a text in characters. A million characters take about a second to
# tokenize, only to be cut at --max-length tokens; and an endless line is often not JSONL at all.
MAX_TEXT = 16 * 2**20
# (format, columns, optional column joined to the prompt); the first whose columns are all present wins.
SHAPES = (
    ("messages", ("messages",), None),
    ("sharegpt", ("conversations",), None),
    ("alpaca", ("instruction", "output"), "input"),
    ("alpaca", ("instruction", "response"), "context"),
    ("prompt_completion", ("prompt", "completion"), None),
    ("prompt_completion", ("prompt", "response"), None),
    ("question_answer", ("question", "answer"), None),
    ("text", ("text",), None),
    ("tokenised", ("input_ids",), None),
)
# Optional columns that belong to another one.
COMPANIONS = {"messages": "tools", "conversations": "tools", "prompt": "tools"}
COMPANIONS |= {"input_ids": "labels attention_mask"}
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
_ROLES |= {"assistant": "assistant", "gpt": "assistant", "tool": "tool"}


def match_shape(fields: dict[str, Any], origin: str) -> tuple[str, tuple[str, ...], str | None]:
    filled = {name for name, value in fields.items() if value is not None}
    for columns in (filled, set(fields)):  # the second pass is for the error that names the null column
        for shape in SHAPES:
            if columns.issuperset(shape[1]):
                return shape
    known = "; ".join(" + ".join(columns) for _, columns, _ in SHAPES)
    names = shorten(", ".join(sorted(map(quote, fields))), 200)
    raise BadRow(origin, f"unknown columns [{names}]; rename them to one of: {known}.")


def to_messages(record: Record) -> list[dict[str, Any]]:
    """One record as a conversation: an optional system message, then user and assistant in turn.

    Turns after the last answer have no target and are dropped. Answers that are context only ("weight": 0, or
    inside a prompt that is a list of messages) keep the key "weight" with value 0. An answer may have
    "tool_calls", followed by "tool" turns. Three roles are not turns and always come first:

        document   a `text` record, alone: no template, every token a target
        tokens     a tokenized record, alone, with empty content: "input_ids", and "is_target" for each
        tools      empty content, before the turns: "tools", for the template

    Raises:
        BadRow: a text is missing, too long or has an invalid character; a role is unknown or out of turn; or
            there is no answer.
    """
    origin = record.origin
    _, columns, extra_column = match_shape(record.fields, origin)
    values = [record.fields[column] for column in columns]
    if columns == ("text",):
        return [{"role": "document", "content": _check_text(values[0], "text", origin)}]
    if columns == ("input_ids",):
        return [{"role": "tokens", "content": ""} | _read_tokens(record.fields, origin)]
    tools: list[dict[str, Any]] = []
    if isinstance(values[0], list) and record.fields.get("tools"):
        tools = [{"role": "tools", "content": "", "tools": read_tools(record.fields["tools"], origin)}]
    if len(columns) == 1:
        return tools + _check_order(_read_turns(values[0], columns[0], origin), origin)
    if extra_column and record.fields.get(extra_column) not in (None, ""):
        extra = _check_text(record.fields[extra_column], extra_column, origin)
        values[0] = _check_text(values[0], columns[0], origin) + "\n\n" + extra
    prompt = _read_side(values[0], columns[0], "user", origin)
    prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    return tools + _check_order(prompt + _read_side(values[1], columns[1], "assistant", origin), origin)


def _read_tokens(fields: dict[str, Any], origin: str) -> dict[str, list[Any]]:
    """input_ids and is_target of a tokenized record, without padding; the caller checks the vocabulary."""
    ids: Any
    labels: Any
    mask: Any
    ids, labels, mask = (fields.get(name) for name in ("input_ids", "labels", "attention_mask"))
    for name, values in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if values is None and name != "input_ids":
            continue
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise BadRow(origin, f"{name} is {describe(values)}; write a list of whole numbers.")
        if len(values) != len(ids):
            raise BadRow(
                origin, f"{name} has {len(values)} numbers where input_ids has {len(ids)}; make them equal."
            )
    labels = ids if labels is None else labels
    for place, (token, label) in enumerate(zip(ids, labels, strict=True), start=1):
        if label not in (-100, token):
            raise BadRow(
                origin,
                f"labels holds {quote(label)} at index {place}, where input_ids has {quote(token)}; use that or "
                "-100: labels are not shifted.",
            )
    kept = [place for place in range(len(ids)) if mask is None or mask[place] != 0]
    if not kept:
        raise BadRow(origin, "input_ids is empty; fill it in or remove the record.")
    return {"input_ids": [ids[place] for place in kept], "is_target": [labels[place] != -100 for place in kept]}


def _check_text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        raise BadRow(origin, f"{name} is {describe(value)}, not text; fill it in or remove the record.")
    if len(value) > MAX_TEXT:
        size = f"{name} has {len(value):,} characters, more than {MAX_TEXT:,}"
        raise BadRow(origin, f"{size}, and begins {quote(value[:40])}; split it into several records.")
    if found := re.search("[\0\ud800-\udfff]", value):
        kind = "a NUL" if found[0] == "\0" else "half of a surrogate pair"
        near = quote(value[max(0, found.start() - 10) : found.end() + 10])
        raise BadRow(origin, f"{name} holds {kind} at character {found.end()}, in {near}; remove it.")
    return value


def _read_side(value: Any, column: str, role: str, origin: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _read_turns(value, column, origin)
    return [{"role": role, "content": _check_text(value, column, origin)}]


def _read_turns(value: Any, column: str, origin: str) -> list[dict[str, Any]]:
    wanted = "messages, each with a role and a content"
    if not isinstance(value, list):
        raise BadRow(origin, f"{column} is {describe(value)}; write a list of {wanted}.")
    turns = []
    for number, turn in enumerate(value, start=1):
        name = f"message {number} of {column}"
        if not isinstance(turn, dict):
            raise BadRow(origin, f"{name} is {describe(turn)}; write a list of {wanted}.")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(origin, f"{name} has the role {quote(role)}; use {', '.join(_ROLES)}.")
        turns.append(_read_turn(turn, _ROLES[role], name, origin))
    return turns


def _read_turn(turn: dict[str, Any], role: str, name: str, origin: str) -> dict[str, Any]:
    if turn.get("function_call"):
        problem = f"{name} has the function_call {quote(turn['function_call'])}"
        raise BadRow(origin, f"{problem}; write it as one of its tool_calls.")
    read: dict[str, Any] = {"role": role}
    content = turn.get("content", turn.get("value"))
    if turn.get("tool_calls"):
        if role != "assistant":
            raise BadRow(origin, f"{name} has tool_calls, but is from the {role}; only the assistant calls tools.")
        read["tool_calls"] = read_tool_calls(turn["tool_calls"], name, origin)
        content = "" if content is None else content
    read["content"] = _check_text(content, f"the content of {name}", origin)
    if role == "tool":
        for key in ("name", "tool_call_id"):
            if turn.get(key) is not None:
                read[key] = _check_text(turn[key], f"the {key} of {name}", origin)
    return read | ({} if _is_trained(turn, role, name, origin) else {"weight": 0})


def _is_trained(turn: dict[str, Any], role: str, name: str, origin: str) -> bool:
    """Whether "weight" (OpenAI), "train" or "training" (Axolotl) lets a turn train; True without any of them."""
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(origin, f"{name} has the weight {quote(weight)}; use 0 or 1.")
    said = {} if weight is None else {"weight": weight == 1}
    for key in ("train", "training"):
        flag = turn.get(key)
        if flag is not None and not isinstance(flag, bool):
            raise BadRow(origin, f"{name} has {key} {quote(flag)}; use true or false.")
        if flag and role != "assistant":
            remedy = "only the assistant's turns are trained one by one; leave it out, or pass --train-on all"
            raise BadRow(origin, f"{name} has {key} true, but is from the {role}; {remedy}.")
        said |= {} if flag is None else {key: flag}
    if len(set(said.values())) > 1:
        raise BadRow(origin, f"{name} has {' and '.join(said)}, which disagree; keep one of them.")
    return all(said.values())


def _check_order(turns: list[dict[str, Any]], origin: str) -> list[dict[str, Any]]:
    """The turns up to the last answer, in the right order, else BadRow.

    An optional system message, then user and assistant in turn; tool results follow an answer with tool calls, and
    an answer follows them.
    """
    start = 1 if turns and turns[0]["role"] == "system" else 0
    expected: tuple[str, ...] = ("user",)
    for number, turn in enumerate(turns[start:], start=start + 1):
        if turn["role"] not in expected:
            which = f"message {number}, {quote(turn['content'])}, is from the {turn['role']}"
            remedy = "alternate user and assistant, the user first, after any system message"
            if "tool" in (*expected, turn["role"]):
                remedy += "; after an answer with tool_calls, put the tool results, then an answer"
            raise BadRow(origin, f"{which}, not the {' or the '.join(expected)}; {remedy}.")
        if turn["role"] == "assistant":
            expected = ("tool",) if "tool_calls" in turn else ("user",)
        else:
            expected = ("assistant",) if turn["role"] == "user" else ("assistant", "tool")
    num_kept = max((index + 1 for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if num_kept == 0:
        roles = ", ".join(turn["role"] for turn in turns) or "none"
        raise BadRow(
            origin,
            f"no assistant message to learn from (roles: {roles}); add one or remove the record.",
        )
    return turns[:num_kept]
