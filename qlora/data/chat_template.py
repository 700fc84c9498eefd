"""Render chat templates part by part, and test them first: a template is a program that may do anything.

    prompt    everything before the first answer
    part      an answer and what follows it, up to the next answer
    opened    a thought that the start of an answer opens, such as "<think>\n"; the answer goes on inside it

The end of a plain answer is found in its part: its content, then a special token. A tool call has no content to
search for, so the conversation that ends with it is rendered separately. The last special token there ends the
turn, and its position in the part is where the two texts stop agreeing.

A template may also drop what it does not know. So conversations with tools are tested once per order of turns:
any change (a tool, a call's name or arguments, a result, the content next to a call) must change the text;
otherwise it would be lost silently. A system text, a thought or a name that changes nothing is noted.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from typing import TYPE_CHECKING, Any

from qlora.data.keys import NOT_PRINTED, TURN, Note
from qlora.data.rendering import Renderer
from qlora.data.rows import BadRow
from qlora.data.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
MAX_KNOWN = 10_000  # orders of turns whose outcome is kept


def split_tools(messages: Messages) -> tuple[Messages, list[dict[str, Any]]]:
    """Split what `to_messages` returns into (turns, tools)."""
    if messages and messages[0]["role"] == "tools":
        return messages[1:], messages[0]["tools"]
    return messages, []


# An answer that is only a call; ids of nine letters, as Mistral's templates require.
_PROBE_TOOLS = [{"type": "function", "function": {"name": "find", "description": "", "parameters": {}}}]
_PROBE: Messages = [
    {"role": "user", "content": "Hi"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}, "id": "call00001"}
        ],
    },
]
CALL: Messages = [{"role": "tools", "tools": _PROBE_TOOLS}, *_PROBE]
AFTER_CALL: Messages = [
    *CALL,
    {"role": "tool", "content": "1", "name": "find", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "Hello"},
]


class ChatTemplate:
    """A tokenizer's chat template, or `own` instead of it.

    Args:
        special: matches a special token's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, own: str | None, special: re.Pattern[str]) -> None:
        self.tokenizer, self.own, self.special = tokenizer, own, special
        self._renderer = Renderer(tokenizer)
        self.date: date | None = getattr(tokenizer, "template_date", None)
        # Named templates may differ: of each, with and without tools.
        self._thought_keys: dict[bool, str] = {}
        self._opened: dict[bool, tuple[str, str]] = {}
        self._not_printed: dict[Any, list[str]] = {}
        self._lost: dict[Any, str | None] = {}
        self._blank: list[str | None] = []

    def render(self, messages: Messages, tools: list[dict[str, Any]], opens_turn: bool, origin: str) -> str:
        """The text of a conversation; `opens_turn` adds the start of an answer.

        Raises:
            BadRow: the template fails on it.
        """
        blank = self._settle_blank() if any("tool_calls" in turn for turn in messages) else ""
        return self._render(messages, tools, opens_turn, origin, blank)

    def _settle_blank(self) -> str | None:
        """The value for a missing content next to a call: None, as in OpenAI's format (transformers drops the
        key), or "" if the template fails without it. (Some templates read "" as an answer without calls.)
        """
        if not self._blank:
            try:
                self._render(_PROBE, _PROBE_TOOLS, False, "", None)
                self._blank.append(None)
            except BadRow:
                self._blank.append("")
        return self._blank[0]

    def _render(
        self, messages: Messages, tools: list[dict[str, Any]], opens_turn: bool, origin: str, blank: str | None
    ) -> str:
        turns = [
            turn | {"content": blank} if "tool_calls" in turn and turn["content"] == "" else turn
            for turn in messages
        ]
        thought_key = self._thought_key(tools)
        if thought_key != "reasoning_content":
            turns = [
                {thought_key if key == "reasoning_content" else key: value for key, value in turn.items()}
                for turn in turns
            ]
        shown: Any = tools or None
        try:
            return self._renderer(turns, shown, self._dated(shown), opens_turn)
        except Exception as error:  # a template is a program that can fail in any way
            kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
            reason = " ".join(f"{kind}{error}".split())[:200].rstrip(".")
            raise BadRow(origin, f"the chat template refuses it: {reason}; fix the record.") from error

    def _thought_key(self, tools: list[dict[str, Any]]) -> str:
        """What the template calls a thought."""
        if bool(tools) not in self._thought_keys:
            try:
                text: Any = self.tokenizer.get_chat_template(self.own, tools or None)
            except ValueError:  # none has the name default
                text = " ".join(template_texts(self.tokenizer.chat_template))
            found = [key for key in TURN["thought"] if re.search(rf"\b{key}\b", text)]
            self._thought_keys[bool(tools)] = [*found, "reasoning_content"][0]
        return self._thought_keys[bool(tools)]

    def _dated(self, tools: Any) -> str | None:
        """The template to render, None for the tokenizer's; with a fixed date, `strftime_now` is a macro in it."""
        if self.date is None:
            return self.own
        own: Any = self.tokenizer.get_chat_template(self.own, tools)
        steps = "".join(
            f".replace('%{code}', {self.date.strftime(f'%{code}')!r})" for code in "aAwdbBmyYjUWcxHIpMSf"
        )
        return f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}{{{{ '' }}}}{own}"

    def render_parts(
        self, messages: Messages, tools: list[dict[str, Any]], opens_turn: bool, origin: str
    ) -> list[str]:
        """The rendered conversation, cut where each assistant turn begins: the prompt, then one part per turn.

        Raises:
            BadRow: the template fails, drops something about tools, or changes the text before an answer when
                more turns follow.
        """
        if tools or any("tool_calls" in turn for turn in messages):
            for window in Windows(messages):
                self.try_tools(window, tools, origin)
        windows = Windows(messages)
        found = self._render_blocks(windows, tools, opens_turn, origin) if windows.is_long else None
        return found or self._render_whole(messages, tools, opens_turn, origin)

    def _render_whole(
        self, messages: Messages, tools: list[dict[str, Any]], opens_turn: bool, origin: str
    ) -> list[str]:
        """The parts, by rendering the conversation up to each answer."""
        cuts = [(index, True) for index, message in enumerate(messages) if message["role"] == "assistant"]
        texts = (
            self.render(messages[:end], tools, opens, origin)
            for end, opens in [*cuts, (len(messages), opens_turn)]
        )
        after = next(texts)
        parts, start = list[str](), ""
        for number, text in enumerate(texts, start=1):
            answer = messages[-1] if number == len(cuts) and not opens_turn else None
            before, after = self._cut(after, text, answer, tools, number, origin)
            parts.append(before[len(start) :])
            start = before
        return [*parts, after[len(start) :]]

    def _cut(
        self, before: str, after: str, answer: dict[str, Any] | None, tools: Any, number: int, origin: str
    ) -> tuple[str, str]:
        """The texts before an answer and at the end of what follows it, so that one begins with the other.

        Args:
            answer: the last one of the conversation, if it ends with it; else None.
        """
        if after.startswith(before):
            return before, after
        tag, space = self._settle_opened(tools)
        base = before.removesuffix(tag + space)
        if not tag or not before.endswith(tag + space) or not after.startswith(base):
            raise BadRow(
                origin,
                f"the chat template rewrites the text before answer {number} when more turns follow; "
                "split the record so that it has one answer, or use a template that only appends.",
            )
        if answer is not None:
            return before, before + _close_thought(after[len(base) :], answer, tag, space)
        return base, after  # of an earlier answer the template keeps no thought

    def _render_blocks(
        self, windows: Windows, tools: list[dict[str, Any]], opens_turn: bool, origin: str
    ) -> list[str] | None:
        """`_render_whole` of a long conversation in time that grows with its length: a block of turns at a time.

        Returns:
            None if the blocks' texts together are not the text of the whole conversation.
        """
        messages, parts = windows.messages, list[str]()
        try:
            for block, first, count in windows.blocks():
                found = self._render_whole(block, tools, opens_turn or block[-1] is not messages[-1], origin)
                parts += found[: 1 + count] if not parts else found[first : first + count]
        except BadRow:
            return None
        before = self.render(messages[: windows.answers[-1]], tools, True, origin)
        after = self.render(messages, tools, opens_turn, origin)
        answer = messages[-1] if not opens_turn else None
        before, after = self._cut(before, after, answer, tools, len(parts), origin)
        return [*parts, after[len(before) :]] if "".join(parts) == before else None

    def _settle_opened(self, tools: list[dict[str, Any]]) -> tuple[str, str]:
        """The tag that the start of an answer ends with, and the white space after it; "" without one."""
        if bool(tools) not in self._opened:
            found, hello = None, _PROBE[:1]
            with suppress(BadRow):
                closed, opened = (self.render(hello, tools, opens, "") for opens in (False, True))
                found = re.search(r"(<[^<>|｜/\s]+>)(\s*)$", opened[_common_start(closed, opened) :])
            self._opened[bool(tools)] = (found[1], found[2]) if found else ("", "")
        return self._opened[bool(tools)]

    def take_thoughts(self, messages: Messages) -> Messages:
        """Move the thought that an answer's content begins with to its own key, if the template opens thoughts."""
        tag, _ = self._settle_opened(split_tools(messages)[1])
        if not tag:
            return messages
        end = _closing(tag)
        taken = []
        for turn in messages:
            content = turn["content"].lstrip()
            if turn["role"] == "assistant" and content.startswith(tag) and end in content:
                thought, _, answer = content.removeprefix(tag).partition(end)
                own = {"reasoning_content": thought.strip()} if thought.strip() else {}
                turn = own | turn | {"content": answer.lstrip()}
            taken.append(turn)
        return taken

    def note_not_printed(self, messages: Messages, tools: list[dict[str, Any]], note: Note, origin: str) -> None:
        """Note the system text, thoughts, names and keys of tools that the template does not print; tried once
        per kind.
        """
        if not tools and not any(_may_be_left_out(turn) for turn in messages):
            return
        for window in Windows(messages):
            keys = tuple((turn["role"], bool(turn["content"]), *sorted(turn)) for turn in window)
            kind = (keys, tuple(_keys_of(tools)))
            if kind not in self._not_printed:
                whole = self.render_parts(window, tools, False, origin)
                _make_room(self._not_printed)[kind] = [
                    name
                    for name, turns, others in _without_each(window, tools)
                    if self._has_parts(whole, turns, others)
                ]
            for name in self._not_printed[kind]:
                note(NOT_PRINTED, name)

    def _has_parts(self, whole: list[str], messages: Messages, tools: list[dict[str, Any]]) -> bool:
        try:
            return self.render_parts(messages, tools, False, "") == whole
        except BadRow:  # it misses what was taken away
            return False

    def find_end_of_call(
        self, messages: Messages, tools: list[dict[str, Any]], before: str, part: str, origin: str
    ) -> tuple[str, int] | None:
        """The special token that ends the last call of `messages`, and its position in the call's part.

        Args:
            before: the text before the part.
            part: the call and what follows it.
        Returns:
            None if the template writes no such token.
        """
        own = self.render(messages, tools, False, origin)
        start = _common_start(before, own)  # the whole of it, but for a thought that the start of an answer opens
        own, other = own[start:], self.render(_with_other_call(messages), tools, False, origin)[start:]
        same_after = _common_end(own, other)  # what the template writes after the call
        ends = [match.start() for match in self.special.finditer(own) if match.start() >= len(own) - same_after]
        if not ends:
            return None
        call = own[: ends[-1]]
        # The texts must agree from the arguments on. Before them, a template may add text if the call comes last,
        # as Qwen3 does with an empty thought.
        least = max(1, len(call) - _common_start(call, other))
        places = {match.start(): match[0] for match in self.special.finditer(part)}
        lengths = {place: _common_end(call, part[:place]) for place in places}
        fitting = [place for place, n in lengths.items() if n >= least and n in (len(call), place)]
        if not fitting:
            return None
        place = max(fitting, key=lambda place: (lengths[place], -place))
        return places[place], place

    def try_tools(self, messages: Messages, tools: list[dict[str, Any]], origin: str) -> None:
        """Raise BadRow if the template drops a tool, a call, its arguments, a result or content next to a call."""
        order = tuple((turn["role"], len(turn.get("tool_calls", ())), bool(turn["content"])) for turn in messages)
        if (order, len(tools)) not in self._lost:
            text = self.render(messages, tools, False, origin)
            lost = (
                what
                for what, other, other_tools in _variants(messages, tools)
                if self._renders_as(text, other, other_tools)
            )
            _make_room(self._lost)[order, len(tools)] = next(lost, None)
        found = self._lost[order, len(tools)]
        if found is not None:
            raise BadRow(
                origin,
                f"the chat template drops {found}; use one that writes it (--chat-template FILE), or remove the "
                "record.",
            )

    def _renders_as(self, text: str, messages: Messages, tools: list[dict[str, Any]]) -> bool:
        try:
            return self.render(messages, tools, False, "") == text
        except BadRow:  # it reads the changed value
            return False


def _make_room(known: dict[Any, Any]) -> dict[Any, Any]:
    """The same dictionary, emptied if it has become large."""
    if len(known) >= MAX_KNOWN:
        known.clear()
    return known


def _may_be_left_out(turn: dict[str, Any]) -> bool:
    """Whether a turn has something that templates drop without an error."""
    return turn["role"] == "system" or "reasoning_content" in turn or _has_own_name(turn)


def _has_own_name(turn: dict[str, Any]) -> bool:
    """Whether a turn has a name that stands nowhere else: a result's is that of its call."""
    return "name" in turn and turn["role"] != "tool"


def _keys_of(tools: list[dict[str, Any]]) -> list[tuple[bool, str]]:
    """(whether it is the function's, name) of every key of tools that a template may leave out."""
    keys = {(False, key) for tool in tools for key in tool if key not in ("type", "function")}
    keys |= {(True, key) for tool in tools for key in tool["function"] if key != "name"}
    return sorted(keys)


def _without_each(
    messages: Messages, tools: list[dict[str, Any]]
) -> Iterator[tuple[str, Messages, list[dict[str, Any]]]]:
    """Yield (what was changed or taken away, messages, tools): system text, thoughts, names and keys of tools."""
    if messages[0]["role"] == "system":
        other = messages[0] | {"content": messages[0]["content"] + " other"}
        yield "system text", [other, *messages[1:]], tools
    last = max(index for index, turn in enumerate(messages) if turn["role"] == "assistant")
    for index, turn in enumerate(messages):
        of = "thoughts" if index == last else "thoughts of earlier answers"
        for key, name in (("reasoning_content", of), ("name", "name")):
            if key in turn and (key != "name" or _has_own_name(turn)):
                other = {name: value for name, value in turn.items() if name != key}
                yield name, [*messages[:index], other, *messages[index + 1 :]], tools
    for is_inner, key in _keys_of(tools):
        fewer = [
            tool | {"function": {name: value for name, value in tool["function"].items() if name != key}}
            if is_inner
            else {name: value for name, value in tool.items() if name != key}
            for tool in tools
        ]
        yield f"{key} of tools", messages, fewer


def _closing(tag: str) -> str:
    return tag.replace("<", "</", 1)


def _close_thought(rest: str, answer: dict[str, Any], tag: str, space: str) -> str:
    """What follows an opened thought: the answer's thought, its end, and the answer as the template writes it."""
    if rest.startswith(tag):
        return rest.removeprefix(tag).lstrip()
    return f"{answer.get('reasoning_content', '').strip()}{space}{_closing(tag)}{2 * space}{rest}"


def template_texts(templates: Any) -> list[str]:
    """The text of each chat template of a tokenizer, which may have one, several by name, or none."""
    return [] if templates is None else list(templates.values()) if isinstance(templates, dict) else [templates]


def today() -> date:
    return date.today()


def date_of(tokenizer: Any) -> str:
    """The day that a template of this tokenizer prints: its `template_date`, which a run sets, or today."""
    return str(getattr(tokenizer, "template_date", None) or today())


def prints_date(tokenizer: Any) -> bool:
    """Whether a chat template of the tokenizer prints the day on which it is rendered."""
    return any("strftime_now" in text for text in template_texts(tokenizer.chat_template))


def _common_start(first: str, second: str) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(first), len(second))  # equal up to low
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _common_end(first: str, second: str) -> int:
    """Length of the common suffix."""
    return _common_start(first[::-1], second[::-1])


def _with_other_call(messages: Messages) -> Messages:
    """The conversation with different arguments in its last call."""
    changed = copy.deepcopy(messages[-1])
    function = changed["tool_calls"][-1]["function"]
    function["arguments"] = {"other": function["arguments"]}
    return [*messages[:-1], changed]


def _variants(messages: Messages, tools: list[dict[str, Any]]) -> Iterator[tuple[str, Messages, list[Any]]]:
    """Yield (what was changed, messages, tools) for each thing that must affect the text."""
    for number, tool in enumerate(tools):
        renamed = tool | {"function": tool["function"] | {"name": tool["function"]["name"] + "_other"}}
        yield "the tools", messages, [*tools[:number], renamed, *tools[number + 1 :]]
    for index, turn in enumerate(messages):

        def changed(turn: dict[str, Any], index: int = index) -> Messages:
            return [*messages[:index], turn, *messages[index + 1 :]]

        for number, call in enumerate(turn.get("tool_calls", ())):
            function = call["function"]
            for what, other in (
                ("the tool calls", {"name": function["name"] + "_other"}),
                ("the arguments of tool calls", {"arguments": {"other": function["arguments"]}}),
            ):
                varied = copy.deepcopy(turn)
                varied["tool_calls"][number]["function"] |= other
                yield what, changed(varied), tools
        if turn["role"] == "tool":
            yield "the results of tools", changed(turn | {"content": turn["content"] + " other"}), tools
        elif "tool_calls" in turn and turn["content"]:
            yield "the content next to tool calls", changed(turn | {"content": turn["content"] + " other"}), tools


# For tokenizers without a chat template, such as those of base models: Alpaca's headings, any number of turns.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] }}{{ eos_token }}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def fallback_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """FALLBACK_TEMPLATE, after BOS if this tokenizer puts BOS before plain text.

    Save it as the chat_template of a model trained with it, so that others prompt the model as it was trained.
    """
    return ("{{ bos_token }}" if bos_ids(tokenizer) else "") + FALLBACK_TEMPLATE


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts BOS before plain text, else []."""
    return [token for token in tokenizer("x")["input_ids"][:1] if token == tokenizer.bos_token_id]
