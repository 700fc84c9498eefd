"""Samples and scores between steps: what is asked, no trace in training, failures, several processes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora.config.generate import Sampling
from qlora.data.conversations import to_messages
from qlora.data.prompts import Prompt, choose_prompts, prompt_of
from qlora.data.rows import Record
from qlora.generation import generate
from qlora.lora.state import lora_state_dict
from qlora.system.errors import InputError, TrainingStopped
from qlora.training import samples as sampling
from qlora.training.samples import AnswerScore, Sampler
from tests.models import save_tiny_llama
from tests.shortcuts import encode_example
from tests.tiny import tiny_tokenizer
from tests.training.test_loop import adapted, losses, make_examples, run

TOKENIZER = tiny_tokenizer()
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "It is 2."},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def encode(fields: dict[str, Any], train_on: str = "completion") -> Any:
    return encode_example(to_messages(Record(fields, "x")), TOKENIZER, 512, train_on)


# ---- what is asked ----------------------------------------------------------------------------------------


def test_a_row_is_asked_for_its_last_answer() -> None:
    """The prompt's ids are those that generation would make of the conversation without that answer."""
    prompt = prompt_of(encode({"messages": TURNS}), TOKENIZER)
    from qlora.data.encode import encode_prompt

    assert prompt.ids == encode_prompt(TURNS[:-1], TOKENIZER)
    assert prompt.expected == "It is 2."
    assert prompt.text == "user\nOne?\nassistant\n1\nuser\nTwo?\nassistant\n"


@pytest.mark.parametrize("fields", [{"text": "abcdefgh"}, {"messages": TURNS}])
def test_of_a_row_that_is_all_targets_the_rest_is_expected(fields: dict[str, Any]) -> None:
    example = encode(fields, "all")
    prompt = prompt_of(example, TOKENIZER)
    whole = [*example.input_ids.tolist(), int(example.targets[-1])]
    assert whole[: len(prompt.ids)] == prompt.ids and 1 < len(prompt.ids) < len(whole) - 1
    rest = TOKENIZER.decode(whole[len(prompt.ids) :], skip_special_tokens=True)
    assert prompt.expected == rest.strip() != ""


def test_the_prompts_are_the_first_ones(tmp_path: Path) -> None:
    examples = [encode({"prompt": f"{n}?", "completion": f"{n}!"}) for n in range(5)]
    assert [p.expected for p in choose_prompts(examples, TOKENIZER, 3)] == ["0!", "1!", "2!"]
    assert len(choose_prompts(examples, TOKENIZER, 9)) == 5 and choose_prompts(examples, TOKENIZER, 0) == []


def test_prompts_of_a_file_need_no_answer(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "Hi", "completion": " Hello "}, {"prompt": "Hi"}, {"messages": TURNS[:3]}, {"messages": TURNS},
        {"text": "Once"}, {"prompt": "not read"},
    ]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = choose_prompts([], TOKENIZER, 5, str(file))
    assert [p.expected for p in found] == ["Hello", None, None, "It is 2.", None]
    assert found[0].ids == found[1].ids and found[2].ids == found[3].ids
    assert found[1].text == "user\nHi\nassistant\n" and found[4].text == "Once"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": 3}', "p.jsonl:1: prompt is 3"),
        ('{"colour": "red"}', "p.jsonl:1"),
        ('{"prompt": ', "p.jsonl:1"),
        (None, "does not exist"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_text(content + "\n")
    with pytest.raises(InputError, match=message):
        choose_prompts([], TOKENIZER, 3, str(file))


# ---- between steps ----------------------------------------------------------------------------------------


def sampler(model: Any, write: Any, warn: Any = print) -> Sampler:
    prompts = [Prompt([5, 6, 7], "one", "1"), Prompt([9], "two")]
    return Sampler(model, TOKENIZER, prompts, 8, Accelerator(), write, warn)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_sampling_and_scoring_leave_training_as_it_was(tiny: str, compute: str) -> None:
    """Losses and adapter, with dropout, equal to the last digit; and the samples change as the model learns."""
    examples, held_out, written = make_examples(), make_examples(5, seed=9), []
    plain_model, model = (adapted(tiny, dropout=0.1, compute=compute) for _ in range(2))
    plain = run(plain_model, examples, 6)
    score = AnswerScore(model, TOKENIZER, [Prompt([7, 8], "", "x")], lambda a, b: True, 3, Accelerator())
    lines = run(
        model, examples, 6, sample=sampler(model, written.append), sample_every=2, score=score, eval_every=3,
        eval_examples=held_out,
    )  # fmt: skip
    assert losses(lines) == losses(plain) and len(losses(plain)) == 6
    assert all(torch.equal(t, lora_state_dict(model)[k]) for k, t in lora_state_dict(plain_model).items())
    assert [group[0]["step"] for group in written] == [0, 2, 4, 6]
    assert [(s["prompt"], s["expected"]) for s in written[0]] == [("one", "1"), ("two", None)]
    assert [s["completion"] for s in written[0]] != [s["completion"] for s in written[-1]]
    assert [line["exact_match"] for line in lines if "eval_loss" in line] == [1.0, 1.0, 1.0]
    assert model.training


def test_a_sample_is_the_greedy_answer(tiny: str) -> None:
    model, written = adapted(tiny), []
    sampler(model, written.append)(3)
    expected = []
    for ids in ([5, 6, 7], [9]):  # the slow reference: the whole sequence again for every token
        new = list(ids)
        with torch.no_grad():
            while len(new) < len(ids) + 8 and new[-1] != 2:
                new.append(int(model.eval()(torch.tensor([new])).logits[0, -1].argmax()))
        expected.append(TOKENIZER.decode(new[len(ids) :], skip_special_tokens=True).strip())
    assert [s["completion"] for s in written[0]] == expected


@pytest.mark.parametrize("error", [RuntimeError("no luck"), MemoryError(), OSError(28, "No space left")])
def test_a_failure_is_a_warning(tiny: str, error: Exception) -> None:
    said: list[str] = []

    def fail(samples: Any) -> None:
        raise error

    model = adapted(tiny)
    lines = run(model, make_examples(), 3, sample=sampler(model, fail, said.append), sample_every=2)
    assert losses(lines) == losses(run(adapted(tiny), make_examples(), 3))
    assert len(said) == 2 and said[0].startswith(f"no samples at step 2 ({type(error).__name__}")
    assert said[0].endswith("training goes on")


def test_only_the_main_process_samples_and_all_wait() -> None:
    """Also where it fails: a barrier that one process skips would never open."""
    waited: list[bool] = []

    def refuse(samples: Any) -> None:
        raise AssertionError("written by another process")

    for is_main in (True, False):
        process: Any = SimpleNamespace(
            is_main_process=is_main, device=torch.device("cpu"), wait_for_everyone=lambda: waited.append(True)
        )
        said: list[str] = []
        Sampler(None, TOKENIZER, [Prompt([5], "")], 4, process, refuse, said.append)(1)
        assert len(said) == is_main  # a model that is None cannot answer
    assert waited == [True, True]


# ---- scores -----------------------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The stand-in for a model answers each prompt with its first id; records how many were asked together."""
    sizes: list[int] = []

    def answer(model: Any, tokenizer: Any, prompts: Any, max_new_tokens: int) -> list[str]:
        sizes.append(len(prompts))
        return [str(prompt.ids[0]) for prompt in prompts]

    monkeypatch.setattr(sampling, "answer", answer)
    return sizes


def scored(process_index: int = 0, reduced: Any = None, count: int = 21) -> AnswerScore:
    """Of `count` prompts, every third is answered as expected; in two processes where `reduced` is given."""
    prompts = [Prompt([n], "", str(n) if n % 3 == 0 else "no") for n in range(count)]
    process: Any = SimpleNamespace(
        process_index=process_index, num_processes=1 if reduced is None else 2, device=torch.device("cpu"),
        reduce=reduced or (lambda tensor, kind: tensor),
    )  # fmt: skip
    return AnswerScore(None, None, prompts, lambda expected, given: expected == given, 8, process)


def test_the_score_is_the_share_of_right_answers(answers: list[int]) -> None:
    assert scored()() == 7 / 21
    assert answers == [16, 5]


def test_processes_share_the_prompts_and_agree(answers: list[int]) -> None:
    sums: list[torch.Tensor] = []
    for index in (0, 1):
        scored(index, lambda tensor, kind: sums.append(tensor) or tensor)()
    total = sums[0] + sums[1]
    assert total.tolist() == [7, 0, 0] and sums[0][0] > 0 and sums[1][0] > 0
    assert scored(0, lambda tensor, kind: total)() == scored(1, lambda tensor, kind: total)() == 7 / 21


def test_a_request_to_stop_leaves_the_score_open_on_every_process(answers: list[int]) -> None:
    asked: list[int] = []
    assert scored()(lambda: asked.append(1) or "SIGTERM") is None  # type: ignore[func-returns-value]
    assert len(asked) == 1 and answers == [16]
    assert scored(0, lambda tensor, kind: torch.tensor([3, 0, 1]))() is None


def test_answers_that_do_not_fit_are_asked_for_in_smaller_groups(
    monkeypatch: pytest.MonkeyPatch, answers: list[int]
) -> None:
    fits, plain = 5, sampling.answer  # the stand-in

    def answer(model: Any, tokenizer: Any, prompts: Any, max_new_tokens: int) -> list[str]:
        if len(prompts) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(model, tokenizer, prompts, max_new_tokens)

    monkeypatch.setattr(sampling, "answer", answer)
    assert scored()() == 7 / 21 and answers == [4] * 5 + [1]
    fits = 0
    with pytest.raises(TrainingStopped, match=r"could not be generated \(CUDA out of memory"):
        scored()()
    fits = 99
    with pytest.raises(TrainingStopped, match=r"could not be generated \(on another process"):
        scored(0, lambda tensor, kind: torch.tensor([3, 1, 0]))()


def test_prompts_as_ids_answer_as_conversations_do(tiny: str) -> None:
    model = adapted(tiny)
    example = encode({"messages": TURNS})
    asked: list[Any] = [TURNS[:-1], prompt_of(example, TOKENIZER).ids]
    one, other = generate(model, TOKENIZER, asked, Sampling(6))
    assert one == other != ""
