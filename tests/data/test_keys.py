"""Every column and key of other tools' rows: used, known, refused or named, and what is trained then."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from qlora.cli.show_check import print_check
from qlora.data.chat_template import Messages, today
from qlora.data.check import check_data
from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.encode import encode_prompt, encode_records
from qlora.data.example import IGNORE_INDEX, EncodeReport, Example
from qlora.data.keys import COLUMNS, EMPTY, NOT_PRINTED, PART_KEYS, TURNS, describe_notes
from qlora.data.python_rows import PythonRows
from qlora.data.readers import read_records
from qlora.data.row_encoder import SPELLED_OUT, end_of_turn_id
from qlora.data.rows import MIXED, WHOLE, BadRow, Record
from qlora.report.page import describe_origin
from qlora.report.run import Run
from tests.data.test_chat_template import HERMES
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

LONG = 100_000
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
PAIR = [USER, ANSWER]

# As Qwen 3: the thought of answers after the last question, an empty one for the last answer; content is cut at
# the closing tag.
QWEN3 = r"""{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set content = m.content %}
{%- if '</think>' in content and not thought %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
# As its Thinking variant: the start of an answer opens the thought.
QWEN3_THINKING = QWEN3.removesuffix("\\n' }}{% endif %}") + "\\n<think>\\n' }}{% endif %}"
# As DeepSeek-R1: the same, and of a thought nothing is printed.
DEEPSEEK_R1 = r"""{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>' + m.content.split('</think>')[-1].lstrip() + '<|im_end|>' }}
{%- else %}{{- '<|im_start|>' + m.role + ':' + m.content }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|><think>\n' }}{% endif %}"""


def tokenizer_of(template: str = CHATML_TEMPLATE) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def encode(
    fields: dict[str, Any], template: str = CHATML_TEMPLATE, **options: Any
) -> tuple[Example, EncodeReport]:
    examples, report = encode_records([Record(fields, "a:1")], tokenizer_of(template), LONG, **options)
    return examples[0], report


def text_of(example: Example, trained: bool = False) -> str:
    ids = [*example.input_ids.tolist()[:1], *example.targets.tolist()]
    if not trained:
        ids = [*example.input_ids.tolist(), example.targets[-1].item()]
    return str(tiny_tokenizer().decode([token for token in ids[trained:] if token != IGNORE_INDEX]))


def chatml(*turns: tuple[str, str]) -> str:
    return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)


def shown(fields: dict[str, Any], template: str = CHATML_TEMPLATE) -> str:
    """The text of a row up to its last target."""
    example, _ = encode(fields, template)
    whole = text_of(example)
    return whole[: whole.rindex("<|im_end|>") + len("<|im_end|>")]


# ---- thoughts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "thought"])
@pytest.mark.parametrize("reads", ["reasoning_content", "thinking"])
def test_a_thought_is_trained_under_any_name(key: str, reads: str) -> None:
    """A template that prints thoughts trained the empty block."""
    template = QWEN3.replace("reasoning_content", reads)
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER | {key: "Why?"}]},
        {"prompt": [USER], "completion": [ANSWER | {key: "Why?"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", key: "Why?"}]},
    ]
    for row in rows:
        example, report = encode(row, template)
        assert text_of(example, trained=True) == "<think>\nWhy?\n</think>\n\nHello<|im_end|>"
        assert not report.notes


def test_a_thought_that_is_not_printed_is_named() -> None:
    thoughtful = [USER, ANSWER | {"reasoning": "Why?"}]
    example, report = encode({"messages": [*thoughtful, *PAIR, *thoughtful]}, QWEN3)
    assert report.notes == {NOT_PRINTED: {"thoughts of earlier answers": 1}} and "Why?" in text_of(example)
    assert encode({"messages": thoughtful})[1].notes == {NOT_PRINTED: {"thoughts": 1}}
    named = [USER | {"name": "Ann"}, ANSWER | {"reasoning": ""}]
    assert encode({"messages": named})[1].notes == {NOT_PRINTED: {"name": 1}}
    prints_names = CHATML_TEMPLATE.replace("message['role'] +", "message['role'] + message.name | d('') +")
    assert not encode({"messages": named}, prints_names)[1].notes


@pytest.mark.parametrize("thought", ["", "Why?\nBecause."])
@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("template", [QWEN3_THINKING, DEEPSEEK_R1])
def test_templates_that_open_a_thought(template: str, inline: bool, thought: str) -> None:
    """Such a base could neither train nor answer: "split the record so that it has one answer"."""
    tokenizer = tokenizer_of(template)
    answer = ANSWER | ({"content": f"<think>\n{thought}\n</think>\n\nHello"} if inline else {"thought": thought})
    example, report = encode({"messages": [USER, answer]}, template)
    assert text_of(example, trained=True) == f"{thought}\n</think>\n\nHello<|im_end|>" and not report.notes
    prompt = encode_prompt([USER], tokenizer)
    assert tokenizer.decode(prompt).endswith("<think>\n")
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert example.targets[len(prompt) - 1] != IGNORE_INDEX == example.targets[len(prompt) - 2]
    assert end_of_turn_id(tokenizer) == tokenizer.eos_token_id


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_each_named_template_is_judged_by_itself(key: str) -> None:
    """A template for tools that opens thoughts, or calls them otherwise, was judged by the default one."""
    tool_use = "{% for tool in tools %}{{ tool | tojson }}{% endfor %}" + QWEN3_THINKING
    tokenizer = tokenizer_of()
    tokenizer.chat_template = {"default": QWEN3, "tool_use": tool_use.replace("reasoning_content", key)}
    row = {"messages": [USER, ANSWER | {"thought": "Why?"}]}
    expected = {"default": "<think>\nWhy?", "tool_use": "Why?"}
    for name, fields in (("default", row), ("tool_use", row | {"tools": TOOLS})):
        (example,), report = encode_records([Record(fields, "a:1")], tokenizer, LONG)
        assert text_of(example, trained=True) == f"{expected[name]}\n</think>\n\nHello<|im_end|>"
        assert not report.notes


@pytest.mark.parametrize("template", [QWEN3_THINKING, DEEPSEEK_R1])
def test_earlier_answers_of_templates_that_open_a_thought(template: str) -> None:
    """They stand as the template shows them to a later prompt, without thoughts."""
    first, last = ANSWER | {"thinking": "one"}, {"role": "assistant", "content": "Bye", "thinking": "two"}
    example, report = encode({"messages": [USER, first, USER, last]}, template)
    assert text_of(example, trained=True) == "Hello<|im_end|>two\n</think>\n\nBye<|im_end|>"
    assert report.notes == {NOT_PRINTED: {"thoughts of earlier answers": 1}}
    prompt = encode_prompt([USER, first, USER], tokenizer_of(template))
    assert example.input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize(
    "answers", [["<think>\na\n</think>\n\nb", "<think>\nc\n</think>\n\nd"], ["It ends with </think>, I think."]]
)
def test_a_template_that_strips_an_answer_is_told_so(answers: list[str]) -> None:
    turns = [turn for answer in answers for turn in (USER, {"role": "assistant", "content": answer})]
    with pytest.raises(BadRow, match=r"does not write the answer '.*' unchanged: it strips or moves a part of it"):
        encode({"messages": turns}, QWEN3)


# ---- system texts and history -----------------------------------------------------------------------------------

CONVERSATION = chatml(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize("name", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "", "input": "Hi", "output": "Hello"},
        {"instruction": "Hi", "response": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "Hi", "answer": "Hello"},
        {"question": "Hi", "response": "Hello"},
        {"messages": [{"role": "system", "content": "Be brief."}, *PAIR]},
    ],
)
def test_a_system_column_is_the_system_turn(fields: dict[str, Any], name: str) -> None:
    assert shown(fields | {name: "Be brief."}) == CONVERSATION
    assert not encode(fields | {name: "Be brief."})[1].notes


def test_a_template_without_system_text_is_told_so() -> None:
    """It was dropped without a word."""
    drops = CHATML_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}", 1)
    row, report = encode({"system": "Be brief.", "prompt": "Hi", "completion": "Hello"}, drops)
    assert report.notes == {NOT_PRINTED: {"system text": 1}}
    assert row.input_ids.tolist() == encode({"messages": PAIR}, drops)[0].input_ids.tolist()
    assert not encode({"system": "Be brief.", "messages": PAIR})[1].notes


def test_two_system_texts_that_differ() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *PAIR]
    with pytest.raises(BadRow, match="the system column and the first message disagree"):
        encode({"messages": turns, "system": "Be long."})
    two: Messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]
    with pytest.raises(BadRow, match="message 2, 'b', is from the system, not the user"):  # there is no column
        encode({"messages": [*two, *PAIR]})
    with pytest.raises(BadRow, match="the row has system and system_prompt, which disagree"):
        encode({"messages": PAIR, "system": "a", "system_prompt": "b"})


def test_history_is_trained_as_earlier_turns() -> None:
    fields = {"instruction": "Hi", "output": "Hello", "system": "S", "history": [["a", "b"], ["c", "d"]]}
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert shown(fields) == chatml(*turns, ("user", "Hi"), ("assistant", "Hello"))
    assert text_of(encode(fields)[0], trained=True) == "b<|im_end|>d<|im_end|>Hello<|im_end|>"
    assert text_of(encode(fields, train_on="last")[0], trained=True) == "Hello<|im_end|>"
    assert not encode(fields | {"history": []})[1].notes
    for bad in ("x", [["a"]], [["a", 1]]):
        with pytest.raises(BadRow, match="history"):
            encode(fields | {"history": bad})


# ---- calls and parts --------------------------------------------------------------------------------------------

TOOLS = [{"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def calling(turn: dict[str, Any], result: dict[str, Any] | None = None) -> Messages:
    return [USER, turn, result or {"role": "tool", "content": "2"}, ANSWER]


@pytest.mark.parametrize(
    "turns",
    [
        *(calling({"role": "assistant", "tool_calls": [{"name": "add", key: {"x": 1}}]}) for key in
          ("arguments", "parameters", "args", "input")),
        calling({"role": "assistant", "tool_calls": [{"function": {"name": "add", "parameters": '{"x": 1}'}}]}),
        calling({"role": "assistant", "tool_calls": json.dumps([CALL])}),
        calling({"role": "assistant", "function_call": CALL["function"], "content": None}),
        calling({"role": "assistant", "content": [{"type": "tool_use", "name": "add", "input": {"x": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "2"}]}),
        calling({"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"}),
    ],
)  # fmt: skip
def test_calls_by_other_names(turns: Messages) -> None:
    expected = shown({"messages": calling({"role": "assistant", "tool_calls": [CALL]}), "tools": TOOLS}, HERMES)
    assert '{"name": "add", "arguments": {"x": 1}}' in expected and "<tool_response>\n2\n" in expected
    for column in ("messages", "conversations"):
        assert shown({column: turns, "tools": json.dumps(TOOLS)}, HERMES) == expected
        assert not encode({column: turns, "tools": TOOLS}, HERMES)[1].notes


def test_keys_of_tools_that_are_not_printed_are_named() -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "D", "strict": True}, "cache": 1}
    fields = {"messages": PAIR, "tools": [tool]}
    assert not encode(fields, HERMES)[1].notes
    brief = HERMES.replace("tool | tojson", "tool.function.name + tool.function.description")
    assert encode(fields, brief)[1].notes == {NOT_PRINTED: {"cache of tools": 1, "strict of tools": 1}}


def test_text_parts_are_text_and_others_are_refused_by_their_type() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i", "cache_control": {"type": "ephemeral"}}]
    thinking = [{"type": "thinking", "thinking": "Why?"}, {"type": "text", "text": "Hello"}]
    fields = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": thinking}]}
    example, report = encode(fields, QWEN3)
    assert text_of(example, trained=True) == "<think>\nWhy?\n</think>\n\nHello<|im_end|>"
    assert "user\nHi<|im_end|>" in text_of(example) and report.notes == {PART_KEYS: {"cache_control": 1}}
    for kind in ("image", "image_url", "audio", "input_audio", "video", "file"):
        with pytest.raises(BadRow, match=f"holds a part of the type '{kind}'"):
            encode({"messages": [{"role": "user", "content": [{"type": kind, kind: "x"}]}, ANSWER]})


@pytest.mark.parametrize(
    "fields",
    [
        {"system": [{"text": "Be brief."}], "messages": [  # Bedrock's converse
            {"role": "user", "content": [{"text": "Hi"}]}, {"role": "assistant", "content": [{"text": "Hello"}]}]},
        {"systemInstruction": {"role": "system", "parts": [{"text": "Be brief."}]}, "contents": [  # Gemini
            {"role": "user", "parts": [{"text": "Hi"}]}, {"role": "model", "parts": [{"text": "Hello"}]}]},
        {"system": [{"type": "text", "text": "Be brief."}], "messages": PAIR},  # Anthropic
        {"messages": [{"role": "System", "content": "Be brief."}, {"role": "User", "content": "Hi"},  # Cohere
                      {"role": "Chatbot", "content": "Hello"}]},
        {"system": "Be brief.", "conversations": [  # NeMo
            {"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Hello"}]},
        {"messages": [{"role": "developer", "content": "Be brief."}, *PAIR]},  # OpenAI
    ],
)  # fmt: skip
def test_rows_of_hosted_services(fields: dict[str, Any]) -> None:
    assert shown(fields) == CONVERSATION and not encode(fields)[1].notes


def test_functions_are_tools() -> None:
    """OpenAI's older name was named as not used, and the calls trained without their functions."""
    turns = calling({"role": "assistant", "content": None, "function_call": CALL["function"]})
    fields = {"messages": turns, "functions": [TOOLS[0] | {"description": "D"}]}
    assert '"description": "D"' in shown(fields, HERMES) and not encode(fields, HERMES)[1].notes
    with pytest.raises(BadRow, match="the row has tools and functions, which disagree"):
        encode(fields | {"tools": TOOLS}, HERMES)


# ---- Arrow ------------------------------------------------------------------------------------------------------


def test_equal_ids_from_jsonl_parquet_and_datasets(tmp_path: Path) -> None:
    """Arrow gives every call the arguments of all calls, null where it has none; these were trained."""
    calls: list[Any] = [
        {"x": 1, "y": 2},
        {"text": "é", "deep": {"a": [1]}},
        {"deep": {"c": [{"d": 1}, {"e": "f"}]}},
    ]
    rows: list[dict[str, Any]] = [
        {
            "messages": calling({"role": "assistant", "tool_calls": [{"name": f"f{n}", "arguments": arguments}]}),
            "tools": [{"name": f"f{n}", "parameters": {"type": "object", "properties": {key: {"type": "x"}}}}
                      for key in arguments],
        }
        for n, arguments in enumerate(calls)
    ]  # fmt: skip
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    dataset = Dataset.from_list(rows)
    frame = PythonRows("data", pyarrow.Table.from_pylist(rows).to_pandas(integer_object_nulls=True))
    encoded = []
    for source in (str(lines), str(table), PythonRows("data", dataset), PythonRows("data", rows), frame):
        examples, report = encode_records(read_records(source), tokenizer_of(HERMES), LONG)
        encoded.append([(row.input_ids.tolist(), row.targets.tolist()) for row in examples])
        assert not report.notes and len(examples) == 3
    assert encoded[1:] == encoded[:1] * 4
    assert "null" in str(pyarrow.parquet.read_table(table).to_pylist()).replace("None", "null")


# ---- columns and keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": PAIR, "images": ["a.png"]}, "the column 'images' is not text"),
        (
            {"messages": [USER | {"images": ["a"]}, ANSWER]},
            "1 of messages has 'images', which is not text",
        ),
        ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "the column 'rejected' belongs to a preference pair"),
        ({"conversations": PAIR, "chosen": "A", "rejected": "B"}, "the column 'chosen' belongs to a preference"),
        (
            {"prompt": "Q", "completion": "A", "label": False},
            "'label' says whether the answer is wanted",
        ),
        ({"input_ids": [1, 2], "seq_lengths": [1, 1]}, "'seq_lengths' marks several examples packed into one row"),
        ({"input_ids": [1, 2], "position_ids": [0, 0]}, "'position_ids' marks several examples"),
        ({"messages": PAIR, "chat_template_kwargs": {"enable_thinking": False}}, "would change the chat template"),
        ({"messages": [USER, ANSWER | {"train_detail": [{}]}]}, "has 'train_detail', which selects parts of an"),
        (
            {"Question": "Q", "Answer": "A"},
            "pass --columns prompt=Question,completion=Answer, or rename",
        ),
        ({"inputs": "Q", "targets": "A"}, "pass --columns prompt=inputs,completion=targets, or"),
        ({"id": 1, "conversation": PAIR}, "pass --columns messages=conversation, or rename"),
        ({"chat_history": PAIR, "message": "Q", "response": "A"}, "or name yours with --columns"),
        ({"messages": [{"author": "u", "content": "Hi"}]}, "has the role null (it has 'author', 'content'); use"),
        ({"conversations": [{"from": "human", "text": "Hi"}]}, "has no content, but 'text'; rename its text"),
        ({"chosen": "A", "rejected": "B"}, "pass --columns text=chosen to train on the chosen ones"),
        ({"chosen": PAIR, "rejected": PAIR}, "pass --columns messages=chosen to train on the chosen ones"),
        (
            {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]},
            "--columns prompt=prompt,completion=chosen to",
        ),
        ({"messages": PAIR, "chosen": PAIR}, "pass --columns messages=messages to train on that column"),
        ({"messages": [{"role": "user", "content": [{"toolUse": {}}]}]}, "holds a part of the type 'toolUse'"),
        (
            {"messages": [{"role": "user", "content": [{"text": "Hi", "image": "a"}]}]},
            "a part of message 1 of messages has 'image', which is not text",
        ),
        (
            {"system": [{"type": "thinking", "thinking": "Why?"}], "messages": PAIR},
            "system holds a thought or a call, but is no answer",
        ),
        ({"foo": "Q", "bar": "A"}, "or name yours with --columns (as prompt=YOURS,completion=YOURS)"),
        (
            {"messages": [USER | {"from": "gpt"}, ANSWER]},
            "1 of messages has role and from, which disagree",
        ),
    ],
)
def test_what_other_tools_would_use_is_refused_by_name(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRow) as caught:
        encode(fields)
    assert expected in str(caught.value)


def test_masks_of_tokenized_rows_are_used() -> None:
    ids = [5, 6, 7, 8]
    for name in ("completion_mask", "assistant_masks"):
        row, _ = encode({"input_ids": ids, name: [0, 0, 1, 1], "position_ids": [0, 1, 2, 3]})
        assert row.targets.tolist() == [IGNORE_INDEX, 7, 8]
    with pytest.raises(BadRow, match="completion_mask is"):
        encode({"input_ids": ids, "completion_mask": [0, 1]})


def test_the_line_names_what_is_not_used() -> None:
    rows = [{"prompt": "Q", "completion": "A", "id": n, "empty": None, "n": [1] * n} for n in range(3)]
    _, report = encode_records([Record(row, "a:1") for row in rows], tokenizer_of(), LONG)
    assert describe_notes(report.notes) == ["columns not used: id (3 rows), n (2 rows)"]
    assert encode({"prompt": "a", "completion": "<|im_end|>b<s>"})[1].notes == {
        SPELLED_OUT: {"<|im_end|>": 1, "<s>": 1}
    }
    spelled = {"messages": [USER, ANSWER | {"thought": "a<|im_end|>"}]}
    assert encode(spelled, QWEN3)[1].notes == {SPELLED_OUT: {"<|im_end|>": 1}}
    assert encode(spelled)[1].notes == {NOT_PRINTED: {"thoughts": 1}}
    for answer in ({"content": " "}, {"content": ""}):  # a template's empty thought is a target all the same
        notes = encode({"messages": [USER, ANSWER | answer]}, QWEN3)[1].notes
        assert notes == {EMPTY: {"answers": 1}}
    assert encode({"messages": [*PAIR, USER]}, train_on="all")[1].notes == {TURNS: {"after the last answer": 1}}


@pytest.mark.parametrize("cache", [False, True])
def test_the_run_the_check_and_the_report_say_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: bool
) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Hi", "completion": "Hello", "id": 7}, {"q": "Hi", "prompt": "Ho", "completion": "x"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = "columns not used: id (1 row), q (1 row)"
    for _ in range(2):  # the second time from the cache
        said: list[str] = []
        examples, _ = load_examples(
            Sources([str(path)]), Encoder(tokenizer_of(), LONG, cache=cache), say=said.append
        )
        assert said[1:] == examples.notes == [f"{path}: {line}"]
    print_check(check_data(str(path)), Console(soft_wrap=True))
    assert f"\n{line}\n" in capsys.readouterr().out
    mapped = check_data(str(path), columns={"prompt": "prompt", "completion": "completion"})
    assert describe_notes(mapped.notes) == [line]
    run = Run(tmp_path, {}, {"examples": {"notes": examples.notes}}, [], [], [], [], {}, [], [])
    assert ("data", f"{path}: {line}") in describe_origin(run)


NAMES = "id source score reasoning thinking thought name weight train images tools system history label rejected"
KEYS = st.sampled_from([*NAMES.split(), "context", "input", "tool_call_id", "meta", "refusal", "Système", "x y"])
VALUES = st.sampled_from(["VALUE", 7, 0.5, True, ["VALUE"], {"VALUE": 1}, None, "", [], {}])
EXTRAS = st.lists(st.tuples(KEYS, VALUES, st.integers(-1, 1)), max_size=3)
SHAPES = st.sampled_from(
    [
        {"messages": PAIR},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"question": "Hi", "answer": "Hello"},
        {"text": "Hello"},
    ]
)


@settings(max_examples=150, deadline=None)
@given(SHAPES, EXTRAS, st.sampled_from([CHATML_TEMPLATE, QWEN3, DEEPSEEK_R1]))
def test_every_key_is_used_or_named(fields: dict[str, Any], extras: list[Any], template: str) -> None:
    """Random keys in rows and turns: each one changes the row, or is refused, known or noted."""
    row = json.loads(json.dumps(fields))
    turns = next((value for value in row.values() if isinstance(value, list)), None)
    for key, value, place in extras:
        target = row if place < 0 or turns is None else turns[min(place, len(turns) - 1)]
        target.setdefault(key, value)
    plain, _ = encode_records([Record(fields, "a:1")], tokenizer_of(template), LONG)
    try:
        rows, report = encode_records([Record(row, "a:1")], tokenizer_of(template), LONG)
    except BadRow as error:
        assert any(key in str(error) or str(value) in str(error) for key, value, _ in extras), error
        return
    noted = " ".join(name for names in report.notes.values() for name in names)
    for key, value, place in extras:
        target = row if place < 0 or turns is None else turns[min(place, len(turns) - 1)]
        if target.get(key) != value or value in (None, "", [], {}):
            continue
        without = json.loads(json.dumps(row))
        other: Any = next((item for item in without.values() if isinstance(item, list) and turns), None)
        del (without if target is row else other[(turns or []).index(target)])[key]
        less, _ = encode_records([Record(without, "a:1")], tokenizer_of(template), LONG)
        is_used = any(
            getattr(less[0], name).tolist() != getattr(rows[0], name).tolist() for name in ("input_ids", "targets")
        )
        is_known = key in ("tool_call_id", "train", "weight") or (
            key in ("thought", "thinking", "reasoning") and "thought" in noted
        )
        assert is_used or is_known or key in noted, (key, value, report.notes)
    if not extras:
        assert rows[0].input_ids.tolist() == plain[0].input_ids.tolist()


NESTED: list[dict[str, Any]] = [
    {"messages": [USER | {"content": [{"type": "text", "text": "Hi"}]},
                  ANSWER | {"content": [{"type": "thinking", "thinking": "T"}, {"text": "Hello"}]}]},
    {"tools": TOOLS, "messages": [
        USER,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "add", "input": {"x": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"text": "2"}]}]},
        ANSWER]},
    {"tools": TOOLS, "messages": calling({"role": "assistant", "tool_calls": [CALL]})},
    {"system": [{"text": "S"}], "contents": [{"role": "user", "parts": [{"text": "Hi"}]},
                                             {"role": "model", "parts": [{"text": "Hello"}]}]},
]  # fmt: skip


@pytest.mark.parametrize("fields", NESTED)
def test_a_key_at_any_depth_is_used_refused_or_named(fields: dict[str, Any]) -> None:
    plain, report = encode(fields, HERMES)
    assert not set(report.notes) - {NOT_PRINTED}
    places = 0

    def visit(value: Any, row: dict[str, Any]) -> None:
        nonlocal places
        if isinstance(value, dict):
            value["zzz"], places = "Z", places + 1
            try:
                example, report = encode(row, HERMES)
                is_used = example.input_ids.tolist() != plain.input_ids.tolist()
                assert is_used or "zzz" in str(report.notes), value
            except BadRow as error:
                assert "zzz" in str(error)
            del value["zzz"]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
            visit(item, row)

    row = json.loads(json.dumps(fields))
    visit(row, row)
    assert places >= 5


# ---- a date in the template, and columns of mixed kinds ---------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y') }} " + CHATML_TEMPLATE


def test_a_template_that_prints_the_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yesterday's tokens came from the cache; a run keeps its own date."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Hi", "completion": "Hello"}) + "\n")
    texts = []
    for day in ("2026-03-01", "2026-03-02", "2026-03-01"):
        tokenizer = tokenizer_of(DATED)
        tokenizer.template_date = date.fromisoformat(day)
        examples, _ = load_examples(
            Sources([str(path)]), Encoder(tokenizer, LONG, cache=True), say=lambda line: None
        )
        texts.append(text_of(examples[0])[:11])
        assert tokenizer.decode(encode_prompt([USER], tokenizer)).startswith(texts[-1])
    assert texts == ["01 Mar 2026", "02 Mar 2026", "01 Mar 2026"]
    assert text_of(encode({"prompt": "Hi", "completion": "Hello"}, DATED)[0]).startswith(f"{today():%d %b %Y}")


def even_turns(arguments: dict[str, Any]) -> Messages:
    """Turns with equal keys, so that Arrow makes one struct of them."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": arguments}]}
    return [USER | {"tool_calls": None}, call]


def test_whole_numbers_that_arrow_holds_as_fractions_are_named(tmp_path: Path) -> None:
    """A 1 beside a 2.5 was trained as 1.0."""
    rows = [{"messages": even_turns({"x": x}), "tools": TOOLS, "score": 1.0} for x in (1, 2.5)]
    lines, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    dataset = Dataset.from_json(str(lines), cache_dir=str(tmp_path / "cache"))
    for source, is_whole in ((str(lines), True), (str(table), False), (PythonRows("data", dataset), False)):
        examples, report = encode_records(read_records(source), tokenizer_of(HERMES), LONG)
        assert ('{"x": 1}' in text_of(examples[0])) is is_whole
        expected = {COLUMNS: {"score": 2}} | ({} if is_whole else {WHOLE: {"messages": 1}})
        assert report.notes == expected


def test_texts_that_datasets_reads_as_json_are_named(tmp_path: Path) -> None:
    """`datasets` 5.2 takes the quotes off, if another row of the column is no text."""
    path = tmp_path / "a.jsonl"
    answers: list[Any] = ['"said"', {"x": 1}]
    path.write_text("".join(json.dumps({"prompt": "Hi", "completion": answer}) + "\n" for answer in answers))
    dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    bad_rows: list[BadRow] = []
    examples, report = encode_records(
        read_records(PythonRows("data", dataset)), tokenizer_of(), LONG, bad_rows=bad_rows
    )
    if text_of(examples[0], trained=True) == "said<|im_end|>":
        assert report.notes == {MIXED: {"completion": 1}}
    else:
        assert text_of(examples[0], trained=True) == '"said"<|im_end|>'
    assert len(bad_rows) == 1
    arguments: list[Any] = [{"x": "1"}, {"x": 1}]
    path.write_text("".join(json.dumps({"messages": even_turns(call)}) + "\n" for call in arguments))
    dataset = Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    rows = read_records(PythonRows("data", dataset))
    if rows[0].fields["messages"][1]["tool_calls"][0]["arguments"] != {"x": "1"}:
        assert encode_records(rows, tokenizer_of(HERMES), LONG)[1].notes == {MIXED: {"messages": 2}}
    tools = {"tools": [{"name": "f", "x": 1}], "messages": PAIR}
    rows = read_records(PythonRows("d", Dataset.from_list([tools])))
    assert not encode_records(rows, tokenizer_of(HERMES), LONG)[1].notes
