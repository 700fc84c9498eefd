"""Read tool calls and tools in OpenAI's format, or close to it, into the form that chat templates expect.

    tool_calls   in an assistant's turn: [{"type": "function", "function": {"name", "arguments"}}], with an
                 optional "id"; or [{"name", "arguments"}]; or one of them; or the JSON text of any. Arguments are
                 an object or its JSON text, under any of ARGUMENTS.
    tools        in a record: [{"type": "function", "function": {"name", "description", "parameters"}}], or the
                 JSON text of such a list, as in Parquet columns; a bare function is wrapped.

Arguments become objects: most templates write `arguments | tojson`, which would quote a text a second time.
"""

from __future__ import annotations

import math
import re
from typing import Any

from qlora.data.rows import BadRow, explain_json, find_flaw, load_json
from qlora.system.wording import describe, quote

# OpenAI and most others; Llama 3; some agents; Anthropic's tool_use.
ARGUMENTS = ("arguments", "parameters", "args", "input")
MAX_DEPTH = 64  # of objects and lists within arguments or tools


def read_tool_calls(value: Any, name: str, origin: str) -> list[dict[str, Any]]:
    """The calls of one turn: {"type": "function", "function": {"name", "arguments": {...}}}, optional "id".

    Args:
        name: the turn's name for errors.
    Raises:
        BadRow: not a list of calls, a call without a name, or arguments that are not a JSON object.
    """
    has = f"{name} has the tool_calls {quote(value)}"
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        value = _read_json(value, f"the tool_calls of {name}", "a list of calls", origin)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise BadRow(origin, f"{has}; write a list of calls, each with a name and arguments.")
    calls = []
    for number, item in enumerate(value, start=1):
        function = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(origin, f"{has}, and call {number} has no name; write its function's name and arguments.")
        where = f"the arguments of call {number} in {name}"
        arguments = _read_arguments(item, function, f"call {number} in {name}", origin)
        if not isinstance(arguments, dict):
            raise BadRow(origin, f"{where} are {describe(arguments)}; write a JSON object.")
        _check_plain([function["name"], arguments], where, origin)
        call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if item.get("id") is not None and not isinstance(item["id"], str):
            raise BadRow(origin, f"the id of call {number} in {name} is {describe(item['id'])}; write it as text.")
        calls.append(call | ({"id": item["id"]} if item.get("id") else {}))
    return calls


def _read_arguments(item: dict[str, Any], function: dict[str, Any], where: str, origin: str) -> Any:
    """A call's arguments, {} without any; BadRow if it has another key, since it may be meant as arguments."""
    known = {"name", *ARGUMENTS} | ({"id", "type", "index"} if function is item else set())
    others = [key for key in function if key not in known and function[key] is not None]
    if function is not item:
        others += [k for k in item if k not in ("function", "id", "type", "index") and item[k] is not None]
    if others:
        raise BadRow(
            origin, f"{where} has the key {quote(others[0])}, which no call has; write name and arguments."
        )
    given = [key for key in ARGUMENTS if function.get(key) is not None]
    if len(given) > 1:
        raise BadRow(origin, f"{where} has {' and '.join(given)}; keep one of them.")
    value = function[given[0]] if given else {}
    return _read_json({} if value == "" else value, f"the arguments of {where}", "a JSON object", origin)


def read_tools(value: Any, origin: str) -> list[dict[str, Any]]:
    """The tools of one record, each {"type": "function", "function": {...}}; [] if the value is empty.

    Raises:
        BadRow: not a list of tools, or a tool without a name.
    """
    value = _read_json(value or [], "tools", "a list of tools", origin)
    if not isinstance(value, list):
        raise BadRow(origin, f"tools is {describe(value)}; write a list of tools, each with a name.")
    tools = []
    for number, item in enumerate(value, start=1):
        function = item.get("function", item) if isinstance(item, dict) else item
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise BadRow(origin, f"tool {number} of tools is {describe(item)}; write an object with a name.")
        _check_plain(item, f"tool {number} of tools", origin)
        tools.append(item if "function" in item else {"type": "function", "function": item})
    return tools


def _read_json(value: Any, name: str, wanted: str, origin: str) -> Any:
    """The value, parsed as JSON if it is a text."""
    if not isinstance(value, str):
        return value
    try:
        found, may_have_flaw = load_json(value)
    except ValueError as error:
        raise BadRow(origin, f"{name}: {explain_json(error, value)}; write {wanted}.") from error
    flaw = find_flaw(found) if may_have_flaw else None
    if flaw:
        raise BadRow(origin, f"{name}: {flaw}.")
    return found


def _check_plain(value: Any, name: str, origin: str) -> None:
    """BadRow unless a template can render it: JSON values, text that a tokenizer accepts, limited nesting."""
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, dict):
            stack += [(key, depth + 1) for key in item] + [(inner, depth + 1) for inner in item.values()]
        elif isinstance(item, list):
            stack += [(inner, depth + 1) for inner in item]
        elif isinstance(item, str):
            if re.search("[\0\ud800-\udfff]", item):
                problem = f"{name} holds a NUL or half of a surrogate pair, in {quote(item)}"
                raise BadRow(origin, f"{problem}; remove it.")
        elif not isinstance(item, (bool, int, float, type(None))) or (
            item != item or item in (math.inf, -math.inf)
        ):
            raise BadRow(
                origin, f"{name} holds {describe(item)}, which is not a JSON value; write text or a number."
            )
        if depth > MAX_DEPTH:
            raise BadRow(origin, f"{name} is nested more than {MAX_DEPTH} levels deep; make it flatter.")
