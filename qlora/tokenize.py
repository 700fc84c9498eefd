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

Shapes: T tokens of one row.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from qlora.errors import InputError
from qlora.records import Record, to_messages

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


@dataclass
class Example:
    """One row: input_ids (T,) int64; targets (T,) int64, shifted already, IGNORE_INDEX where not trained."""

    input_ids: torch.Tensor
    targets: torch.Tensor

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
    num_tokens: int = 0
    num_targets: int = 0

    def __str__(self) -> str:
        num_kept = self.num_records - self.num_dropped_long - self.num_dropped_no_target
        share = self.num_targets / max(self.num_tokens, 1)
        return (
            f"{num_kept:,} of {self.num_records:,} records kept ({self.num_truncated:,} truncated; dropped: "
            f"{self.num_dropped_long:,} too long, {self.num_dropped_no_target:,} without a target), "
            f"{self.num_tokens:,} tokens, {self.num_targets:,} of them targets ({share:.0%})"
        )


def encode_prompt(messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of the conversation up to where the assistant begins: exactly how a training row begins.

    A document is its own beginning: BOS, where the tokenizer adds one, and the text.
    """
    if messages[0]["role"] == "document":
        return _bos_ids(tokenizer) + _token_ids(messages[0]["content"], tokenizer)
    parts = _render_parts(messages, tokenizer, add_generation_prompt=True, origin="the prompt")
    return [token for part in parts for token in _token_ids(part, tokenizer)]


def encode_example(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    train_on: str = "completion",
    origin: str = "the conversation",
) -> Example:
    """One conversation, or one document, as a row of at most max_length tokens: the first ones are kept.

    Args:
        messages:   what to_messages returns; "weight": 0 makes a turn context; a document is all targets.
        train_on:   "completion" (the assistant's turns) or "all" (every token).
        origin:     the record's place, for errors.
    Returns:
        Example with T <= max_length; it has no target if truncation took them all.
    Raises:
        InputError: the template rewrites earlier turns, or writes no end-of-turn token after an answer.
    """
    _check_options(max_length, train_on, "truncate")
    return _shift(*_encode_row(messages, tokenizer, train_on, origin), max_length)


def encode_records(
    records: Iterable[Record],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    train_on: str = "completion",
    on_long: str = "truncate",
) -> tuple[list[Example], EncodeReport]:
    """Every record as a row. Rows without a target teach nothing: they are dropped and counted.

    Args:
        on_long: "truncate" keeps a longer row's first max_length tokens, "drop" leaves it out.
    Raises:
        InputError: a record cannot be used, or nothing is left to train on.
    """
    _check_options(max_length, train_on, on_long)
    examples, report = [], EncodeReport()
    for record in records:
        report.num_records += 1
        ids, is_target = _encode_row(to_messages(record), tokenizer, train_on, record.origin)
        is_long = len(ids) - 1 > max_length
        example = _shift(ids, is_target, max_length)
        if is_long and on_long == "drop":
            report.num_dropped_long += 1
        elif example.num_targets == 0:
            report.num_dropped_no_target += 1
        else:
            report.num_truncated += is_long
            report.num_tokens += len(example)
            report.num_targets += example.num_targets
            examples.append(example)
    if not examples:
        raise InputError(
            f"None of {report.num_records} records is left at --max-length {max_length}: "
            f"{report.num_dropped_long} too long, {report.num_dropped_no_target} without a target within it; "
            "raise it or mend the data."
        )
    return examples, report


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that training teaches the model to stop with; not always tokenizer.eos_token_id."""
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    ids, is_target = _encode_row(conversation, tokenizer, "completion", "the tokenizer")
    return [token for token, trained in zip(ids, is_target, strict=True) if trained][-1]


def fallback_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """FALLBACK_TEMPLATE, after the BOS if this tokenizer puts one before plain text.

    Save a model trained with it as the tokenizer's chat_template, so that others prompt it as it was trained.
    """
    return ("{{ bos_token }}" if _bos_ids(tokenizer) else "") + FALLBACK_TEMPLATE


def format_sample(example: Example, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The row as the model sees it, special tokens and all, with the targets between ⟦ and ⟧."""
    is_target = (example.targets != IGNORE_INDEX).tolist()
    ids = example.input_ids.tolist() + example.targets[-1:].tolist()
    pieces = []
    for trained, run in groupby(zip([False, *is_target], ids, strict=True), key=lambda pair: pair[0]):
        run_ids = [token for _, token in run if token != IGNORE_INDEX]
        text: Any = tokenizer.decode(run_ids, clean_up_tokenization_spaces=False)
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


def _render_parts(
    messages: list[dict[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    add_generation_prompt: bool,
    origin: str,
) -> list[str]:
    """The rendered conversation, cut where each assistant turn begins: the prompt, then one part per turn."""
    from jinja2 import TemplateError

    template = None if tokenizer.chat_template else fallback_template(tokenizer)
    cuts = [(index, True) for index, message in enumerate(messages) if message["role"] == "assistant"]
    parts: list[str] = []
    before = ""
    for end, opens_turn in [*cuts, (len(messages), add_generation_prompt)]:
        try:
            text: Any = tokenizer.apply_chat_template(
                messages[:end], chat_template=template, tokenize=False, add_generation_prompt=opens_turn
            )
        except TemplateError as error:
            raise InputError(f"{origin}: the chat template refuses it: {error}; mend the record.") from error
        if not text.startswith(before):
            raise InputError(
                f"{origin}: the chat template rewrites what precedes answer {len(parts)} once more follows; "
                "split the record so that it has one answer, or use a template that only appends."
            )
        parts.append(text[len(before) :])
        before = text
    return parts


def _encode_row(
    messages: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase", train_on: str, origin: str
) -> tuple[list[int], list[bool]]:
    """The whole row: ids t_0 .. t_T, and for each whether it is to be predicted."""
    if messages[0]["role"] == "document":
        if tokenizer.eos_token_id is None:
            raise InputError(f"{origin}: the tokenizer has no eos_token to end a document with; set one.")
        ids = [*encode_prompt(messages, tokenizer), tokenizer.eos_token_id]
        is_blank = not messages[0]["content"].strip()  # would teach nothing but BOS -> eos
        return ids, [not is_blank] * len(ids)
    prompt, *turns = _render_parts(messages, tokenizer, add_generation_prompt=False, origin=origin)
    special_tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special_tokens.update(tokenizer.all_special_tokens)
    longest_first = sorted(special_tokens, key=len, reverse=True)
    end_of_turn = re.compile(rf"\s*({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    ids = _token_ids(prompt, tokenizer)
    is_target = [False] * len(ids)
    answers = [message for message in messages if message["role"] == "assistant"]
    for answer, part in zip(answers, turns, strict=True):
        part_ids, num_trained = _token_ids(part, tokenizer), 0
        if answer.get("weight") != 0:
            token, num_before = _find_end_of_turn(part, answer["content"], end_of_turn, origin)
            token_id = tokenizer.convert_tokens_to_ids(token)
            num_trained = [index for index, id_ in enumerate(part_ids) if id_ == token_id][num_before] + 1
        ids += part_ids
        is_target += [index < num_trained for index in range(len(part_ids))]
    return ids, [True] * len(ids) if train_on == "all" else is_target


def _find_end_of_turn(part: str, content: str, end_of_turn: re.Pattern[str], origin: str) -> tuple[str, int]:
    """The special token right after the answer, and how often it stands in the part before that."""
    content = content.strip()  # as many templates do
    start = part.find(content)
    while start >= 0:
        if match := end_of_turn.match(part, start + len(content)):
            return match[1], part.count(match[1], 0, match.start(1))
        start = part.find(content, start + 1)
    raise InputError(
        f"{origin}: the chat template writes no special token after the answer '{content[:40]}', so the "
        "model could not learn to stop; use a template that ends each answer, as it stands, in eos_token."
    )


def _shift(ids: list[int], is_target: list[bool], max_length: int) -> Example:
    targets = [token if trained else IGNORE_INDEX for token, trained in zip(ids[1:], is_target[1:], strict=True)]
    return Example(torch.tensor(ids[:-1][:max_length]).long(), torch.tensor(targets[:max_length]).long())
