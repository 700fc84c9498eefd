"""Tool calls through chat templates: rows against text written by hand, and templates that lose something."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest

from qlora.data.conversations import to_messages
from qlora.data.encode import encode_prompt, encode_records
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.rows import BadRow, Record
from qlora.system.errors import InputError
from tests.shortcuts import encode_example
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

LONG = 100_000

# As Hermes and Qwen 2.5: tools in the system turn, calls as JSON within <tool_call>, results in a user's turn.
HERMES = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

# As Qwen 3: an empty thought before the last answer only; arguments that are text stand as they are.
THINKING = HERMES.replace(
    "{{- '<|im_start|>' + message.role }}",
    "{{- '<|im_start|>' + message.role }}{%- if loop.last %}{{- '\n<think>\n\n</think>\n' }}{%- endif %}",
)

# As Llama 3.1: one call a turn, its content left out, results from "ipython"; tools in the first question.
LLAMA = r"""{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools is not none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Cannot put tools in the first user message when there's no first user message!") }}
    {%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Given the following functions, please respond with a JSON for a function call.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# As DeepSeek: calls between special tokens.
DEEPSEEK = """{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}{% for m in messages %}
{%- if m['role'] == 'user' %}<|User|>{{ m['content'] }}
{%- elif m['role'] == 'assistant' and m['content'] is not defined %}<|Assistant|><|calls|>
{%- for call in m['tool_calls'] %}<|call|>{{ call['function']['name'] }}
{{ call['function']['arguments'] | tojson }}<|call_end|>{% endfor %}<|calls_end|><|endoftext|>
{%- elif m['role'] == 'assistant' %}<|Assistant|>{{ m['content'] }}<|endoftext|>
{%- elif m['role'] == 'tool' %}<|output|>{{ m['content'] }}<|output_end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|Assistant|>{% endif %}"""

MORE_TOKENS = {
    LLAMA: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    DEEPSEEK: [
        "<|User|>",
        "<|Assistant|>",
        "<|calls|>",
        "<|call|>",
        "<|call_end|>",
        "<|calls_end|>",
        "<|output|>",
    ],
}

WEATHER = {
    "name": "weather",
    "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "time"}}]


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, "id": "call00001"}


PARIS, ROME = call("weather", {"city": "Paris"}), call("weather", '{"city":  "Rome"}')
QUESTION = {"role": "user", "content": "Weather?"}
ENDING = [
    {"role": "assistant", "content": "21 degrees."},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "Sure."},
]


def conversation(*calls: dict[str, Any], content: str | None = None) -> list[dict[str, Any]]:
    asked = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    results = [{"role": "tool", "content": str(20 + n), "tool_call_id": "call00001"} for n in range(len(calls))]
    return [QUESTION, asked, *results, *ENDING]


def tokenizer_with(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MORE_TOKENS.get(template, [])})
    tokenizer.chat_template = template
    return tokenizer


def messages_of(turns: list[dict[str, Any]], tools: Any = TOOLS) -> list[dict[str, Any]]:
    return to_messages(Record({"messages": turns, "tools": tools}, "a:1"))


def targets_of(example: Example, tokenizer: Any) -> list[str]:
    """The text of each stretch of targets."""
    pieces: list[list[int]] = [[]]
    for target in example.targets.tolist():
        if target != IGNORE_INDEX:
            pieces[-1].append(target)
        elif pieces[-1]:
            pieces.append([])
    return [tokenizer.decode(piece) for piece in pieces if piece]


def check_prompts(messages: list[dict[str, Any]], example: Example, tokenizer: Any) -> int:
    """Each prompt is the exact beginning of the row, and the first target comes right after it."""
    num_prompts = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:index], tokenizer)
            assert example.input_ids[: len(prompt)].tolist() == prompt
            assert (example.targets[len(prompt) - 1] != IGNORE_INDEX) == (message.get("weight") != 0)
            num_prompts += 1
    return num_prompts


def hermes_call(city: str) -> str:
    return '<tool_call>\n{"name": "weather", "arguments": {"city": "' + city + '"}}\n</tool_call>'


LLAMA_CALL = '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>'
DEEPSEEK_CALL = '<|call|>weather\n{"city": "'


@pytest.mark.parametrize(
    ("template", "calls", "end", "expected"),
    [
        (HERMES, [PARIS], "<|im_end|>", hermes_call("Paris") + "<|im_end|>"),
        (HERMES, [PARIS, ROME], "<|im_end|>", f"{hermes_call('Paris')}\n{hermes_call('Rome')}<|im_end|>"),
        (THINKING, [ROME, PARIS], "<|im_end|>", f"{hermes_call('Rome')}\n{hermes_call('Paris')}<|im_end|>"),
        (LLAMA, [PARIS], "<|eot_id|>", LLAMA_CALL),
        (
            DEEPSEEK,
            [PARIS, ROME],
            "<|endoftext|>",
            f'<|calls|>{DEEPSEEK_CALL}Paris"}}<|call_end|>{DEEPSEEK_CALL}Rome"}}<|call_end|><|calls_end|><|endoftext|>',
        ),
    ],
)
def test_calls_are_targets_and_results_are_context(
    template: str, calls: list[Any], end: str, expected: str
) -> None:
    tokenizer, messages = tokenizer_with(template), messages_of(conversation(*calls))
    example = encode_example(messages, tokenizer, LONG)
    assert targets_of(example, tokenizer) == [expected, f"21 degrees.{end}", f"Sure.{end}"]
    assert check_prompts(messages, example, tokenizer) == 3
    # The row is the template's own text of the whole conversation.
    turns = [turn | {"content": turn["content"] or None} for turn in messages[1:]]
    text = tokenizer.apply_chat_template(turns, tools=TOOLS, tokenize=False)
    row = tokenizer.decode(example.input_ids.tolist())
    assert text.startswith(row) and len(text) - len(row) <= len("<|endoftext|>")  # the last token is a target only
    assert '"The weather"' in text and "20" in text


def test_a_call_may_end_the_conversation_and_be_context() -> None:
    tokenizer = tokenizer_with(HERMES)
    turns = conversation(PARIS)
    last = encode_example(messages_of(turns[:2]), tokenizer, LONG)
    assert targets_of(last, tokenizer) == [hermes_call("Paris") + "<|im_end|>"]
    assert encode_example(messages_of(turns[:3]), tokenizer, LONG).input_ids.equal(last.input_ids)
    turns[1] = turns[1] | {"train": False}
    messages = messages_of(turns)
    example = encode_example(messages, tokenizer, LONG)
    assert targets_of(example, tokenizer) == ["21 degrees.<|im_end|>", "Sure.<|im_end|>"]
    assert check_prompts(messages, example, tokenizer) == 3
    assert encode_example(messages, tokenizer, LONG, "all").num_targets == len(example)


def test_several_rounds_and_a_content_beside_a_call() -> None:
    tokenizer = tokenizer_with(HERMES)
    rounds = [*conversation(PARIS, content="Let me see.")[:3], *conversation(ROME)[1:]]
    messages = messages_of(rounds)
    example = encode_example(messages, tokenizer, LONG)
    assert targets_of(example, tokenizer)[:2] == [
        f"Let me see.\n{hermes_call('Paris')}<|im_end|>",
        f"{hermes_call('Rome')}<|im_end|>",
    ]
    assert check_prompts(messages, example, tokenizer) == 4


def test_other_ways_to_write_the_same() -> None:
    """Flat calls, tools as JSON text or without a wrapper, ShareGPT's names, TRL's prompt and completion."""
    tokenizer = tokenizer_with(HERMES)
    expected = encode_example(messages_of(conversation(PARIS)), tokenizer, LONG)
    flat = conversation({"name": "weather", "arguments": '{"city": "Paris"}'})
    sharegpt = [{"from": turn["role"], "value": turn["content"]} | turn for turn in flat]
    for turn in sharegpt:
        del turn["role"], turn["content"]
    prompt = [flat[0], flat[1] | {"weight": 0}, *flat[2:]]
    for fields in (
        {"messages": flat, "tools": json.dumps(TOOLS)},
        {"messages": flat, "tools": [tool["function"] for tool in TOOLS]},
        {"conversations": sharegpt, "tools": TOOLS},
    ):
        example = encode_example(to_messages(Record(fields, "a:1")), tokenizer, LONG)
        assert example.input_ids.equal(expected.input_ids) and example.targets.equal(expected.targets)
    fields = {"prompt": flat[:3], "completion": flat[3:], "tools": TOOLS}
    example = encode_example(to_messages(Record(fields, "a:1")), tokenizer, LONG)
    assert example.targets.equal(encode_example(messages_of(prompt), tokenizer, LONG).targets)


@pytest.mark.parametrize("template", [HERMES, LLAMA])
def test_special_text_in_calls_results_and_tools_is_text(template: str) -> None:
    """In arguments (values and keys), results and descriptions; the control tokens are those of a plain twin."""
    tokenizer = tokenizer_with(template)
    end = "<|eot_id|>" if template is LLAMA else "<|im_end|>"
    tools, turns = copy.deepcopy(TOOLS), conversation(call("weather", {"city": "XX", "X": ["X"]}))
    turns[2]["content"] = tools[0]["function"]["description"] = "X"
    poisoned = json.loads(json.dumps([turns, tools]).replace("X", end))
    plain = encode_example(messages_of(turns, tools), tokenizer, LONG)
    messages = messages_of(*poisoned)
    example = encode_example(messages, tokenizer, LONG)
    controls = [token for token in example.input_ids.tolist() if token in tokenizer.all_special_ids]
    assert controls == [token for token in plain.input_ids.tolist() if token in tokenizer.all_special_ids]
    assert targets_of(example, tokenizer)[0].count(end) == 1 + 4  # the end of the turn, and four texts
    assert check_prompts(messages, example, tokenizer) == 3
    parsed = encode_example(messages, tokenizer, LONG, parse_special=True)
    assert sum(token in tokenizer.all_special_ids for token in parsed.input_ids.tolist()) > len(controls)


LOSERS = {
    "the tools": HERMES.replace("{{- tool | tojson }}", ""),
    "the tool calls": HERMES.replace("{{- tool_call.name }}", ""),
    "the arguments of tool calls": HERMES.replace("{{- tool_call.arguments | tojson }}", ""),
    "the results of tools": HERMES.replace("'\\n<tool_response>\\n' }}\n        {{- message.content", "'' "),
}


@pytest.mark.parametrize("lost", LOSERS)
def test_a_template_that_loses_something_is_refused(lost: str) -> None:
    assert LOSERS[lost] != HERMES
    with pytest.raises(BadRow, match=f"^a:1: the chat template drops {lost}; use one that writes it"):
        encode_example(messages_of(conversation(PARIS)), tokenizer_with(LOSERS[lost]), LONG, origin="a:1")


@pytest.mark.parametrize(
    ("template", "turns", "tools", "expected"),
    [
        (CHATML_TEMPLATE, conversation(PARIS), None, "drops the tool calls"),
        (CHATML_TEMPLATE, ENDING[1:], TOOLS, "drops the tools"),
        (None, conversation(PARIS), None, "drops the tool calls"),  # the fallback for base models
        (LLAMA, conversation(PARIS, content="Let me see."), TOOLS, "drops the content next to tool calls"),
        (LLAMA, conversation(PARIS, ROME), TOOLS, "refuses it: This model only supports single tool-calls"),
        (
            HERMES.replace(
                "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\"", '{%- elif message.role == "tool"'
            ),
            conversation(PARIS),
            TOOLS,
            "no special token after the answer",
        ),
        (  # the first call is written only as long as nothing follows
            HERMES.replace(
                "{{- tool_call.arguments | tojson }}", "{{- (tool_call.arguments if loop.last else 1) | tojson }}"
            ),
            conversation(PARIS, ROME),
            TOOLS,
            "drops the arguments of tool calls",
        ),
    ],
)
def test_what_a_template_cannot_say_is_named(template: Any, turns: Any, tools: Any, expected: str) -> None:
    assert template != HERMES
    with pytest.raises(BadRow, match=f"^a:1: .*{re.escape(expected)}"):
        encode_example(messages_of(turns, tools), tokenizer_with(template), LONG, origin="a:1")


def test_a_template_that_rewrites_a_call_is_refused() -> None:
    """Its arguments are cut once more follows: the place that the call alone would have ended at is not there."""
    template = HERMES.replace(
        "{{- tool_call.arguments | tojson }}",
        "{{- (tool_call.arguments | tojson)[:30 if message == messages[-1] else 12] }}",
    )
    with pytest.raises(BadRow, match="no special token after the answer"):
        encode_example(messages_of(conversation(PARIS)), tokenizer_with(template), LONG)


def test_each_order_of_turns_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_with(HERMES)
    render, count = type(tokenizer).apply_chat_template, [0]

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        return render(self, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", counted)
    record = Record({"messages": conversation(PARIS), "tools": TOOLS}, "a:1")
    needed = []
    for number in (1, 2, 3):
        count[0] = 0
        encode_records([record] * number, tokenizer, LONG)
        needed.append(count[0])
    assert needed[2] - needed[1] == needed[1] - needed[0] == 4 + 2 < needed[0]  # four parts, and the call's end


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"tool_calls": "f(x)"}, "has the tool_calls 'f(x)'; write a list of calls"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, "call 1 has no name"),
        ({"tool_calls": [PARIS, call("", {})]}, "call 2 has no name"),
        (
            {"tool_calls": [call("f", '{"a": ')]},
            "the arguments of call 1 in message 2 of messages: not valid JSON",
        ),
        ({"tool_calls": [call("f", "[1]")]}, "in message 2 of messages are [1] (list); write a JSON object"),
        ({"tool_calls": [call("f", '{"a": NaN}')]}, "'a' is NaN, which is not a JSON value"),
        ({"tool_calls": [call("f", '{"a": 1, "a": 2}')]}, "has the key 'a' twice"),
        ({"tool_calls": [call("f", {"a": "\ud800"})]}, "holds a NUL or half of a surrogate pair"),
        ({"tool_calls": [call("f", {"a": float("inf")})]}, "holds inf (float), which is not a JSON value"),
        ({"tool_calls": [call("f", {"a": json.loads("[" * 99 + "]" * 99)})]}, "nested more than 64 levels deep"),
        ({"role": "user", "tool_calls": [PARIS]}, "message 2 of messages has tool_calls, but is from the user"),
        (
            {"tool_calls": [{"name": "f", "params": {"a": 1}}]},
            "call 1 in message 2 of messages has the key 'params'",
        ),
        (
            {"tool_calls": [call("f", {}) | {"parameters": {"a": 1}}]},
            "messages has the key 'parameters', which no",
        ),
        (
            {"tool_calls": [{"name": "f", "args": {}, "input": {}}]},
            "call 1 in message 2 of messages has args and i",
        ),
        ({"tool_calls": [call("f", 0)]}, "call 1 in message 2 of messages are 0 (int); write a JSON object"),
        ({"tool_calls": [call("f", False)]}, "call 1 in message 2 of messages are False (bool); write a JSON"),
        ({"tool_calls": [call("f", {}) | {"id": 7}]}, "the id of call 1 in message 2 of messages is 7 (int)"),
    ],
)
def test_a_bad_call_is_named(turn: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        messages_of([QUESTION, {"role": "assistant", "content": "x"} | turn, *ENDING])
    assert str(caught.value).startswith("a:1: ") and expected in str(caught.value)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("weather", "tools: not valid JSON"),
        ({"name": "f"}, "tools is {'name': 'f'} (dict); write a list of tools"),
        (["f"], "tool 1 of tools is 'f' (str); write an object with a name"),
        ([TOOLS[0], {"type": "function", "function": {}}], "tool 2 of tools is"),
    ],
)
def test_bad_tools_are_named(tools: Any, expected: str) -> None:
    with pytest.raises(BadRow, match=f"^a:1: {re.escape(expected)}"):
        messages_of(conversation(PARIS), tools)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([QUESTION, {"role": "assistant", "tool_calls": [PARIS]}, QUESTION, ENDING[0]], "user, not the tool"),
        ([QUESTION, {"role": "assistant", "tool_calls": [PARIS]}, ENDING[0]], "assistant, not the tool"),
        ([QUESTION, ENDING[0], {"role": "tool", "content": "1"}, ENDING[0]], "tool, not the user"),
        ([*conversation(PARIS)[:3], QUESTION, ENDING[0]], "user, not the assistant or the tool"),
    ],
)
def test_turns_out_of_order(turns: list[Any], expected: str) -> None:
    with pytest.raises(
        BadRow, match=f"is from the {expected}; .* after an answer with tool_calls, put the tool results"
    ):
        messages_of(turns)


def test_tools_beside_other_shapes_are_other_columns() -> None:
    fields = {"question": "Q", "answer": "A", "tools": ["hammer"]}
    assert [turn["role"] for turn in to_messages(Record(fields, "a:1"))] == ["user", "assistant"]
