"""What the model says while it trains: completions of fixed prompts, and a score of its answers.

Both decode greedily between two steps and leave no trace in the model or in the random numbers, so that a run
computes the same losses with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator

from qlora.errors import TrainingStopped, is_out_of_memory
from qlora.records import Record, read_records, to_messages
from qlora.redact import redact
from qlora.tokenize import IGNORE_INDEX, Example, RowEncoder

DECODED_TOGETHER = 16  # prompts of a batch


@dataclass
class Prompt:
    """What the model is to go on from, as token ids and as text, and what it should say, if that is known."""

    ids: list[int]
    text: str
    expected: str | None = None


def prompt_of(example: Example, tokenizer: Any) -> Prompt:
    """A training row as a prompt: its tokens up to the first target of its last answer, which is what to expect.

    Of a row that is all targets (a document, --train-on all) the first half is the prompt.
    """
    ids, targets = example.input_ids.tolist(), example.targets.tolist()
    last = max(place for place, target in enumerate(targets) if target != IGNORE_INDEX)
    masked = [place for place in range(last) if targets[place] == IGNORE_INDEX]
    first = masked[-1] + 1 if masked else len(ids) // 2
    expected = str(tokenizer.decode(targets[first : last + 1], skip_special_tokens=True)).strip()
    return Prompt(ids[: first + 1], _text_of(ids[: first + 1], tokenizer), expected)


def choose_prompts(
    examples: Sequence[Example], tokenizer: Any, count: int, source: str | None = None, parse_special: bool = False
) -> list[Prompt]:
    """The first `count` prompts of a data file, or else of `examples`.

    Args:
        source: records as `read_records` takes them. Besides those that training takes: a prompt, or messages,
            without an answer.
    Raises:
        InputError: `source` cannot be read, or one of these records has no prompt.
    """
    if count == 0:
        return []
    if source is None:
        return [prompt_of(examples[number], tokenizer) for number in range(min(count, len(examples)))]
    encoder = RowEncoder(tokenizer, parse_special)
    return [_read_prompt(record, encoder) for record in islice(read_records(source), count)]


def _read_prompt(record: Record, encoder: RowEncoder) -> Prompt:
    question, expected = _question(record.fields), None
    if question is not None:  # with an answer in its place it is read as any record
        messages = to_messages(Record({"prompt": question, "completion": "-"}, record.origin))[:-1]
    else:
        messages = to_messages(record)
        if messages[-1]["role"] == "assistant":
            expected = messages.pop()["content"].strip()
    ids = encoder.encode_prompt(messages)
    return Prompt(ids, _text_of(ids, encoder.tokenizer), expected)


def _question(fields: dict[str, Any]) -> Any:
    """A prompt, or messages up to a user's turn, that have no answer; None in a record as training takes it."""
    turns = fields.get("messages")
    if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and turns[-1].get("role") == "user":
        return turns
    return fields.get("prompt") if "completion" not in fields else None


def _text_of(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


class Sampler:
    """Completes the prompts at a step: call it with the step, on every process.

    The main process generates while the others wait. A failure is a warning: no sample is worth a run.

    Args:
        write: takes one {"step", "prompt", "completion", "expected"} per prompt.
        warn: hears of a failure.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        accelerator: Accelerator,
        write: Callable[[list[dict[str, Any]]], object],
        warn: Callable[[str], object] = print,
    ) -> None:
        self.model, self.tokenizer, self.prompts, self.max_new_tokens = model, tokenizer, prompts, max_new_tokens
        self.accelerator, self.write, self.warn = accelerator, write, warn

    def __call__(self, step: int) -> None:
        if self.accelerator.is_main_process:
            try:
                found = answer(self.model, self.tokenizer, self.prompts, self.max_new_tokens)
                pairs = zip(self.prompts, found, strict=True)
                self.write(
                    [{"step": step, "prompt": p.text, "completion": c, "expected": p.expected} for p, c in pairs]
                )
            except Exception as error:
                problem = redact(f"{type(error).__name__}: {error}")
                self.warn(f"no samples at step {step} ({problem}); training goes on")
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()  # the memory goes back to steps of another shape
        self.accelerator.wait_for_everyone()


class AnswerScore:
    """Share of prompts that are answered as expected: call it with what asks for a stop, on every process.

    Args:
        is_match: whether an expected and a given answer are the same.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        is_match: Callable[[str, str], bool],
        max_new_tokens: int,
        accelerator: Accelerator,
    ) -> None:
        self.model, self.tokenizer, self.is_match, self.max_new_tokens = model, tokenizer, is_match, max_new_tokens
        self.accelerator, self.total = accelerator, len(prompts)
        self.mine = prompts[accelerator.process_index :: accelerator.num_processes]

    def __call__(self, stop: Callable[[], str | None] = lambda: None) -> float | None:
        """The share over all processes; None where one of them has a reason to stop.

        Raises:
            TrainingStopped: the answers could not be generated on some process.
        """
        correct, size, start = 0, DECODED_TOGETHER, 0
        failure: Exception | None = None
        reason: str | None = None
        while start < len(self.mine) and not (failure or reason):
            rows = self.mine[start : start + size]
            try:
                correct += self._count_correct(rows)
                start += len(rows)
            except Exception as error:
                size = size // 4 if is_out_of_memory(error) else 0
                failure = None if size else error
            reason = stop()
        sums = torch.tensor([correct, failure is not None, reason is not None], device=self.accelerator.device)
        correct, failures, stops = self.accelerator.reduce(sums, "sum").tolist()
        if failures:
            where = failure or "on another process"
            raise TrainingStopped(f"the held-out answers could not be generated ({where})")
        return None if stops else correct / self.total

    def _count_correct(self, rows: Sequence[Prompt]) -> int:
        answers = answer(self.model, self.tokenizer, rows, self.max_new_tokens)
        return sum(self.is_match(row.expected or "", given) for row, given in zip(rows, answers, strict=True))


def answer(model: Any, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """What the model says after each prompt, greedily."""
    from qlora.generate import generate  # a run without samples or scores does without it

    return generate(model, tokenizer, [p.ids for p in prompts], max_new_tokens, batch_size=DECODED_TOGETHER)
