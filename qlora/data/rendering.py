"""Run chat templates: Jinja programs of unknown origin, in transformers' sandbox, with a limit on what they build.

`apply_chat_template` copies the conversation and the special tokens for every text, which takes half of its time.
A compiled template that is called directly writes the same; the first text of each template is compared with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BUILT = 2**27  # characters of one text of a template; a row is at most an eighth of it
MAX_TURNS_OF_RANGES = 10**6  # that all `range` of one rendering may count together


class TooMuchError(ValueError):
    """A template builds more than it may."""


def too_much() -> TooMuchError:
    return TooMuchError(f"it builds more than {MAX_BUILT:,} characters or counts beyond {MAX_TURNS_OF_RANGES:,}")


class Renderer:
    """Renders conversations with the templates of a tokenizer; picklable, without what is compiled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._programs: dict[tuple[str, bool], Callable[..., str] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer, "_programs": {}}

    def __call__(
        self, turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, own: str | None, opens_turn: bool
    ) -> str:
        """The text of a conversation.

        Args:
            own: a template to use in the place of the tokenizer's.
            opens_turn: add the start of an answer.
        Raises:
            Exception: whatever the template raises.
        """
        template: str = self.tokenizer.get_chat_template(own, tools)  # type: ignore[arg-type]
        key = (template, tools is None)
        if key not in self._programs:
            program = compile_template(self.tokenizer, template)
            slow = None if program is None else program(turns, tools, opens_turn)
            text = self._apply(turns, tools, template, opens_turn)
            self._programs[key] = program if slow == text else None
            return text
        program = self._programs[key]
        if program is None:
            return self._apply(turns, tools, template, opens_turn)
        return program(turns, tools, opens_turn)

    def _apply(self, turns: Any, tools: Any, template: str, opens_turn: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            turns, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=opens_turn
        )
        return str(text)


def compile_template(tokenizer: PreTrainedTokenizerBase, template: str) -> Callable[..., str] | None:
    """A function of (turns, tools, opens_turn) that renders as `apply_chat_template` does, within the limits.

    Returns:
        None for a tokenizer that renders in its own way.
    """
    from transformers import PreTrainedTokenizerBase as Base
    from transformers.utils import chat_template_utils

    compile_plain: Any = getattr(chat_template_utils, "_compile_jinja_template", None)
    alias: Any = getattr(chat_template_utils, "_alias_reasoning_fields", list)
    plain: Any = getattr(chat_template_utils, "_plain_template_data", None)
    if type(tokenizer).apply_chat_template is not Base.apply_chat_template or None in (compile_plain, plain):
        return None
    # Of an empty template: compiling already computes constants, here within the limits.
    environment = compile_plain("").environment.overlay()
    environment.globals = {**environment.globals}
    budget = _limit(environment)
    program = environment.from_string(template)
    program.globals = dict(program.globals)  # copied for each text, which a ChainMap makes slow
    names: dict[str, Any] = program.root_render_func.__globals__  # the compiled module: `~` is a function in it
    names["str_join"] = names["markup_join"] = _join
    fixed = {"documents": None, **tokenizer.special_tokens_map}

    def render(turns: list[dict[str, Any]], tools: list[dict[str, Any]] | None, opens_turn: bool) -> str:
        budget[0] = MAX_TURNS_OF_RANGES
        shown = alias([{key: plain(value) for key, value in turn.items() if value is not None} for turn in turns])
        values = dict(messages=shown, tools=plain(tools), add_generation_prompt=opens_turn, **fixed)
        built, pieces = 0, []
        for piece in program.root_render_func(program.new_context(values)):
            built += len(piece)
            if built > MAX_BUILT:
                raise too_much()
            pieces.append(piece)
        return "".join(pieces)

    return render


def _limit(environment: Any) -> list[int]:
    """Bound what operators and `range` of a sandbox build; returns what is left for `range`, to set each time."""
    budget = [MAX_TURNS_OF_RANGES]

    safe_range = environment.globals["range"]

    def count(*bounds: int) -> range:
        found: range = safe_range(*bounds)
        budget[0] -= len(found)
        if budget[0] < 0:
            raise too_much()
        return found

    plain = dict(environment.binop_table)

    def times(left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else side for side in (left, right)]
        if any(isinstance(side, (str, list, tuple)) for side in (left, right)) and sizes[0] * sizes[1] > MAX_BUILT:
            raise too_much()
        return plain["*"](left, right)

    def plus(left: Any, right: Any) -> Any:
        found = left + right
        if type(found) in (str, list, tuple):
            _check_size(len(found))
        return found

    def power(left: Any, right: Any) -> Any:
        _check_size(abs(right) * (left.bit_length() if isinstance(left, int) else 1))
        return plain["**"](left, right)

    def modulo(left: Any, right: Any) -> Any:
        if isinstance(left, str):
            widths = [int(number[:10]) for number in re.findall(r"\d+", left)]
            widths += [side for side in right if isinstance(side, int)] if isinstance(right, tuple) else []
            _check_size(len(left) + sum(map(abs, widths)) if "%" in left else 0)
        return plain["%"](left, right)

    environment.intercepted_binops = frozenset({"*", "+", "**", "%"})
    environment.binop_table = plain | {"*": times, "+": plus, "**": power, "%": modulo}
    environment.globals["range"] = count
    return budget


def _check_size(size: float) -> None:
    if size > MAX_BUILT:
        raise too_much()


def _join(values: Iterable[Any]) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)
