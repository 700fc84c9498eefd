r"""From a conversation to one training row: encode_example; from its beginning to a prompt: encode_prompt.

A target is the token that the model must predict at a position. With the row's tokens t_0 .. t_T,

    input_ids   t_0  t_1  ...  t_(T-1)      what the model reads
    targets     t_1  t_2  ...  t_T          what it must say next, IGNORE_INDEX where it is not trained

The shift happens here, once, per row: whoever packs or cuts rows later cannot leak one into the next.

What is trained: the assistant's turns, each up to and including its end-of-turn token, so that the model
learns to stop (train_on="completion"); or every token (train_on="all"). Targets are chosen by position and
never by token id, for pad, eos and end of turn are often one id. What follows the end of turn is context.

How a row is tokenised: the chat template renders the conversation to text, the text is cut where each answer
begins, and each part is tokenised by itself:

    part      text (ChatML)                                                               targets
    prompt    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n                     none
    turn 1    Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n  Hello!<|im_end|>
    turn 2    Bye!<|im_end|>\n                                                            Bye!<|im_end|>

Why by parts: on the whole text a BPE tokenizer merges across the cut. The "\n" that ends the prompt and a
"\n" that begins the answer become one token, and training follows a prompt that generation never sees. By
parts, encode_prompt's ids begin the training row exactly, and both come from the same code. (A SentencePiece
tokenizer may open each part with its "▁": it does so in both.) No special token is added: BOS is up to the
template.

Special tokens in a message: "<|im_end|>" inside a content is text about a token, not the end of a turn, and it
is encoded as text unless parse_special is set. Such a text is hidden from the template and from the tokenizer
behind a private-use character; the rendered part is then cut at the special tokens that are left, which are the
template's own, and the stretches between them are encoded, unhidden, with special tokens switched off. Rows
without such text, nearly all, take the plain way. (transformers' sanitize_control_tokens has the same aim, but
gives ids only, and the targets are found in the text.) Text that the template itself joins into a token is out
of reach, and a document is parsed as it stands: whole rendered conversations may be given as `text`.

Tools: the record's tools go to the template with every part, a call is an answer like any other, and results of
tools are context. template.py tells where a call ends, and refuses a template that leaves something of them out.

Tokenised records take none of this: their ids are checked against the vocabulary and stand as they are.

Shapes: T tokens of one row.
"""

import re
from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora.errors import InputError
from qlora.records import to_messages
from qlora.rows import BadRow, Record, collect_bad_row, quote, sort_by_place
from qlora.template import ChatTemplate, Messages, split_tools
from qlora.workers import map_chunks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

# For a tokenizer without a chat template, as base models have: Alpaca's headings, for any number of turns.
FALLBACK_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] }}{{ eos_token }}{{ '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


CHUNK_SIZE = 128  # records that a worker process takes at a time


@dataclass
class Example:
    """One row: input_ids (T,) int64; targets (T,) int64, shifted already, IGNORE_INDEX where not trained.

    `origin` is where it stood, such as `train.jsonl:17`.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    origin: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE_INDEX).sum())


@dataclass
class EncodeReport:
    """What became of the records. str(report) is one line for the user."""

    num_records: int = 0
    num_truncated: int = 0  # kept, but cut at max_length
    num_dropped_long: int = 0
    num_dropped_no_target: int = 0
    num_bad_rows: int = 0
    num_tokens: int = 0
    num_targets: int = 0

    def __str__(self) -> str:
        num_kept = self.num_records - self.num_dropped_long - self.num_dropped_no_target - self.num_bad_rows
        share = self.num_targets / max(self.num_tokens, 1)
        skipped = f"; {self.num_bad_rows:,} bad rows skipped" if self.num_bad_rows else ""
        return (
            f"{num_kept:,} of {self.num_records:,} records kept ({self.num_truncated:,} truncated; dropped: "
            f"{self.num_dropped_long:,} too long, {self.num_dropped_no_target:,} without a target{skipped}), "
            f"{self.num_tokens:,} tokens, {self.num_targets:,} of them targets ({share:.0%})"
        )

    def admit(self, row: Example, max_length: int, on_long: str) -> Example | None:
        """Count one whole row, and return what is trained of it: at most max_length tokens, or None."""
        self.num_records += 1
        is_long = len(row) > max_length
        example = Example(row.input_ids[:max_length], row.targets[:max_length], row.origin)
        num_targets = example.num_targets
        if is_long and on_long == "drop":
            self.num_dropped_long += 1
            return None
        if num_targets == 0:
            self.num_dropped_no_target += 1
            return None
        self.num_truncated += is_long
        self.num_tokens += len(example)
        self.num_targets += num_targets
        return example


def encode_prompt(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", parse_special: bool = False
) -> list[int]:
    """Ids of the conversation up to where the assistant begins: exactly how a training row begins.

    A document is its own beginning: BOS, where the tokenizer adds one, and the text.
    """
    return RowEncoder(tokenizer, parse_special).encode_prompt(messages)


def encode_example(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    train_on: str = "completion",
    origin: str = "the conversation",
    parse_special: bool = False,
) -> Example:
    """One conversation, or one document, as a row of at most max_length tokens: the first ones are kept.

    Args:
        messages:      what to_messages returns; "weight": 0 makes a turn context; a document is all targets.
        train_on:      "completion" (the assistant's turns) or "all" (every token).
        origin:        the record's place, for errors.
        parse_special: special-token text in a message becomes the token.
    Returns:
        Example with T <= max_length; it has no target if truncation took them all.
    Raises:
        BadRow: the template rewrites earlier turns, or writes no end-of-turn token after an answer.
    """
    _check_options(max_length, train_on, "truncate")
    row = RowEncoder(tokenizer, parse_special).encode_row(messages, train_on, origin)
    return shift_targets(*row, max_length, origin)


def encode_records(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    train_on: str = "completion",
    on_long: str = "truncate",
    *,
    parse_special: bool = False,
    num_workers: int = 0,
    bad_rows: list[BadRow] | None = None,
) -> tuple[list[Example], EncodeReport]:
    """Every record as a row. Rows without a target teach nothing: they are dropped and counted.

    Args:
        on_long:       "truncate" keeps a longer row's first max_length tokens, "drop" leaves it out.
        parse_special: special-token text in a message becomes the token.
        num_workers:   processes that tokenise; 0 is this one. The result is the same, in the same order.
        bad_rows:      receives the records that cannot be used, among those that read_records put there, in the
            order of the file, and all of them are counted; None: the first one is raised.
    Raises:
        BadRow: a record cannot be used, and there is no list for it.
        InputError: nothing is left to train on.
        TrainingStopped: a worker died.
    """
    examples, report = [], EncodeReport()
    options: Any = dict(parse_special=parse_special, num_workers=num_workers)
    rows = stream_examples(records, tokenizer, max_length, train_on, on_long, report, **options)
    with closing(rows):
        for row in rows:
            if isinstance(row, BadRow):
                collect_bad_row(row, bad_rows)
            else:
                examples.append(row)
    finish_report(report, bad_rows or [], len(examples), max_length)
    return examples, report


def stream_examples(
    records: Iterable[Record | BadRow],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    train_on: str,
    on_long: str,
    report: EncodeReport,
    *,
    parse_special: bool = False,
    num_workers: int = 0,
) -> Generator[Example | BadRow, None, None]:
    """The rows that are trained and the bad ones, one after another; `report` counts the others along.

    Arguments and errors as `encode_records`; close it to end its workers early. Call `finish_report` at the end.
    """
    _check_options(max_length, train_on, on_long)
    encode = partial(_encode_chunk, RowEncoder(tokenizer, parse_special), train_on, max_length)
    tasks = map(_read_task, records)
    chunks = iter(lambda: list(islice(tasks, CHUNK_SIZE)), [])
    with closing(map_chunks(encode, chunks, num_workers)) as results:  # an error here ends the workers
        for result in chain.from_iterable(results):
            if isinstance(result, BadRow):
                yield result
                continue
            ids, is_target, origin = result
            row = shift_targets(ids, is_target, max_length + 1, origin)
            example = report.admit(row, max_length, on_long)
            if example is not None:
                yield example


def finish_report(report: EncodeReport, bad_rows: list[BadRow], num_kept: int, max_length: int) -> None:
    """Count the bad rows of a source too, in the source's order; InputError if it left nothing to train on."""
    if bad_rows:
        sort_by_place(bad_rows)
        report.num_bad_rows = len(bad_rows)
        report.num_records += len(bad_rows)
    if bad_rows and report.num_bad_rows == report.num_records:
        raise InputError(f"All {report.num_records} records are bad, the first one is {bad_rows[0]}")
    if not num_kept:
        raise InputError(
            f"None of {report.num_records} records is left at --max-length {max_length}: "
            f"{report.num_dropped_long} too long, {report.num_dropped_no_target} without a target within it, "
            f"{report.num_bad_rows} bad; raise it or mend the data."
        )


_Task = tuple[list[dict[str, Any]], str] | BadRow  # messages and origin
_Result = tuple[list[int], list[bool], str] | BadRow  # t_0 .. t_T, whether each is predicted, origin


def _read_task(record: Record | BadRow) -> _Task:
    if isinstance(record, BadRow):
        return record
    try:
        return to_messages(record), record.origin
    except BadRow as error:
        return error


def _encode_chunk(encoder: "RowEncoder", train_on: str, max_length: int, tasks: list[_Task]) -> list[_Result]:
    """Rows of at most max_length + 1 tokens to read: one too many tells that a row is long."""
    results: list[_Result] = []
    for task in tasks:
        if isinstance(task, BadRow):
            results.append(task)
            continue
        messages, origin = task
        try:
            ids, is_target = encoder.encode_row(messages, train_on, origin)
            results.append((ids[: max_length + 2], is_target[: max_length + 2], origin))
        except BadRow as error:
            results.append(BadRow(error.where, error.problem))
    return results


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that training teaches the model to stop with; not always tokenizer.eos_token_id."""
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids, is_target = RowEncoder(tokenizer).encode_row(conversation, "completion", "the tokenizer")
    return [token for token, trained in zip(ids, is_target, strict=True) if trained][-1]


def set_chat_template(tokenizer: Any, file: str) -> None:
    """Give the tokenizer the Jinja template of a file, after a conversation was rendered with it.

    Raises:
        InputError: the file cannot be read, or its template cannot train a model.
    """
    try:
        tokenizer.chat_template = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--chat-template {file} cannot be read ({error}); give a file in UTF-8.") from error
    if not tokenizer.chat_template.strip():
        raise InputError(f"--chat-template {file} is empty; write a template in Jinja.")
    try:
        end_of_turn_id(tokenizer)
    except BadRow as error:
        problem = error.problem.replace("; mend the record", "; correct it")
        raise InputError(f"--chat-template {file}: {problem}") from error


def fallback_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """FALLBACK_TEMPLATE, after the BOS if this tokenizer puts one before plain text.

    Save a model trained with it as the tokenizer's chat_template, so that others prompt it as it was trained.
    """
    return ("{{ bos_token }}" if _bos_ids(tokenizer) else "") + FALLBACK_TEMPLATE


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def show_controls(text: str) -> str:
    """`text` with control characters written out, such as \\x1b: a terminal would obey them."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def format_sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The row as the model sees it, special tokens and all, with the targets between ⟦ and ⟧."""
    is_target = (example.targets != IGNORE_INDEX).tolist()
    ids = example.input_ids.tolist() + example.targets[-1:].tolist()
    pieces = []
    for trained, run in groupby(zip([False, *is_target], ids, strict=True), key=lambda pair: pair[0]):
        run_ids = [token for _, token in run if token != IGNORE_INDEX]
        text: Any = tokenizer.decode(run_ids, clean_up_tokenization_spaces=False)
        text = show_controls(text)
        pieces.append(f"⟦{text}⟧" if trained else text)
    return f"{len(example)} tokens, {example.num_targets} targets between ⟦ and ⟧:\n{''.join(pieces)}"


def _check_options(max_length: int, train_on: str, on_long: str) -> None:
    if max_length < 1:
        raise InputError(f"max_length is {max_length}; give at least 1.")
    if train_on not in ("completion", "all"):
        raise InputError(f"train_on is '{train_on}'; use 'completion' or 'all'.")
    if on_long not in ("truncate", "drop"):
        raise InputError(f"on_long is '{on_long}'; use 'truncate' or 'drop'.")


def _token_ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _bos_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """[BOS] if the tokenizer puts one before plain text, else []."""
    return [token for token in tokenizer("x")["input_ids"][:1] if token == tokenizer.bos_token_id]


class RowEncoder:
    """A tokenizer that knows its special tokens; it can be sent to another process."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", parse_special: bool = False) -> None:
        self.tokenizer, self.parse_special = tokenizer, parse_special
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        contents = {token.content for token in added} | set(tokenizer.all_special_tokens)
        longest_first = "|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)"
        self.token_ids: dict[str, Any] = {text: tokenizer.convert_tokens_to_ids(text) for text in contents}
        self.special = re.compile(f"({longest_first})")
        self.end_of_turn = re.compile(rf"\s*({longest_first})")
        own = None if tokenizer.chat_template else fallback_template(tokenizer)
        self.template = ChatTemplate(tokenizer, own, self.special)
        # Tokens that swallow the white space before or after them.
        self.strips_left = {token.content for token in added if token.lstrip}
        self.strips_right = {token.content for token in added if token.rstrip}

    def encode_prompt(self, messages: Messages) -> list[int]:
        if messages[0]["role"] == "document":
            return _bos_ids(self.tokenizer) + _token_ids(messages[0]["content"], self.tokenizer)
        if messages[0]["role"] == "tokens":
            return self._check_vocabulary(messages[0]["input_ids"], "the prompt")
        messages, hidden = self._hide_special_text(messages)
        turns, tools = split_tools(messages)
        parts = self.template.render_parts(turns, tools, True, "the prompt")
        return [token for part in parts for token in self._part_ids(part, hidden, "the prompt")]

    def encode_row(self, messages: Messages, train_on: str, origin: str) -> tuple[list[int], list[bool]]:
        """The whole row: ids t_0 .. t_T, and for each whether it is to be predicted."""
        if messages[0]["role"] == "document":
            if self.tokenizer.eos_token_id is None:
                raise BadRow(origin, "the tokenizer has no eos_token to end a document with; set one.")
            ids = [*self.encode_prompt(messages), self.tokenizer.eos_token_id]
            is_blank = not messages[0]["content"].strip()  # would teach nothing but BOS -> eos
            return ids, [not is_blank] * len(ids)
        if messages[0]["role"] == "tokens":
            ids = self._check_vocabulary(messages[0]["input_ids"], origin)
            return ids, [True] * len(ids) if train_on == "all" else messages[0]["is_target"]
        messages, hidden = self._hide_special_text(messages)
        turns, tools = split_tools(messages)
        prompt, *parts = self.template.render_parts(turns, tools, False, origin)
        ids = self._part_ids(prompt, hidden, origin)
        is_target = [False] * len(ids)
        before = prompt
        answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        for index, part in zip(answers, parts, strict=True):
            part_ids, num_trained = self._part_ids(part, hidden, origin), 0
            if turns[index].get("weight") != 0:
                token_id, num_before = self._find_end_of_turn(turns[: index + 1], tools, before, part, origin)
                places = [place for place, id_ in enumerate(part_ids) if id_ == token_id]
                if num_before >= len(places):
                    content = quote(turns[index]["content"].translate(hidden))
                    raise BadRow(
                        origin,
                        f"the chat template writes no special token after the answer {content}, so the model "
                        "could not learn to stop; use one that ends each answer, as it stands, in eos_token.",
                    )
                num_trained = places[num_before] + 1
            ids += part_ids
            is_target += [place < num_trained for place in range(len(part_ids))]
            before += part
        return ids, [True] * len(ids) if train_on == "all" else is_target

    def _check_vocabulary(self, ids: list[int], origin: str) -> list[int]:
        """The ids, if each is one of the vocabulary."""
        size = len(self.tokenizer)
        if not 0 <= min(ids) <= max(ids) < size:
            place, token = next((place, token) for place, token in enumerate(ids, 1) if not 0 <= token < size)
            problem = (
                f"input_ids holds {quote(token)} at place {place}, but this model's tokens are 0 to {size - 1}"
            )
            raise BadRow(origin, f"{problem}; tokenise the data with this model's tokenizer.")
        return ids

    def _hide_special_text(self, messages: Messages) -> tuple[Messages, dict[int, str]]:
        """Put one private-use character for each special token spelled out in a content, a call or a tool.

        Returns:
            (messages, hidden): hidden maps the characters back, as str.translate takes it; mostly empty.
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
            return _token_ids(part, self.tokenizer)
        ids: list[int] = []
        pieces = ["", *self.special.split(part), ""]  # "", text, token, text, ..., token, text, ""
        for before, text, after in zip(pieces[:-1:2], pieces[1::2], pieces[2::2], strict=True):
            text = text.lstrip() if before in self.strips_right else text
            text = text.rstrip() if after in self.strips_left else text
            ids += self._text_ids(text.translate(hidden), before)
            if after:
                ids.append(self.token_ids[after])
        for code, token in hidden.items():
            # A Unigram vocabulary may spell a special token as one piece of text; so may a word-level one.
            is_written = ids.count(self.token_ids[token]) == pieces.count(token)
            if chr(code) in part and not is_written and token != self.tokenizer.unk_token:
                raise BadRow(
                    origin,
                    f"a message holds {quote(token)}, which this tokenizer cannot write as plain text; remove it, "
                    "or pass --parse-special to let it be the control token.",
                )
        return ids

    def _text_ids(self, text: str, before: str) -> list[int]:
        """Ids of plain text after the special token `before`, or at the beginning of a part ("")."""

        def encode(text: str) -> list[int]:
            options: Any = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return self.tokenizer(text, **options)["input_ids"]

        if not before or not text or _token_ids(before + "a", self.tokenizer)[1:] == encode("a"):
            return encode(text)
        # A SentencePiece tokenizer may write its "▁" only where a part begins: there the text must not begin.
        for lead in ("\n", "a", "1", "."):
            lead_ids, ids = encode(lead), encode(lead + text)
            if ids[: len(lead_ids)] == lead_ids:  # no token spans the two, so the rest is the text's own
                return ids[len(lead_ids) :]
        return encode(text)

    def _find_end_of_turn(
        self, turns: Messages, tools: list[dict[str, Any]], before: str, part: str, origin: str
    ) -> tuple[int | None, int]:
        """Of the answer that `turns` end in and `part` begins with, after the text `before`: the special token
        that ends it, if any, as an id; and how often that token stands in the part before.
        """
        if "tool_calls" in turns[-1]:
            found = self.template.find_end_of_call(turns, tools, before, part, origin)
            return (None, 0) if found is None else (self.token_ids[found[0]], part.count(found[0], 0, found[1]))
        content = turns[-1]["content"].strip()  # as many templates do
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


def shift_targets(ids: list[int], is_target: list[bool], max_length: int, origin: str) -> Example:
    """The row of t_0 .. t_T, cut to its first max_length positions."""
    targets = [token if trained else IGNORE_INDEX for token, trained in zip(ids[1:], is_target[1:], strict=True)]
    return Example(torch.tensor(ids[:-1][:max_length]).long(), torch.tensor(targets[:max_length]).long(), origin)
