"""Rows against ChatML written out by hand; then each template and tokenizer that could go wrong."""

import logging
from pathlib import Path

import pytest
import torch

from qlora.errors import InputError
from qlora.records import Record
from qlora.tokenize import (
    IGNORE_INDEX,
    encode_example,
    encode_prompt,
    encode_records,
    end_of_turn_id,
    fallback_template,
    format_sample,
)
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

LONG = 10_000
EOT, BOS = 2, 4  # <|im_end|> and <s> of the tiny tokenizer


def conversation(*contents, system=None):
    first = [{"role": "system", "content": system}] if system is not None else []
    roles = ("user", "assistant") * len(contents)
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


CONVERSATIONS = {
    "one turn": conversation("Hi there", "Hello"),
    "system": conversation("Hi", "Hello", system="Be brief."),
    "three turns": conversation("Hi", "Hello", "And then?", "the end", "\n\nBye", "Bye"),
    "answer begins with the newline that the prompt ends in": conversation("Hi", "\nHello\n", "more", "\n\n\n"),
    "answers equal to questions": conversation("a", "a", "a", "a"),
    "answer that spells the end of turn": conversation("What ends it?", "<|im_end|>!", "im_end", "im_end"),
    "question that spells the end of turn": conversation("<|im_end|>", "Yes", "<|im_end|>\n", "Yes"),
    "empty answer": conversation("Say nothing", "", "again", ""),
    "unicode": conversation("é 😀", "日本 the 😀"),
    "muted": [*conversation("Hi", "no"), *conversation("Hi", "yes")],
}
CONVERSATIONS["muted"][1]["weight"] = 0


def reference_row(messages, tokenizer, train_on):
    """ChatML by hand: (ids t_0 .. t_T, those of them that are to be predicted else IGNORE_INDEX)."""
    ids, predicted = [], []

    def add(text, trained):
        new = tokenizer.encode(text, add_special_tokens=False)
        ids.extend(new)
        predicted.extend(new if trained or train_on == "all" else [IGNORE_INDEX] * len(new))

    for message in messages:
        start = f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            add(start, False)
            add(message["content"] + "<|im_end|>", message.get("weight") != 0)
            add("\n", False)
        else:
            add(start + message["content"] + "<|im_end|>\n", False)
    return ids, predicted


def decoded_targets(example, tokenizer):
    return tokenizer.decode(example.targets[example.targets != IGNORE_INDEX].tolist())


@pytest.mark.parametrize("train_on", ["completion", "all"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_row_equals_chatml_by_hand(name, pad_is_eos, train_on):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    ids, predicted = reference_row(CONVERSATIONS[name], tokenizer, train_on)
    example = encode_example(CONVERSATIONS[name], tokenizer, LONG, train_on)
    assert example.input_ids.tolist() == ids[:-1]
    assert example.targets.tolist() == predicted[1:]
    assert example.input_ids.dtype == example.targets.dtype == torch.int64
    assert len(example) == len(ids) - 1
    assert example.num_targets == sum(token != IGNORE_INDEX for token in predicted[1:]) > 0


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("chat_template", [True, False])
def test_every_prompt_is_the_exact_beginning_of_the_row(name, chat_template):
    tokenizer, messages = tiny_tokenizer(chat_template), CONVERSATIONS[name]
    example = encode_example(messages, tokenizer, LONG)
    num_prompts = 0
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:index], tokenizer)
            assert example.input_ids[: len(prompt)].tolist() == prompt
            first_predicted = example.targets[len(prompt) - 1].item()  # made by the prompt's last token
            assert (first_predicted != IGNORE_INDEX) == (message.get("weight") != 0)
            num_prompts += 1
    assert num_prompts > 0


def test_no_token_spans_the_end_of_the_prompt():
    tokenizer, messages = tiny_tokenizer(), conversation("Hi", "\nHello")
    prompt = encode_prompt(messages[:1], tokenizer)
    whole = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
    assert whole[: len(prompt)] != prompt  # this tokenizer does merge across it
    assert encode_example(messages, tokenizer, LONG).input_ids[: len(prompt)].tolist() == prompt


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_end_of_turn_is_a_target_and_the_newline_after_it_is_not(pad_is_eos):
    tokenizer = tiny_tokenizer(pad_is_eos=pad_is_eos)
    example = encode_example(conversation("a", "b", "c", "d"), tokenizer, LONG)
    assert decoded_targets(example, tokenizer) == "b<|im_end|>d<|im_end|>"
    assert (example.targets == EOT).sum() == 2  # the users' two are context
    assert example.targets[-1] == IGNORE_INDEX and example.input_ids[-1] == EOT


def test_bos_is_up_to_the_template():
    plain, messages = tiny_tokenizer(), conversation("Hi", "Hello")
    adds_bos = tiny_tokenizer(add_bos=True)
    without = encode_example(messages, plain, LONG).input_ids.tolist()
    assert BOS not in without
    assert encode_example(messages, adds_bos, LONG).input_ids.tolist() == without
    adds_bos.chat_template = "{{ bos_token }}" + CHATML_TEMPLATE
    assert encode_example(messages, adds_bos, LONG).input_ids.tolist() == [BOS, *without]
    assert encode_prompt(messages[:1], adds_bos).count(BOS) == 1


@pytest.mark.parametrize("add_bos", [False, True])
def test_fallback_template(add_bos):
    tokenizer = tiny_tokenizer(chat_template=False, add_bos=add_bos)
    messages = conversation("Hi", "Hello", "Bye", "Ciao", system="Be brief.")
    example = encode_example(messages, tokenizer, LONG)
    ids = [*example.input_ids.tolist(), tokenizer.encode("\n\n", add_special_tokens=False)[-1]]
    assert tokenizer.decode(ids) == "<s>" * add_bos + (
        "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello<|im_end|>\n\n"
        "### Instruction:\nBye\n\n### Response:\nCiao<|im_end|>\n\n"
    )
    assert ids.count(BOS) == add_bos
    assert decoded_targets(example, tokenizer) == "Hello<|im_end|>Ciao<|im_end|>"
    tokenizer.chat_template = fallback_template(tokenizer)  # saved with the model, it prompts alike
    assert encode_prompt(messages[:-1], tokenizer) == ids[: len(encode_prompt(messages[:-1], tokenizer))]
    saved = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, return_dict=False)
    assert saved == encode_prompt(messages[:2], tokenizer)


@pytest.mark.parametrize("add_bos", [False, True])
def test_a_document_is_all_targets(add_bos):
    tokenizer = tiny_tokenizer(add_bos=add_bos)
    document = [{"role": "document", "content": "Once\n"}]
    example = encode_example(document, tokenizer, LONG)
    assert example.input_ids.tolist() == tokenizer("Once\n").input_ids == encode_prompt(document, tokenizer)
    assert example.targets.tolist() == [*example.input_ids.tolist()[1:], EOT]


def test_a_blank_document_has_no_target():
    document = [{"role": "document", "content": " \n"}]
    assert encode_example(document, tiny_tokenizer(add_bos=True), LONG).num_targets == 0


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_truncation_keeps_the_first_tokens(train_on):
    tokenizer, messages = tiny_tokenizer(), CONVERSATIONS["three turns"]
    full = encode_example(messages, tokenizer, LONG, train_on)
    for max_length in range(1, len(full) + 2):
        cut = encode_example(messages, tokenizer, max_length, train_on)
        assert len(cut) == min(max_length, len(full)) == len(cut.targets)
        assert cut.input_ids.tolist() == full.input_ids.tolist()[:max_length]
        assert cut.targets.tolist() == full.targets.tolist()[:max_length]


# Two rows of T = 29 and 31, one whose prompt alone has 130, one blank document.
FIELDS = [
    {"question": "a", "answer": "b"},
    {"question": "a", "answer": "bcd"},
    {"question": "a" * 100, "answer": "b"},
    {"text": " "},
]


def records():
    return [Record(fields, f"train.jsonl:{line}") for line, fields in enumerate(FIELDS, start=1)]


def test_encode_records_counts_what_it_drops():
    tokenizer = tiny_tokenizer()
    short, middle = (encode_example(conversation("a", answer), tokenizer, LONG) for answer in ("b", "bcd"))
    max_length = len(short)
    assert len(middle) == max_length + 2

    examples, report = encode_records(records(), tokenizer, max_length)
    assert [len(example) for example in examples] == [max_length, max_length]
    assert (report.num_records, report.num_truncated) == (4, 1)
    assert (report.num_dropped_long, report.num_dropped_no_target) == (0, 2)
    assert report.num_tokens == 2 * max_length
    assert report.num_targets == sum(example.num_targets for example in examples) == 2 + 3  # b<eot>, bcd
    assert str(report) == (
        f"2 of 4 records kept (1 truncated; dropped: 0 too long, 2 without a target), "
        f"{2 * max_length} tokens, 5 of them targets ({5 / (2 * max_length):.0%})"
    )

    examples, report = encode_records(records(), tokenizer, max_length, on_long="drop")
    assert [example.input_ids.tolist() for example in examples] == [short.input_ids.tolist()]
    assert (report.num_truncated, report.num_dropped_long, report.num_dropped_no_target) == (0, 2, 1)

    examples, report = encode_records(records(), tokenizer, max_length, train_on="all")
    assert report.num_targets == report.num_tokens == 3 * max_length


@pytest.mark.parametrize(
    ("on_long", "counts"),
    [("truncate", "0 too long, 4 without a target"), ("drop", "3 too long, 1 without a target")],
)
def test_nothing_left_says_why(on_long, counts):
    with pytest.raises(InputError, match=f"None of 4 records is left at --max-length 5: {counts}"):
        encode_records(records(), tiny_tokenizer(), 5, on_long=on_long)


def test_a_bad_record_is_named_by_its_origin():
    with pytest.raises(InputError, match=r"^train\.jsonl:9: text is null"):
        encode_records([*records(), Record({"text": None}, "train.jsonl:9")], tiny_tokenizer(), LONG)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 8, "train_on": "answers"}, "train_on is 'answers'; use"),
        ({"max_length": 8, "on_long": "split"}, "on_long is 'split'; use"),
    ],
)
def test_options_are_checked(options, expected):
    with pytest.raises(InputError, match=expected):
        encode_records(records(), tiny_tokenizer(), **options)


def with_template(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# As Qwen3: an empty thought, before the last answer only.
THINKING = CHATML_TEMPLATE.replace(
    "+ message['content']",
    "+ ('<think>\n\n</think>\n\n' if loop.last and message['role'] == 'assistant' else '') + message['content']",
)
# As LLaMA 2: no generation prompt, and blanks around the answer.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# As gpt-oss: the last answer ends in one token, earlier ones in another.
TWO_ENDINGS = CHATML_TEMPLATE.replace(
    "'<|im_end|>'", "('<|endoftext|>' if loop.last and message['role'] == 'assistant' else '<|im_end|>')"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (THINKING, "think<|im_end|><think>\n\n</think>\n\nthink<|im_end|>"),
        (BRACKETS, " think <|im_end|> think <|im_end|>"),
        (TWO_ENDINGS, "think<|im_end|>think<|endoftext|>"),
        (CHATML_TEMPLATE.replace("message['content']", "message['content'].strip()"), "think<|im_end|>" * 2),
    ],
)
def test_templates_of_other_families(template, expected):
    tokenizer = with_template(template)
    contents = ("a", " think\n" if "strip" in template else "think")
    messages = conversation(*contents, *contents)
    example = encode_example(messages, tokenizer, LONG)
    assert decoded_targets(example, tokenizer) == expected
    for num_messages in (1, 3):
        prompt = encode_prompt(messages[:num_messages], tokenizer)
        assert example.input_ids[: len(prompt)].tolist() == prompt


def test_the_end_of_turn_is_read_off_the_template():
    assert end_of_turn_id(tiny_tokenizer()) == EOT
    other = with_template(CHATML_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    assert end_of_turn_id(other) == 0 != other.eos_token_id


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # As Mistral: the system prompt moves into the last question.
        (
            "{% for m in messages %}{{ m['role'] }}: "
            "{% if loop.index0 >= messages | length - 2 %}S {% endif %}"
            "{{ m['content'] + eos_token }}{% endfor %}",
            "rewrites what precedes answer 1 once more follows; split the record",
        ),
        # As DeepSeek-R1: the generation prompt opens a thought that the rendered answer lacks.
        (
            CHATML_TEMPLATE.replace("assistant\n'", "assistant\n<think>'"),
            "rewrites what precedes answer 1 once more follows",
        ),
        (CHATML_TEMPLATE.replace("<|im_end|>", ""), "no special token after the answer 'Ciao'"),
        (
            CHATML_TEMPLATE.replace("message['content']", "message['content'] | upper"),
            "after the answer 'Hello'",
        ),
        (CHATML_TEMPLATE + "{{ raise_exception('No users') }}", "the chat template refuses it: No users"),
    ],
)
def test_a_template_that_cannot_be_trained_is_refused(template, expected):
    messages = conversation("Hi", "Hello", "Bye", "Ciao")
    with pytest.raises(InputError) as caught:
        encode_example(messages, with_template(template), LONG, origin="train.jsonl:3")
    assert str(caught.value).startswith("train.jsonl:3: ") and expected in str(caught.value)


def test_without_eos_nothing_could_stop():
    tokenizer = tiny_tokenizer(chat_template=False)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no special token after the answer"):
        encode_example(conversation("Hi", "Hello"), tokenizer, LONG)
    with pytest.raises(InputError, match="no eos_token to end a document with"):
        encode_example([{"role": "document", "content": "Once"}], tokenizer, LONG)


def test_format_sample_shows_context_and_targets():
    tokenizer = tiny_tokenizer()
    example = encode_example(conversation("a", "b", "c", "d"), tokenizer, LONG)
    assert format_sample(example, tokenizer) == (
        f"{len(example)} tokens, 4 targets between ⟦ and ⟧:\n"
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"
    )
    document = encode_example([{"role": "document", "content": "abc"}], tokenizer, LONG)
    assert format_sample(document, tokenizer).splitlines()[1] == "a⟦bc<|im_end|>⟧"


def test_a_long_row_logs_no_warning(caplog):
    """transformers warns of texts beyond the model's length before we have cut them."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            encode_example([{"role": "document", "content": "a" * 5000}], tiny_tokenizer(), 100)
    finally:
        transformers_logging.disable_propagation()
    assert caplog.records == []


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    """The tokenizer and the chat template of a model that people use."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(smollm2).parent, gguf_file=Path(smollm2).name)


def test_the_template_of_smollm2(smollm2_tokenizer):
    messages = conversation("What is 2 + 2?", "It is 4.\n\nSure!", "And 3 + 3?", "6.")
    example = encode_example(messages, smollm2_tokenizer, LONG)
    whole = smollm2_tokenizer.apply_chat_template(messages, return_dict=False)
    assert example.input_ids.tolist() == whole[:-1]  # nothing to merge here, so the parts make up the whole
    assert decoded_targets(example, smollm2_tokenizer) == "It is 4.\n\nSure!<|im_end|>6.<|im_end|>"
    assert smollm2_tokenizer.decode(whole).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )
    assert end_of_turn_id(smollm2_tokenizer) == smollm2_tokenizer.eos_token_id == 2
    prompt = encode_prompt(messages[:1], smollm2_tokenizer)
    assert prompt == smollm2_tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    newline_first = encode_example(conversation("Hi", "\nHello"), smollm2_tokenizer, LONG)
    prompt = encode_prompt(conversation("Hi"), smollm2_tokenizer)
    assert newline_first.input_ids[: len(prompt)].tolist() == prompt
