"""Convert rows of known shapes to [{"role", "content"}] messages, and check the turns."""

from __future__ import annotations

import re
from typing import Any

from qlora.data.keys import (
    EMPTY,
    KNOWN,
    PART_KEYS,
    ROLES,
    SYSTEM,
    TOOLS,
    TURN,
    TURN_KEYS,
    TURN_REFUSED,
    TURNS,
    Note,
    check_turn_keys,
    ignore,
    is_empty,
    match_shape,
    pick,
    used_columns,
)  # fmt: skip
from qlora.data.rows import BadRow, Record
from qlora.data.tool_calls import read_tool_calls, read_tools
from qlora.system.wording import describe, quote, shorten

# Limit for a line of JSONL in bytes, and for a text in characters. A million characters take about a second to
# tokenize, only to be cut at --max-length tokens; and an endless line is often not JSONL at all.
MAX_TEXT = 16 * 2**20


def to_messages(record: Record, note: Note = ignore) -> list[dict[str, Any]]:
    """One record as a conversation: an optional system message, then user and assistant in turn.

    Turns after the last answer have no target: they are dropped, and noted. Answers that are context only
    ("weight": 0, or inside a prompt that is a list of messages) keep the key "weight" with value 0. An answer may
    have "tool_calls", followed by "tool" turns, and a thought, "reasoning_content". Three roles are not turns and
    always come first:

        document   a `text` record, alone: no template, every token a target
        tokens     a tokenized record, alone, with empty content: "input_ids", and "is_target" for each
        tools      empty content, before the turns: "tools", for the template

    Args:
        note: takes each column and key that is not used.
    Raises:
        BadRow: a text is missing, too long or has an invalid character; a role is unknown or out of turn; a column
            or key is refused; or there is no answer.
    """
    origin, fields = record.origin, record.fields
    shape, columns, optional = match_shape(fields, origin)
    used = used_columns(record, note)
    values = [fields[column] for column in columns]
    if shape == "text":
        return [{"role": "document", "content": _check_text(values[0], "text", origin)}]
    if shape == "tokenized":
        return [{"role": "tokens", "content": ""} | _read_tokens(fields, origin)]
    if len(columns) == 1:
        turns = _read_turns(values[0], columns[0], origin, note)
    else:
        if "input" in optional:
            values[0] = _join_input(fields, columns[0], origin)
        prompt = _read_side(values[0], columns[0], "user", origin, note)
        prompt = [turn | {"weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
        turns = prompt + _read_side(values[1], columns[1], "assistant", origin, note)
    if "history" in optional and not is_empty(fields.get("history")):
        start = 1 if turns[0]["role"] == "system" else 0
        turns[start:start] = _read_history(fields["history"], origin)
    system = _read_system(fields, origin, note)
    if system and turns and turns[0]["role"] == "system":
        if turns[0]["content"] != system[0]["content"]:
            raise BadRow(origin, "the system column and the first message disagree; keep one of them.")
        system = []
    turns = system + turns
    tools = read_tools(pick({name: fields[name] for name in used}, TOOLS, "the row", origin), origin)
    first = [{"role": "tools", "content": "", "tools": tools}] if tools else []
    kept = _check_order(turns, origin)
    if len(kept) < len(turns):
        note(TURNS, "after the last answer")
    if all(map(_is_blank, kept)):
        note(EMPTY, "answers")
    return first + kept


def _read_system(fields: dict[str, Any], origin: str, note: Note) -> list[dict[str, Any]]:
    """The system message of a column of its own, if it is filled in."""
    text = pick(fields, SYSTEM, "the row", origin)
    text = text["parts"] if isinstance(text, dict) and "parts" in text else text
    text = _text_of(text, "system", origin, note)
    return [] if is_empty(text) else [{"role": "system", "content": _check_text(text, "system", origin)}]


def _join_input(fields: dict[str, Any], instruction: str, origin: str) -> Any:
    """Alpaca's instruction, and its input under it if there is one."""
    extra = pick(fields, ("input", "context"), "the row", origin)
    if is_empty(extra):
        return fields[instruction]
    texts = _check_text(fields[instruction], instruction, origin), _check_text(extra, "input", origin)
    return "\n\n".join(text for text in texts if text)


def _read_history(value: Any, origin: str) -> list[dict[str, Any]]:
    """Earlier turns of Alpaca's `history`, a list of [question, answer]; answers are trained like the last one."""
    turns = []
    for number, pair in enumerate(value if isinstance(value, list) else [None], start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            shown = describe(value if not isinstance(value, list) else pair)
            raise BadRow(origin, f"history holds {shown}; write a list of [question, answer].")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": _check_text(text, f"pair {number} of history", origin)})
    return turns


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
    labels = _labels_of_masks(fields, ids, origin) if labels is None else labels
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


def _labels_of_masks(fields: dict[str, Any], ids: list[int], origin: str) -> list[int]:
    """Labels by TRL's masks, in which 1 stands for a token to train; all ids without any."""
    labels = ids
    for name in ("completion_mask", "assistant_masks"):
        mask = fields.get(name)
        if mask is None:
            continue
        if not isinstance(mask, list) or len(mask) != len(ids) or not {*mask} <= {0, 1}:
            raise BadRow(origin, f"{name} is {describe(mask)}; write a list of {len(ids)} zeros and ones.")
        labels = [label if kept else -100 for label, kept in zip(labels, mask, strict=True)]
    return labels


def _check_text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str):
        remedy = "fill it in or remove the record" if value is None else "write it as text"
        raise BadRow(origin, f"{name} is {describe(value)}, not text; {remedy}.")
    if len(value) > MAX_TEXT:
        size = f"{name} has {len(value):,} characters, more than {MAX_TEXT:,}"
        raise BadRow(origin, f"{size}, and begins {quote(value[:40])}; split it into several records.")
    if found := re.search("[\0\ud800-\udfff]", value):
        kind = "a NUL" if found[0] == "\0" else "half of a surrogate pair"
        near = quote(value[max(0, found.start() - 10) : found.end() + 10])
        raise BadRow(origin, f"{name} holds {kind} at character {found.end()}, in {near}; remove it.")
    return value


def _read_side(value: Any, column: str, role: str, origin: str, note: Note) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return _read_turns(value, column, origin, note)
    return [{"role": role, "content": _check_text(value, column, origin)}]


def _read_turns(value: Any, column: str, origin: str, note: Note) -> list[dict[str, Any]]:
    wanted = "messages, each with a role and a content"
    if not isinstance(value, list):
        raise BadRow(origin, f"{column} is {describe(value)}; write a list of {wanted}.")
    turns = []
    for number, turn in enumerate(value, start=1):
        name = f"message {number} of {column}"
        if not isinstance(turn, dict):
            raise BadRow(origin, f"{name} is {describe(turn)}; write a list of {wanted}.")
        role = pick(turn, TURN["role"], name, origin)
        role = role.lower() if isinstance(role, str) and role not in ROLES else role
        if not isinstance(role, str) or role not in ROLES:
            keys = f" (it has {shorten(', '.join(map(quote, turn)), 100)})" if role is None else ""
            raise BadRow(origin, f"{name} has the role {quote(role)}{keys}; use {', '.join(ROLES)}.")
        check_turn_keys(turn, name, origin, note)
        results = _results_of(turn, name, origin, note)
        turns += results or [_read_turn(turn, role, name, origin, note)]
    return turns


def _results_of(turn: dict[str, Any], name: str, origin: str, note: Note) -> list[dict[str, Any]]:
    """The tool turns of a turn that holds Anthropic's tool_result parts; empty for any other."""
    content = turn.get("content")
    if not isinstance(content, list):
        return []
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"]
    if parts and len(parts) < len(content):
        raise BadRow(
            origin, f"{name} holds tool_result parts and others; write the others as a message of their own."
        )
    for part in parts:
        for key in (key for key in part if key not in ("type", "tool_use_id", "content")):
            note(PART_KEYS, key)
    return [
        {
            "role": "tool",
            "content": _check_text(_text_of(part.get("content", ""), name, origin, note), name, origin),
        }
        | ({"tool_call_id": part["tool_use_id"]} if isinstance(part.get("tool_use_id"), str) else {})
        for part in parts
    ]


def _read_turn(turn: dict[str, Any], said_role: str, name: str, origin: str, note: Note) -> dict[str, Any]:
    role = ROLES[said_role]
    read: dict[str, Any] = {"role": role}
    content, thought, parts = _read_content(pick(turn, TURN["content"], name, origin), name, origin, note)
    calls = pick(turn, TURN["calls"], name, origin) or parts
    if said_role == "function_call":  # ShareGPT's: the text is the call
        content, calls = None, calls or content
    if calls:
        if role != "assistant":
            raise BadRow(origin, f"{name} has tool_calls, but is from the {role}; only the assistant calls tools.")
        read["tool_calls"] = read_tool_calls(calls, name, origin)
        content = "" if content is None else content
    if content is None and (others := [key for key in turn if key not in KNOWN and not is_empty(turn[key])]):
        has = shorten(", ".join(map(quote, others)), 100)
        raise BadRow(origin, f"{name} has no content, but {has}; rename its text to content.")
    read["content"] = _check_text(content, f"the content of {name}", origin)
    thought = pick(turn, TURN["thought"], name, origin) or thought
    if thought and role == "assistant":
        read["reasoning_content"] = _check_text(thought, f"the thought of {name}", origin)
    elif thought:
        note(TURN_KEYS, "a thought that is not the assistant's")
    for key in ("name", "tool_call_id"):
        if not is_empty(turn.get(key)):
            read[key] = _check_text(turn[key], f"the {key} of {name}", origin)
    return read | ({} if _is_trained(turn, role, name, origin) else {"weight": 0})


def _read_content(value: Any, name: str, origin: str, note: Note) -> tuple[Any, str, list[Any]]:
    """(content, thought, tool calls): those of a list of typed parts, or the content as it is."""
    if not isinstance(value, list):
        return value, "", []
    texts, thoughts, calls = list[str](), list[str](), list[Any]()
    for part in value:
        kind = _kind_of(part) if isinstance(part, dict) else "text"
        known = {"text": "text", "thinking": "thinking", "tool_use": "id name input"}.get(str(kind))
        if known is None:
            raise BadRow(
                origin,
                f"{name} holds a part of the type {quote(kind)}; this project trains on text alone: write parts "
                "of the types text, thinking, tool_use and tool_result, or remove the row.",
            )
        if not isinstance(part, dict):
            texts.append(_check_text(part, f"a part of {name}", origin))
            continue
        for key, item in part.items():
            if key not in ("type", *known.split()) and not is_empty(item):
                if key in TURN_REFUSED:
                    raise BadRow(origin, f"a part of {name} has {quote(key)}, which {TURN_REFUSED[key]}.")
                note(PART_KEYS, key)
        if kind == "tool_use":
            calls.append(part)
        else:
            text = _check_text(part.get(known), f"the {known} of a part of {name}", origin)
            (texts if kind == "text" else thoughts).append(text)
    return None if calls and not texts else "".join(texts), "\n\n".join(thoughts), calls


def _text_of(value: Any, name: str, origin: str, note: Note) -> Any:
    """A text, or that of a list of parts, in a place where only an answer could have thoughts and calls."""
    content, thought, calls = _read_content(value, name, origin, note)
    if thought or calls:
        raise BadRow(origin, f"{name} holds a thought or a call, but is no answer; remove it.")
    return content


def _kind_of(part: dict[str, Any]) -> Any:
    """The type of a part; of one without, as in Bedrock's rows, the key that says what it holds."""
    return part.get("type") or ("text" if "text" in part else next(iter(part), None))


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


def _is_blank(turn: dict[str, Any]) -> bool:
    """Whether a turn has no answer to learn: it is another's, context, or blank."""
    if turn["role"] != "assistant" or turn.get("weight") == 0:
        return True
    return not (turn["content"].strip() or "tool_calls" in turn or "reasoning_content" in turn)


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
