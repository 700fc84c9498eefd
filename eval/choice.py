"""python -m eval choice: which of several answers is most likely for the model?

Each choice continues the question's context and is scored by its log-likelihood ll(choice):

    acc         argmax of ll(choice) is the answer
    acc_norm    argmax of ll(choice) / characters of the choice
    acc_bytes   argmax of ll(choice) / UTF-8 bytes of the choice; all three as in lm-eval

File layouts, one question per row:

    MMLU        question, choices: [text, ...], answer: number or letter, optional subject
                a .csv without a header: question, A, B, C, D, letter; its name is the subject
    ARC         question, choices: {text: [...], label: [...]}, answerKey
    HellaSwag   ctx (or ctx_a, ctx_b), endings, label, optional activity_label

There are two prompt styles. "letters", as Hendrycks et al. and QLoRA measure MMLU: the context lists the choices,
and only their letters are scored,

    The following are multiple choice questions (with answers) about SUBJECT.

    QUESTION
    A. TEXT
    B. TEXT
    Answer: B

    QUESTION
    ...
    Answer:

"text": the context is "Question: QUESTION\\nAnswer:" (HellaSwag: the text to continue), and the texts of the
choices are scored. By default MMLU's layout uses letters, the others text. Shots are the first questions of
--few-shot-data, of the same subject if there are subjects, each followed by its answer and an empty line.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qlora.config.parse import parse_args
from qlora.config.settings import Count
from qlora.data.readers import read_records
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError
from qlora.system.wording import quote

from . import PROGRAM
from .model import EvalConfig, Window, load_evaluated, require, share_out
from .results import check_output, print_scores, write_result
from .scores import Score, mean_of_groups, proportion

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Style = Literal["letters", "text"]


@dataclass
class ChoiceConfig(EvalConfig):
    """Multiple choice by log-likelihood: MMLU, ARC, HellaSwag and files in their layouts."""

    few_shot_data: str | None = None
    """Solved questions for the start of the context, in any of the layouts."""
    shots: Count = 0
    """Number of solved questions; usually 5 for MMLU."""
    style: Literal["auto", "letters", "text"] = "auto"
    """Score the letters of choices listed in the context, or the texts; auto: letters for MMLU's layout."""
    max_length: Window = 2048
    """Maximum tokens of context and choice, at most the model's limit; a longer context loses its beginning."""

    def __post_init__(self) -> None:
        if bool(self.shots) != (self.few_shot_data is not None):
            raise InputError("Few-shot needs both: pass --few-shot-data FILE and --shots N, or neither.")


@dataclass
class ChoiceQuestion:
    """One question, with the index of its answer among the choices."""

    origin: str
    text: str
    choices: list[str]
    answer: int
    subject: str | None
    style: Style  # default style of its layout
    is_continued: bool = False  # a text to continue instead of a question


def read_choice_questions(source: str) -> list[ChoiceQuestion]:
    """Read every question of a file or hub id.

    Raises:
        InputError: unreadable, or a row without a known layout, choices or an answer.
    """
    bare = _read_bare_csv(source)
    return [to_question(record) for record in (read_records(source) if bare is None else bare)]


def _read_bare_csv(source: str) -> list[Record] | None:
    """MMLU's original files: six columns, the last one a letter, no header; None for anything else."""
    path = Path(source)
    if path.suffix.lower() != ".csv" or not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            first = next(csv.reader(file), [])
            if len(first) < 3 or first[-1] not in tuple(LETTERS):
                return None
            file.seek(0)
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{source} cannot be read as CSV ({error}); check the file.") from error
    subject = re.sub(r"_(test|dev|val)$", "", path.stem)
    records = []
    for number, row in enumerate(rows, 1):
        if len(row) != len(first):
            raise BadRow(
                f"{source}:{number}", f"{len(row)} columns, but the first row has {len(first)}; make them equal."
            )
        fields = {"question": row[0], "choices": row[1:-1], "answer": row[-1], "subject": subject}
        records.append(Record(fields, f"{source}:{number}"))
    return records


def to_question(record: Record) -> ChoiceQuestion:
    """Parse a record in one of the layouts of the module docstring.

    Raises:
        BadRow: unknown layout, fewer than two choices, or no answer among them.
    """
    fields, origin = record.fields, record.origin
    subject = fields.get("subject")
    if subject is not None and not isinstance(subject, str):
        raise BadRow(origin, f"the subject is {quote(subject)}; write a text.")
    if "endings" in fields:
        choices, labels = [_clean(text) for text in _texts(fields["endings"], "endings", origin)], None
        text, key, style = _hellaswag_context(fields, origin), fields.get("label"), "text"
    elif "question" in fields and isinstance(fields.get("choices"), dict):
        choices = _texts(fields["choices"].get("text"), "choices.text", origin)
        labels = _texts(fields["choices"].get("label"), "choices.label", origin)
        text, key, style = _text(fields["question"], "question", origin), fields.get("answerKey"), "text"
        if len(labels) != len(choices):
            raise BadRow(origin, f"{len(choices)} choices have {len(labels)} labels; give each its own.")
    elif "question" in fields and "choices" in fields:
        choices, labels = _texts(fields["choices"], "choices", origin), None
        text, key, style = _text(fields["question"], "question", origin).strip(), fields.get("answer"), "letters"
    else:
        columns = ", ".join(map(quote, fields)) or "none"
        raise BadRow(
            origin,
            f"no question with choices (columns: {columns}); give question, choices and answer as in MMLU or ARC, "
            "or ctx, endings and label as in HellaSwag.",
        )
    if not 2 <= len(choices) <= len(LETTERS):
        raise BadRow(origin, f"{len(choices)} choices; give 2 to {len(LETTERS)}.")
    answer = _find_answer(key, choices, labels, origin)
    continued = "endings" in fields
    return ChoiceQuestion(origin, text, choices, answer, subject, style, continued)  # type: ignore[arg-type]


def _text(value: Any, name: str, origin: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise BadRow(origin, f"{name} is {quote(value)}; write a text.")
    return value


def _texts(value: Any, name: str, origin: str) -> list[str]:
    if not isinstance(value, list):
        raise BadRow(origin, f"{name} is {quote(value)}; write a list of texts.")
    return [_text(item, f"an entry of {name}", origin) for item in value]


def _find_answer(key: Any, choices: list[str], labels: list[str] | None, origin: str) -> int:
    """Index of the answer, given as a label if there are labels, else as a number from 0, a letter or a text."""
    if isinstance(key, str):
        key = key.strip()
        if labels is not None and key in labels:
            return labels.index(key)
        if labels is None and re.fullmatch(r"\d{1,2}", key):
            key = int(key)
        elif labels is None and key in tuple(LETTERS[: len(choices)]):
            return LETTERS.index(key)
        elif key in choices:
            return choices.index(key)
    if labels is None and isinstance(key, int) and not isinstance(key, bool) and 0 <= key < len(choices):
        return key
    wanted = f"one of {', '.join(labels)}" if labels else f"a number from 0 to {len(choices) - 1}, or a letter"
    raise BadRow(origin, f"the answer is {quote(key)}; write {wanted}.")


def _clean(text: str) -> str:
    """Clean HellaSwag as lm-eval does: remove WikiHow's headings in brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag_context(fields: dict[str, Any], origin: str) -> str:
    if "ctx_a" in fields:
        second = fields.get("ctx_b") or ""
        text = f"{_text(fields['ctx_a'], 'ctx_a', origin)} {str(second).capitalize()}"
    else:
        text = _text(fields.get("ctx"), "ctx", origin)
    activity = fields.get("activity_label")
    return _clean(f"{activity}: {text}" if activity else text)


def build_context(
    question: ChoiceQuestion, shots: Sequence[ChoiceQuestion], style: Style
) -> tuple[str, list[str]]:
    """(text that the model reads, continuations to score)."""
    parts = []
    if style == "letters":
        about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
        parts.append(f"The following are multiple choice questions (with answers){about}.\n\n")
    parts += [f"{_ask(shot, style)}{_continuations(shot, style)[shot.answer]}\n\n" for shot in shots]
    return "".join(parts) + _ask(question, style), _continuations(question, style)


def _ask(question: ChoiceQuestion, style: Style) -> str:
    if style == "letters":
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, question.choices, strict=False))
        return f"{question.text}{listed}\nAnswer:"
    return question.text if question.is_continued else f"Question: {question.text}\nAnswer:"


def _continuations(question: ChoiceQuestion, style: Style) -> list[str]:
    return [f" {text}" for text in (LETTERS[: len(question.choices)] if style == "letters" else question.choices)]


def choose_shots(question: ChoiceQuestion, solved: Sequence[ChoiceQuestion], count: int) -> list[ChoiceQuestion]:
    """The first `count` solved questions of the same subject, without the question itself.

    Raises:
        InputError: there are too few.
    """
    same = [s for s in solved if s.subject == question.subject or s.subject is None or question.subject is None]
    shots = [s for s in same if s.text != question.text or s.choices != question.choices][:count]
    if len(shots) < count:
        about = f" about {quote(question.subject)}" if question.subject else ""
        raise InputError(f"--few-shot-data has {len(shots)} questions{about}, fewer than --shots {count}.")
    return shots


def score_choices(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, list[str]]],
    max_length: int,
    budget: int,
    is_shown: bool = False,
) -> list[tuple[list[float], bool]]:
    """Log-likelihoods of every question's continuations in nats, and whether its context was truncated.

    Each context is computed only once.

    Args:
        asked: (context, continuations) of each question.
        max_length, budget, is_shown: as for `log_likelihoods`.
    """
    from .likelihood import encode_pairs, log_likelihoods

    requests = [encode_pairs(context, texts, tokenizer) for context, texts in asked]
    found = log_likelihoods(model, requests, max_length, budget, is_shown)
    is_cut = [len(context) + max(map(len, texts)) > max_length + 1 for context, texts in requests]
    return [([log_p for log_p, _ in row], cut) for row, cut in zip(found, is_cut, strict=True)]


def grade(question: ChoiceQuestion, log_likelihoods: Sequence[float], style: Style) -> dict[str, Any]:
    """One row of the result: whether the most likely choice is the answer, by each measure."""
    lengths = {"acc": [1] * len(question.choices)}
    if style == "text":
        lengths["acc_norm"] = [len(text) for text in question.choices]
        lengths["acc_bytes"] = [len(text.encode("utf-8")) for text in question.choices]
    row: dict[str, Any] = {"id": question.origin}
    if question.subject:
        row["subject"] = question.subject
    chosen = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
    row |= {
        "prompt": question.text,
        "expected": question.choices[question.answer],
        "chosen": question.choices[chosen],
    }
    row |= {"answer": question.answer, "log_likelihoods": list(log_likelihoods)}
    for name, counts in lengths.items():
        values = [value / count for value, count in zip(log_likelihoods, counts, strict=True)]
        row[name] = max(range(len(values)), key=values.__getitem__) == question.answer  # the first of equal values
    return row


def choice_scores(rows: Sequence[dict[str, Any]], seed: int = 0, confidence: float = 0.95) -> list[Score]:
    """Overall scores, and per subject if there are several."""
    names = [name for name in ("acc", "acc_norm", "acc_bytes") if all(name in row for row in rows)]
    scores = [proportion(name, [row[name] for row in rows], confidence) for name in names]
    subjects = sorted({row.get("subject", "") for row in rows})
    if len(subjects) > 1:
        groups = {
            subject: [row["acc"] for row in rows if row.get("subject", "") == subject] for subject in subjects
        }
        scores.append(mean_of_groups("acc, mean of subjects", list(groups.values()), seed, confidence))
        scores += [
            proportion(f"acc, {subject or 'no subject'}", hits, confidence) for subject, hits in groups.items()
        ]
    return scores


def main(argv: Sequence[str]) -> None:
    config = parse_args(ChoiceConfig, f"{PROGRAM} choice", argv)
    require(config, "model", "data")
    check_output(config.output)
    questions = read_choice_questions(config.data or "")[: config.max_examples or None]
    solved = read_choice_questions(config.few_shot_data) if config.few_shot_data is not None else []
    styles: list[Style] = [q.style if config.style == "auto" else config.style for q in questions]
    asked = [
        build_context(question, choose_shots(question, solved, config.shots), style)
        for question, style in zip(questions, styles, strict=True)
    ]
    model, tokenizer, accelerator = load_evaluated(config)
    from .likelihood import longest_window

    max_length = longest_window(model, config.max_length)

    def compute(mine: list[tuple[str, list[str]]]) -> list[tuple[list[float], bool]]:
        budget, is_shown = config.batch_size * max_length, accelerator.is_main_process
        return score_choices(model, tokenizer, mine, max_length, budget, is_shown)

    found = share_out(accelerator, asked, compute, [len(context) for context, _ in asked])
    if not accelerator.is_main_process:
        return
    rows = [grade(q, nats, style) for q, (nats, _), style in zip(questions, found, styles, strict=True)]
    scores = choice_scores(rows, config.seed, config.confidence)
    pairing = {name: (name,) for name in ("acc", "acc_norm", "acc_bytes") if all(name in row for row in rows)}
    settings = {**asdict(config), "max_length": max_length}
    write_result(config.output, "choice", scores, settings, rows, pairing)
    shots = f", {config.shots} shots" if config.shots else ""
    print_scores(f"Multiple choice on {config.data}{shots}", scores)
    num_cut = sum(is_cut for _, is_cut in found)
    if num_cut:
        print(f"{num_cut} of {len(found)} contexts were longer than {max_length} tokens; their beginning was cut")
