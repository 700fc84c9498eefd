"""Long conversations and texts, templates that build without end: the same rows as the slow way, in less time."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

import qlora.data.texts as texts
import qlora.data.windows as windows
from qlora.data.chat_template import ChatTemplate
from qlora.data.conversations import to_messages
from qlora.data.encode import encode_records
from qlora.data.rendering import MAX_BUILT, compile_template
from qlora.data.row_encoder import RowEncoder
from qlora.data.rows import BadRow, Record
from qlora.data.texts import Texts
from tests.data.test_chat_template import HERMES, TOOLS, tokenizer_with
from tests.models import smollm2_path
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

# Earlier answers lose their thoughts, and the start of an answer opens one.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
NUMBERED = CHATML_TEMPLATE.replace(
    "'<|im_start|>'", "(loop.index if message.role == 'user' else '') ~ '<|im_start|>'"
)


def plain(num_answers: int) -> dict[str, Any]:
    turns = [
        {"role": role, "content": f"  {role} says {number}\n"}
        for number in range(num_answers)
        for role in ("user", "assistant")
    ]
    return {"messages": [{"role": "system", "content": "be brief"}, *turns]}


def agent(num_answers: int) -> dict[str, Any]:
    """One question, and then calls and their results."""
    turns: list[dict[str, Any]] = [{"role": "user", "content": "do it"}]
    for number in range(num_answers - 1):
        function = {"name": "weather", "arguments": {"city": f"c{number % 7}"}}
        said = "so" if number % 3 == 0 else ""
        turns.append({"role": "assistant", "content": said, "tool_calls": [{"function": function}]})
        turns.append({"role": "tool", "content": f"result {number}"})
    return {"messages": [*turns, {"role": "assistant", "content": "done"}], "tools": TOOLS}


CASES = [(CHATML_TEMPLATE, plain), (NUMBERED, plain), (THINKING, plain), (HERMES, plain), (HERMES, agent)]


@pytest.mark.parametrize(("template", "make"), CASES)
def test_a_long_conversation_is_encoded_as_by_rendering_every_beginning(
    template: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_answers in (33, 34, 49, 70):
        messages = to_messages(Record(make(num_answers), "a:1"))
        fast = RowEncoder(tokenizer_with(template)).encode_row(messages, "completion", "a:1")
        with monkeypatch.context() as patch:
            patch.setattr(windows, "LONG", 10**6)
            slow = RowEncoder(tokenizer_with(template)).encode_row(messages, "completion", "a:1")
        assert fast == slow and sum(fast[1]) > num_answers


@pytest.mark.parametrize(("template", "make", "is_windowed"), [(t, m, t != NUMBERED) for t, m in CASES])
def test_the_turns_rendered_grow_with_the_conversation(
    template: str, make: Any, is_windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A numbering template is rendered the slow way: its windows are not its text."""
    render, count = ChatTemplate._render, [0]

    def counted(self: Any, messages: Any, *others: Any) -> str:
        count[0] += len(messages)
        return render(self, messages, *others)

    monkeypatch.setattr(ChatTemplate, "_render", counted)
    needed = []
    for num_answers in (80, 160):
        count[0] = 0
        encode_records([Record(make(num_answers), "a:1")], tokenizer_with(template), 10**6)
        needed.append(count[0])
    assert (needed[1] < 2.2 * needed[0]) == is_windowed


def test_a_bad_turn_far_inside_is_named_as_in_a_short_conversation() -> None:
    record = plain(60)
    changed = HERMES.replace(
        "message.content + '<|im_end|>'", "message.content | replace('says 30', '') + '<|im_end|>'"
    )
    record["messages"][62]["content"] = "so says 30 of 60"
    with pytest.raises(BadRow, match="does not write the answer 'so says 30 of 60' unchanged"):
        encode_records([Record(record, "a:1")], tokenizer_with(changed), 10**6)


# ---- texts --------------------------------------------------------------------------------------------------


def random_text(rng: random.Random, length: int) -> str:
    pieces = [
        "the ",
        "quick",
        " \n\n",
        "é日本🙂",
        "1234567",
        "   ",
        "'s",
        "a" * 40,
        "<|im_end|>",
        "Ünï ",
        "\t",
        "_-_",
    ]
    kinds = [lambda: rng.choice(pieces), lambda: chr(rng.randrange(32, 700)), lambda: f"word{rng.randrange(999)} "]
    text = ""
    while len(text) < length:
        text += rng.choices(kinds, [4, 1, 6])[0]()
    return text[:length]


def test_pieces_give_the_ids_of_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model.tokenizer import load_tokenizer

    monkeypatch.setattr(texts, "PIECE", 3000)
    monkeypatch.setattr(texts, "OVERLAP", 800)
    monkeypatch.setattr(texts, "AGREED", 32)
    for tokenizer in (tiny_tokenizer(), load_tokenizer(str(smollm2_path()))):
        encoder, rng = Texts(tokenizer), random.Random(1)
        num_whole = 0
        for number in range(12):
            text = random_text(rng, 20_000) if number else "a" * 9_000 + " b" + " " * 9_000
            whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            assert encoder.ids([text]) == [whole]
            first = encoder.first_ids(text, 50)
            assert len(first) >= 50 and first == whole[: len(first)]
            num_whole += len(first) == len(whole)
        assert num_whole <= 2, "most texts end early"


def test_plain_text_of_special_tokens_leaves_the_tokenizer_as_it_was() -> None:
    """A call that splits special tokens sets a switch in the tokenizer behind the wrapper."""
    tokenizer = tiny_tokenizer()
    encoder = Texts(tokenizer)
    before = encoder.ids(["<|im_end|> a"])
    tokenizer("<|im_end|>", split_special_tokens=True)
    assert (
        encoder.ids(["<|im_end|> a"]) == before == [tokenizer("<|im_end|> a", add_special_tokens=False).input_ids]
    )


def test_a_long_document_ends_after_the_tokens_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(random.Random(2), texts.PIECE + texts.OVERLAP + 50_000)
    record = Record({"text": text}, "a:1")
    (cut,), report = encode_records([record], tiny_tokenizer(), 100)
    assert report.num_truncated == 1 and len(cut) == 100
    monkeypatch.setattr("qlora.data.row_encoder.PIECE", 10**9)
    (whole,), _ = encode_records([record], tiny_tokenizer(), 100)
    assert cut.input_ids.tolist() == whole.input_ids.tolist() and cut.targets.tolist() == whole.targets.tolist()
    (kept,), _ = encode_records([record], tiny_tokenizer(), 10**6)
    assert len(kept) > 100_000
    with pytest.raises(Exception, match="1 too long"):
        encode_records([record], tiny_tokenizer(), 100, on_long="drop")


# ---- templates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, HERMES, THINKING])
def test_a_compiled_template_writes_what_apply_chat_template_writes(template: str) -> None:
    tokenizer = tokenizer_with(template)
    render = compile_template(tokenizer, template)
    assert render is not None
    thought = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b", "reasoning_content": "x"}]
    calls = to_messages(Record(agent(3), "a:1"))[1:]
    for turns, tools in ((thought, None), (calls, TOOLS)):
        for opens in (False, True):
            expected = tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=opens, chat_template=template
            )
            assert render(turns, tools, opens) == expected


DOUBLING = (
    "{% set n = namespace(s='aaaaaaaa' * 10 ** 7) %}{% for i in range(60) %}{% set n.s = n.s OP n.s %}{% endfor %}"
    "{{ n.s }}"
)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (10 ** 10, 1) }}",
        DOUBLING.replace("OP", "~"),
        DOUBLING.replace("OP", "+"),
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 10 ** 8 %}{{ x }}{{ x }}",
    ],
)
def test_a_template_that_builds_without_end_is_refused_at_once(text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = text + CHATML_TEMPLATE
    start = time.process_time()
    with pytest.raises(BadRow, match=f"the chat template refuses it: .*more than {MAX_BUILT:,} characters"):
        encode_records([Record({"prompt": "a", "completion": "b"}, "a:1")], tokenizer, 100)
    assert time.process_time() - start < 10
