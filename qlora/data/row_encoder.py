"""Turn one conversation into token ids and a training mask: render the chat template, hide special-token text.

T tokens of one row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.data.chat_template import (
    AFTER_CALL,
    CALL,
    ChatTemplate,
    Messages,
    bos_ids,
    fallback_template,
    split_tools,
)
from qlora.data.keys import Note, ignore
from qlora.data.rows import BadRow
from qlora.data.texts import PIECE, Texts
from qlora.data.windows import Windows
from qlora.system.errors import InputError
from qlora.system.wording import quote

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SPELLED_OUT = "special tokens that answers spell out, trained as plain text"


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id that training teaches the model to stop with; not always tokenizer.eos_token_id."""
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    return _last_target(RowEncoder(tokenizer), conversation)


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`end_of_turn_id`, then the others that rows with tools teach: a call and the answer after its result may end
    otherwise, most of all where such rows have a named template of their own.
    """
    encoder, found = RowEncoder(tokenizer), [end_of_turn_id(tokenizer)]
    for conversation in (CALL, AFTER_CALL):
        with suppress(BadRow):  # most templates know no tools
            found.append(_last_target(encoder, conversation))
    return list(dict.fromkeys(found))


def _last_target(encoder: RowEncoder, conversation: Messages) -> int:
    ids, is_target = encoder.encode_row(conversation, "completion", "the tokenizer")
    return [token for token, trained in zip(ids, is_target, strict=True) if trained][-1]


def set_chat_template(tokenizer: Any, file: str) -> None:
    """Give the tokenizer the Jinja template in a file, after a test conversation.

    Raises:
        InputError: the file cannot be read, or its template is not usable for training.
    """
    try:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {file} cannot be read ({error}); give a file in UTF-8.") from error
    if not tokenizer.chat_template.strip():
        raise InputError(f"--chat-template {file} is empty; write a Jinja template.")
    try:
        end_of_turn_id(tokenizer)
    except BadRow as error:
        problem = error.problem.replace("; fix the record", "; fix it")
        raise InputError(f"--chat-template {file}: {problem}") from error


Row = tuple[list[int], list[bool]]  # ids t_0 .. t_T, and for each whether it is a target


@dataclass(frozen=True)
class RenderedRow:
    """A row before it is tokenized.

    Attributes:
        parts: texts to tokenize one by one; none is a continuation of another.
        hidden: private-use character -> the special token that it hides in them.
        finish: the parts' ids -> the row; raises BadRow.
        may_end: a long text, of which the first ids are enough.
    """

    parts: list[str]
    hidden: dict[int, str]
    finish: Callable[[list[list[int]]], Row]
    may_end: bool = False


class RowEncoder:
    """Encodes conversations with a tokenizer and its special tokens; picklable for worker processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, parse_special: bool = False) -> None:
        self.tokenizer, self.parse_special = tokenizer, parse_special
        self.texts = Texts(tokenizer)
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        contents = {token.content for token in added} | set(tokenizer.all_special_tokens)
        longest_first = "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)"
        self.token_ids: dict[str, Any] = {text: tokenizer.convert_tokens_to_ids(text) for text in contents}
        self.special = re.compile(f"({longest_first})")
        self.end_of_turn = re.compile(rf"\s*({longest_first})")
        own = None if tokenizer.chat_template else fallback_template(tokenizer)
        self.template = ChatTemplate(tokenizer, own, self.special)
        self._end: str | None = None  # the token that ends a turn, once asked for
        # Tokens that strip the white space before or after them.
        self.strips_left = {token.content for token in added if token.lstrip}
        self.strips_right = {token.content for token in added if token.rstrip}

    def encode_prompt(self, messages: Messages) -> list[int]:
        if messages[0]["role"] == "document":
            return self._after_bos(self._token_ids(messages[0]["content"]))
        if messages[0]["role"] == "tokens":
            return self._check_vocabulary(messages[0]["input_ids"], "the prompt")
        messages = self.template.take_thoughts(messages)
        if self.parse_special:
            messages = self._without_end(messages)
        messages, hidden = self._hide_special_text(messages)
        turns, tools = split_tools(messages)
        parts = self.template.render_parts(turns, tools, True, "the prompt")
        return [token for part in parts for token in self._part_ids(part, hidden, "the prompt")]

    def encode_row(self, messages: Messages, train_on: str, origin: str, note: Note = ignore) -> Row:
        """The whole row.

        Args:
            note: takes what the template does not print, and special tokens that answers spell out.
        """
        row = self._render_row(messages, train_on, origin, note)
        return row.finish([self._part_ids(part, row.hidden, origin) for part in row.parts])

    def encode_rows(
        self, rows: Iterable[tuple[Messages, str, Note]], train_on: str, limit: int
    ) -> list[Row | BadRow]:
        """`encode_row` of many rows, (messages, origin, note) each; their texts are tokenized in one call.

        A tokenizer takes several times as long for a text of its own as for one among many.

        Args:
            limit: of a long document only this many ids are needed, and it may end after them.
        """
        rendered: list[tuple[RenderedRow, str] | BadRow] = []
        for messages, origin, note in rows:
            try:
                rendered.append((self._render_row(messages, train_on, origin, note), origin))
            except BadRow as error:
                rendered.append(error)
        good = [item[0] for item in rendered if isinstance(item, tuple)]
        plain = [part for row in good if not row.hidden and not row.may_end for part in row.parts]
        known = iter(self.texts.ids(plain))
        found: list[Row | BadRow] = []
        for item in rendered:
            if isinstance(item, BadRow):
                found.append(item)
                continue
            row, origin = item
            try:
                if row.may_end:
                    ids = [self.texts.first_ids(part, limit) for part in row.parts]
                else:
                    ids = [self._part_ids(p, row.hidden, origin) if row.hidden else next(known) for p in row.parts]
                found.append(row.finish(ids))
            except BadRow as error:
                found.append(error)
        return found

    def _render_row(self, messages: Messages, train_on: str, origin: str, note: Note) -> RenderedRow:
        if messages[0]["role"] == "document":
            return self._render_document(messages, origin)
        if messages[0]["role"] == "tokens":
            ids = self._check_vocabulary(messages[0]["input_ids"], origin)
            row = ids, [True] * len(ids) if train_on == "all" else messages[0]["is_target"]
            return RenderedRow([], {}, lambda _: row)
        messages = self.template.take_thoughts(messages)
        if self.parse_special:
            messages = self._without_end(messages)
        messages, hidden = self._hide_special_text(messages)
        turns, tools = split_tools(messages)
        parts = self.template.render_parts(turns, tools, False, origin)
        self.template.note_not_printed(turns, tools, note, origin)

        def finish(part_ids: list[list[int]]) -> Row:
            ids = list(part_ids[0])
            is_target = [False] * len(ids)
            before = parts[0]  # all before the part; only short conversations use it
            windows = Windows(turns)
            answers = windows.answers
            for index, part, own in zip(answers, parts[1:], part_ids[1:], strict=True):
                num_trained = 0
                if turns[index].get("weight") != 0 and (train_on != "last" or index == answers[-1]):
                    near = windows.until(index) if "tool_calls" in turns[index] else turns[index : index + 1]
                    text = None if windows.is_long else before
                    num_trained = self._num_trained(near, tools, text, part, own, hidden, origin)
                    for code, token in hidden.items():
                        if chr(code) in part and any(chr(code) in text for text in _texts_of(turns[index])):
                            note(SPELLED_OUT, token)
                ids += own
                is_target += [place < num_trained for place in range(len(own))]
                before += "" if windows.is_long else part
            return ids, [True] * len(ids) if train_on == "all" else is_target

        return RenderedRow(parts, hidden, finish)

    def _render_document(self, messages: Messages, origin: str) -> RenderedRow:
        """BOS, the text and EOS; one each, whether the text has them or not."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise BadRow(origin, "the tokenizer has no eos_token to end a document; set one.")
        text = messages[0]["content"]
        if text.rstrip().endswith(self.tokenizer.eos_token):  # white space after the end would ask for another one
            text = text.rstrip()

        def finish(part_ids: list[list[int]]) -> Row:
            ids = self._after_bos(part_ids[0])
            ids = ids if ids[-1:] == [eos] and len(ids) > 1 else [*ids, eos]
            is_blank = not text.strip()  # would only teach BOS -> EOS
            return ids, [not is_blank] * len(ids)

        return RenderedRow([text], {}, finish, may_end=len(text) > PIECE)

    def _token_ids(self, text: str) -> list[int]:
        return self.texts.ids([text])[0]

    def _after_bos(self, ids: list[int]) -> list[int]:
        return ids if self._bos and ids[:1] == self._bos else self._bos + ids

    @cached_property
    def _bos(self) -> list[int]:
        return bos_ids(self.tokenizer)

    def _without_end(self, messages: Messages) -> Messages:
        """Answers without the token that ends a turn at their end: the template writes it."""
        if self._end is None:
            self._end = str(self.tokenizer.convert_ids_to_tokens(end_of_turn_id(self.tokenizer)))
        end = self._end
        return [
            turn | {"content": turn["content"].rstrip().removesuffix(end)}
            if turn["role"] == "assistant" and turn["content"].rstrip().endswith(end)
            else turn
            for turn in messages
        ]

    def _num_trained(
        self, turns: Messages, tools: list[dict[str, Any]], before: str | None, part: str, ids: list[int],
        hidden: dict[int, str], origin: str,
    ) -> int:  # fmt: skip
        """How many of a part's ids are the last answer of `turns` and the token that ends it."""
        token_id, num_before = self._find_end_of_turn(turns, tools, before, part, origin)
        places = [place for place, id_ in enumerate(ids) if id_ == token_id]
        if num_before < len(places):
            return places[num_before] + 1
        content = turns[-1]["content"].strip()
        shown = quote(content.translate(hidden))
        if content not in part:
            raise BadRow(
                origin,
                f"the chat template does not write the answer {shown} unchanged: it strips or moves a part of it, "
                "such as a thought; write the thought as reasoning_content, split the record so that this answer "
                "is its last, or use a template that writes each answer unchanged.",
            )
        raise BadRow(
            origin,
            f"the chat template writes no special token after the answer {shown}, so the model "
            "could not learn to stop; use one that writes each answer unchanged, then eos_token.",
        )

    def _check_vocabulary(self, ids: list[int], origin: str) -> list[int]:
        """The ids, if all are in the vocabulary; else BadRow."""
        size = len(self.tokenizer)
        if not 0 <= min(ids) <= max(ids) < size:
            place, token = next((place, token) for place, token in enumerate(ids, 1) if not 0 <= token < size)
            problem = (
                f"input_ids holds {quote(token)} at index {place}, but this model's tokens are 0 to {size - 1}"
            )
            raise BadRow(origin, f"{problem}; tokenize the data with this model's tokenizer.")
        return ids

    def _hide_special_text(self, messages: Messages) -> tuple[Messages, dict[int, str]]:
        """Replace each special token spelled out in a content, a call or a tool by a private-use character.

        Returns:
            (messages, hidden): hidden maps the characters back (for str.translate); usually empty.
        """
        if self.parse_special or not any(map(self.special.search, _texts_of(messages))):
            return messages, {}
        taken = {*str(self.tokenizer.chat_template)}.union(*_texts_of(messages))
        free = (code for code in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)) if chr(code) not in taken)
        codes: dict[str, int] = {}

        def hide(match: re.Match[str]) -> str:
            if match[0] not in codes:
                codes[match[0]] = next(free)
            return chr(codes[match[0]])

        messages = [
            {
                key: value if key == "role" else _change_texts(value, hide, self.special)
                for key, value in turn.items()
            }
            for turn in messages
        ]
        return messages, {code: text for text, code in codes.items()}

    def _part_ids(self, part: str, hidden: dict[int, str], origin: str) -> list[int]:
        if not any(chr(code) in part for code in hidden):
            return self._token_ids(part)
        ids: list[int] = []
        pieces = ["", *self.special.split(part), ""]  # "", text, token, text, ..., token, text, ""
        for before, text, after in zip(pieces[:-1:2], pieces[1::2], pieces[2::2], strict=True):
            text = text.lstrip() if before in self.strips_right else text
            text = text.rstrip() if after in self.strips_left else text
            ids += self._text_ids(text.translate(hidden), before)
            if after:
                ids.append(self.token_ids[after])
        for code, token in hidden.items():
            # A Unigram or word-level vocabulary may contain a special token's text as an ordinary piece.
            is_written = ids.count(self.token_ids[token]) == pieces.count(token)
            if chr(code) in part and not is_written and token != self.tokenizer.unk_token:
                raise BadRow(
                    origin,
                    f"a message contains {quote(token)}, which this tokenizer cannot encode as plain text; remove "
                    "it, or pass --parse-special to parse it as a control token.",
                )
        return ids

    def _text_ids(self, text: str, before: str) -> list[int]:
        """Ids of plain text after the special token `before`, or at the start of a part ("")."""

        def encode(text: str) -> list[int]:
            options: Any = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return self.tokenizer(text, **options)["input_ids"]

        if not before or not text or self._token_ids(before + "a")[1:] == encode("a"):
            return encode(text)
        # A SentencePiece tokenizer may write its "▁" only at the start of a part: do not let the text start there.
        for lead in ("\n", "a", "1", "."):
            lead_ids, ids = encode(lead), encode(lead + text)
            if ids[: len(lead_ids)] == lead_ids:  # no token spans both: the rest belongs to the text
                return ids[len(lead_ids) :]
        return encode(text)

    def _find_end_of_turn(
        self, turns: Messages, tools: list[dict[str, Any]], before: str | None, part: str, origin: str
    ) -> tuple[int | None, int]:
        """The special token that ends the last answer of `turns`, and how often it occurs earlier in `part`.

        `part` begins with that answer and follows the text `before` (None: what the template writes for the turns
        before it). The token is an id, or None if there is none.
        """
        if "tool_calls" in turns[-1]:
            if before is None:
                before = self.template.render(turns[:-1], tools, True, origin)
            found = self.template.find_end_of_call(turns, tools, before, part, origin)
            return (None, 0) if found is None else (self.token_ids[found[0]], part.count(found[0], 0, found[1]))
        content = turns[-1]["content"].strip()  # many templates strip it
        start = part.find(content)
        while start >= 0:
            if match := self.end_of_turn.match(part, start + len(content)):
                return self.token_ids[match[1]], part.count(match[1], 0, match.start(1))
            start = part.find(content, start + 1)
        return None, 0


def _texts_of(value: Any) -> Generator[str, None, None]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _texts_of(item)


def _change_texts(value: Any, change: Any, pattern: re.Pattern[str]) -> Any:
    """A JSON value with `pattern` replaced in every text."""
    if isinstance(value, str):
        return pattern.sub(change, value)
    if isinstance(value, dict):
        return {_change_texts(key, change, pattern): _change_texts(v, change, pattern) for key, v in value.items()}
    return [_change_texts(item, change, pattern) for item in value] if isinstance(value, list) else value
