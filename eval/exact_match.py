"""python -m eval exact_match: generate answers to held-out prompts and compare them with the expected ones.

One greedy answer per prompt, or n samples with separate seeds. If c of n samples of a prompt are correct, the
probability that at least one of k drawn without replacement is correct is (Chen et al. 2021, arXiv 2107.03374)

    pass@k = 1 - C(n - c, k) / C(n, k)

and maj@n tells whether the most frequent answer is correct; on a tie the one that came first counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qlora.config.generate import Sampling, SamplingConfig
from qlora.config.parse import parse_args
from qlora.config.settings import Count, Positive
from qlora.data.answers import AnswerConfig, Matcher, make_matcher
from qlora.data.conversations import to_messages
from qlora.data.readers import read_records
from qlora.data.rows import Record
from qlora.system.errors import InputError
from qlora.system.wording import quote

from . import PROGRAM
from .model import EvalConfig, load_evaluated, require, share_out
from .results import check_output, print_scores, write_result
from .scores import Score, mean_score, proportion


@dataclass
class AskConfig(SamplingConfig):
    """How to prompt and how to generate answers."""

    samples: Positive = 1
    """Answers to sample per prompt; more than one needs --temperature above 0."""
    pass_at: str = ""
    """Values of k, separated by commas: how often at least one of k samples is correct."""
    prompt_template: str | None = None
    """Text of the user's turn, or a file with it; {prompt} marks the place of the record's prompt."""
    shots: Count = 0
    """Number of solved examples before each prompt, as earlier turns: the first of --few-shot-data."""
    few_shot_data: str | None = None
    """Solved examples, in any format accepted for training."""

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"All {self.samples} samples would be equal; give --temperature a number above 0.")
        if (self.shots > 0) != (self.few_shot_data is not None):
            raise InputError("--shots and --few-shot-data go together; pass both or neither.")
        _ = self.template  # raises if invalid
        for k in self.pass_numbers:
            if not 1 <= k <= self.samples:
                raise InputError(f"pass_at holds {k}; give --pass-at numbers from 1 to --samples, {self.samples}.")

    @property
    def pass_numbers(self) -> list[int]:
        """The numbers in --pass-at."""
        try:
            return [int(part) for part in self.pass_at.split(",")] if self.pass_at.strip() else []
        except ValueError as error:
            raise InputError(f"pass_at is {self.pass_at!r}; give --pass-at numbers, such as 1,5.") from error

    @property
    def template(self) -> str | None:
        """--prompt-template as text."""
        if self.prompt_template is None or "{prompt}" in self.prompt_template:
            return self.prompt_template
        try:
            text = Path(self.prompt_template).read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, ValueError) as error:
            raise InputError(
                f"prompt_template is {quote(self.prompt_template)}, neither a text that contains {{prompt}} nor a "
                "readable file."
            ) from error
        if "{prompt}" not in text:
            raise InputError(
                f"The template in {self.prompt_template} has no {{prompt}}; add it where the prompt belongs."
            )
        return text


@dataclass
class ExactMatchConfig(AskConfig, AnswerConfig, EvalConfig):
    """Generate answers to held-out prompts and compare them with the expected ones."""

    def __post_init__(self) -> None:
        for part in (AnswerConfig, AskConfig):
            part.__post_init__(self)


@dataclass
class Question:
    """A prompt with the turns before it, and the expected answer."""

    origin: str
    messages: list[dict[str, Any]]
    prompt: str
    expected: str


@dataclass
class Sample:
    """One answer, the value read from it (None = nothing), and whether it is correct."""

    answer: str
    extracted: str | None
    correct: bool


@dataclass
class Prediction:
    """One example: prompt, expected answer and samples; `answer` and `correct` are those of the first sample."""

    prompt: str
    expected: str
    answer: str
    correct: bool
    samples: list[Sample] = field(default_factory=list)

    @property
    def num_correct(self) -> int:
        return sum(sample.correct for sample in self.samples)

    def majority(self) -> bool:
        """Whether the most frequent answer is correct; samples without an answer do not count."""
        votes = Counter(sample.extracted for sample in self.samples if sample.extracted is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        return any(sample.correct for sample in self.samples if sample.extracted == winner)


def exact_match(
    model: Any,
    tokenizer: Any,
    records: Sequence[Record],
    match: str | Matcher = "text",
    max_new_tokens: int = 256,
    batch_size: int = 16,
) -> list[Prediction]:
    """Answer each record's last user turn greedily and compare with its last assistant turn.

    Args:
        match: how to compare, by name or from `make_matcher`.
    Raises:
        InputError: no records, or a record without an assistant turn or without an answer in it.
    """
    matcher = make_matcher(match) if isinstance(match, str) else match
    questions = make_questions(records, matcher)
    answers = ask(model, tokenizer, questions, sampling=Sampling(max_new_tokens), batch_size=batch_size)
    return grade_answers(questions, answers, matcher)


def make_questions(
    records: Sequence[Record], matcher: Matcher, template: str | None = None, shots: Sequence[Record] = ()
) -> list[Question]:
    """The prompts to answer: the turns of the `shots`, then a record's turns up to its last answer.

    Args:
        template: text of each last user turn, with {prompt} in it.
        shots: solved examples; their system messages are dropped.
    Raises:
        InputError: as for `exact_match`; or a prompt is also one of the shots.
    """
    if not records:
        raise InputError("Nothing to evaluate: the data has no records.")

    def read(record: Record) -> list[dict[str, Any]]:
        messages = to_messages(record)
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{record.origin} does not end with an assistant turn; exact match needs an answer.")
        return messages

    def put(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        asked = messages[-2]["content"]
        content = asked if template is None else template.replace("{prompt}", asked)
        return [*messages[:-2], messages[-2] | {"content": content}, messages[-1]]

    def said(messages: list[dict[str, Any]]) -> list[str]:
        return [turn["content"] for turn in messages if turn["role"] != "system"]

    solved = [read(shot) for shot in shots]
    earlier = [turn for messages in solved for turn in put(messages) if turn["role"] != "system"]
    given_away = [said(messages[:-1]) for messages in solved]
    questions = []
    for record in records:
        *before, last, answer = read(record)
        if said([*before, last]) in given_away:
            raise InputError(
                f"{record.origin} is also one of the shots; use other data for --few-shot-data than for --data."
            )
        if matcher.read_expected(answer["content"]) is None:
            raise InputError(
                f"{record.origin} expects {quote(answer['content'])}, in which this --match finds no answer; "
                "choose another (for regex, --pattern-on answer uses it unchanged), or fix the record."
            )
        system = before[:1] if before and before[0]["role"] == "system" else []
        turns = [*system, *earlier, *before[len(system) :], *put([last, answer])[:1]]
        questions.append(Question(record.origin, turns, last["content"], answer["content"]))
    return questions


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    num_samples: int = 1,
    sampling: Sampling | None = None,
    batch_size: int = 16,
    accelerator: Any = None,
) -> list[list[str]]:
    """`num_samples` answers to each question, in order; other arguments as for `generate_samples`.

    Args:
        accelerator: its processes share the work in whole batches, which are the same for any number of processes:
            a row's rounding may depend on the other rows.
    """
    from qlora.data.encode import encode_prompt
    from qlora.generation import generate_samples

    lengths = [len(encode_prompt(question.messages, tokenizer)) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: lengths[i])
    together = max(1, batch_size // num_samples)
    batches = [order[start : start + together] for start in range(0, len(order), together)]

    def compute(mine: list[list[int]]) -> list[list[list[str]]]:
        numbers = [i for batch in mine for i in batch]  # sorted by length, so that generate forms the same batches
        if not numbers:
            return []
        conversations = [questions[i].messages for i in numbers]
        options = (num_samples, sampling, batch_size, numbers)
        texts = iter(generate_samples(model, tokenizer, conversations, *options))
        return [[next(texts) for _ in batch] for batch in mine]

    costs = [sum(lengths[i] for i in batch) for batch in batches]
    found = compute(batches) if accelerator is None else share_out(accelerator, batches, compute, costs)
    answers: list[list[str]] = [[] for _ in questions]
    for batch, texts in zip(batches, found, strict=True):
        for index, samples in zip(batch, texts, strict=True):
            answers[index] = samples
    return answers


def grade_answers(
    questions: Sequence[Question], answers: Sequence[list[str]], matcher: Matcher
) -> list[Prediction]:
    """Compare each question's answers with the expected one."""
    found = []
    for question, texts in zip(questions, answers, strict=True):
        wanted = matcher.read_expected(question.expected)
        read = [matcher.read_answer(text) for text in texts]
        samples = [Sample(text, got, got == wanted) for text, got in zip(texts, read, strict=True)]
        found.append(Prediction(question.prompt, question.expected, texts[0], samples[0].correct, samples))
    return found


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k samples, drawn without replacement, is correct: unbiased for k new samples."""
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def summarize(
    questions: Sequence[Question], found: Sequence[Prediction], config: AskConfig, seed: int, confidence: float
) -> tuple[list[Score], list[dict[str, Any]], dict[str, Sequence[str]]]:
    """(scores, rows, pairing) for `write_result`."""
    rows = [{"id": q.origin, **asdict(p)} for q, p in zip(questions, found, strict=True)]
    n = config.samples
    if n == 1:
        for row in rows:
            row["extracted"] = row.pop("samples")[0]["extracted"]
        hits = [prediction.correct for prediction in found]
        return [proportion("exact match", hits, confidence)], rows, {"exact match": ("correct",)}
    scores: list[Score] = []
    pairing: dict[str, Sequence[str]] = {}
    named = {"exact match": 1} | {f"pass@{k}": k for k in config.pass_numbers}
    for name, k in named.items():
        values = [pass_at_k(n, prediction.num_correct, k) for prediction in found]
        scores.append(mean_score(name, values, seed=seed, confidence=confidence))
        for row, value in zip(rows, values, strict=True):
            row[name] = value
        pairing[name] = (name,)
    name = f"maj@{n}"
    votes = [prediction.majority() for prediction in found]
    for row, vote in zip(rows, votes, strict=True):
        row[name] = vote
    return [*scores, proportion(name, votes, confidence)], rows, {**pairing, name: (name,)}


def read_questions(config: ExactMatchConfig) -> list[Question]:
    """The prompts for a command's flags."""
    shots = read_records(config.few_shot_data)[: config.shots] if config.few_shot_data else []
    if len(shots) < config.shots:
        raise InputError(f"{config.few_shot_data} has {len(shots)} examples; give --shots at most {len(shots)}.")
    records = read_records(config.data or "")[: config.max_examples or None]
    return make_questions(records, config.matcher(), config.template, shots)


def measure(
    model: Any, tokenizer: Any, questions: Sequence[Question], config: ExactMatchConfig, accelerator: Any
) -> list[Prediction]:
    """Generate and compare the model's answers to all questions by a command's flags."""
    sampling = config.sampling(config.seed)
    answers = ask(model, tokenizer, questions, config.samples, sampling, config.batch_size, accelerator)
    return grade_answers(questions, answers, config.matcher())


def main(argv: Sequence[str]) -> None:
    config = parse_args(ExactMatchConfig, f"{PROGRAM} exact_match", argv)
    require(config, "model", "data")
    check_output(config.output)
    questions = read_questions(config)
    model, tokenizer, accelerator = load_evaluated(config)
    found = measure(model, tokenizer, questions, config, accelerator)
    if not accelerator.is_main_process:
        return
    scores, rows, pairing = summarize(questions, found, config, config.seed, config.confidence)
    correct, asked = sum(p.num_correct for p in found), len(found)
    counts = {"exact_match": scores[0].value, "correct": correct, "examples": asked, "samples": config.samples}
    predictions = [{key: asdict(p)[key] for key in ("prompt", "expected", "answer", "correct")} for p in found]
    write_result(
        config.output, "exact_match", scores, asdict(config), rows, pairing, **counts, predictions=predictions
    )
    print_scores(f"Exact match on {config.data}", scores)
    print(f"exact match {correct}/{asked * config.samples} = {scores[0].value:.1%}")
