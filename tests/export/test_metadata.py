"""What lies next to merged weights: the config for older readers, stops, the tokenizer and its templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.gguf import export_gguf
from qlora.export.merge import merge_adapter
from qlora.export.metadata import legacy_config_keys
from qlora.export.ollama import write_modelfile
from tests.models import save_tiny_llama
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def merged(base: Path, folder: Path, **settings: Any) -> Path:
    """The base with a fresh adapter merged into it."""
    from qlora.adapters.model import LoRAModel
    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(base))
    if settings.get("new_tokens"):
        from qlora.data.tokenizer_files import add_tokens

        add_tokens(tokenizer, settings["new_tokens"])
    network = load_base_model(str(base), use_4bit=False, compute_dtype="float32")
    LoRAModel(network, LoRAConfig(rank=2, **settings), tokenizer=tokenizer).save(folder / "adapter")
    merge_adapter(str(base), str(folder / "adapter"), str(folder / "merged"), MergeOptions(drift=False))
    return folder / "merged"


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("rope", "theta", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 500000.0}, 500000.0, None),
        (LLAMA3, 500000.0, {key: value for key, value in LLAMA3.items() if key != "rope_theta"}),
    ],
)
def test_transformers_4_reads_the_rotary_base(
    tmp_path: Path, rope: dict[str, Any], theta: float, scaling: dict[str, Any] | None
) -> None:
    """Its keys say the same as transformers 5's, and transformers 5 still reads its own."""
    from transformers import AutoConfig

    base = save_tiny_llama(tmp_path / "base", tokenizer=tiny_tokenizer(), rope_parameters=rope)
    directory = merged(base, tmp_path)
    config = read(directory / "config.json")
    assert (config["rope_theta"], config["rope_scaling"], config["torch_dtype"]) == (theta, scaling, "bfloat16")
    assert config["rope_parameters"] == rope
    assert AutoConfig.from_pretrained(directory).rope_parameters == rope


def test_legacy_keys_of_other_families() -> None:
    """The keys that transformers 4.57's own configs have."""
    assert legacy_config_keys({"dtype": "float16"}) == {"torch_dtype": "float16"}  # GPT-2
    phi = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}}
    assert legacy_config_keys(phi) == {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None}
    kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    kinds["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    assert legacy_config_keys({"rope_parameters": kinds}) == {
        "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 0}, [0, 2]),  # <|endoftext|>, and the <|im_end|> that training taught
        ({"eos_token_id": [0, 2]}, [0, 2]),
        ({"eos_token_id": 2, "temperature": 0.6}, 2),
        ({"max_new_tokens": 9}, 2),
        (None, 2),
    ],
)
def test_generation_stops_where_training_taught(tmp_path: Path, before: Any, after: Any) -> None:
    """transformers' own generate stops there too; all else in the file stays."""
    from transformers import AutoModelForCausalLM

    base = save_tiny_llama(tmp_path / "base", tokenizer=tiny_tokenizer())
    (base / "generation_config.json").unlink()
    if before is not None:
        (base / "generation_config.json").write_text(json.dumps(before))
    directory = merged(base, tmp_path)
    written = read(directory / "generation_config.json")
    assert written["eos_token_id"] == after
    assert before is None or {**written, **before, "eos_token_id": after} == written
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generation_config.eos_token_id == after


TOOL_USE = (
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{% for message in messages %}{{ message.role }}\n{{ message.content or '' }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}<|eom|>{% else %}<|im_end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)


@pytest.mark.parametrize("named", [False, True])
def test_every_reader_stops_at_every_end_that_training_taught(tmp_path: Path, named: bool) -> None:
    """Of the base, of turns and of calls: in the merge, its .gguf file, its Modelfile and this project's own
    answers.
    """
    from gguf import GGUFReader

    from qlora.generation import end_ids
    from qlora.model.load import load_base_model
    from qlora.model.tokenizer import load_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "extra_special_tokens": ["<|eom|>"]})
    tokenizer.chat_template = {"default": CHATML_TEMPLATE, "tool_use": TOOL_USE} if named else CHATML_TEMPLATE
    base = save_tiny_llama(tmp_path / "base", tokenizer=tokenizer)
    (base / "generation_config.json").write_text('{"eos_token_id": 0}')
    directory = merged(base, tmp_path)
    ends = [0, 2, 269] if named else [0, 2]
    assert read(directory / "generation_config.json")["eos_token_id"] == ends
    export_gguf(str(directory), tmp_path / "model.gguf", "f32", pre_tokenizer="gpt-2")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    names = [f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom")]
    assert [fields[name].contents() for name in names if name in fields] == ends
    write_modelfile(tmp_path / "model.gguf", load_tokenizer(str(directory)))
    stops = [f'PARAMETER stop "{end}"' for end in ("<|endoftext|>", "<|im_end|>", "<|eom|>")[: len(ends)]]
    assert (tmp_path / "Modelfile").read_text().splitlines() == ["FROM ./model.gguf", *stops]
    network = load_base_model(str(base), use_4bit=False, compute_dtype="float32")
    assert end_ids(network, load_tokenizer(str(base))) == set(ends)


def test_files_of_the_base_travel_unchanged(tmp_path: Path) -> None:
    """Byte for byte where no token was added, except for what transformers 4 cannot open."""
    base = save_tiny_llama(tmp_path / "base", tokenizer=tiny_tokenizer())
    config = read(base / "tokenizer_config.json")
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "a_key": "of another reader"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    directory = merged(base, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (directory / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("new_tokens", [[], ["<fact>"]])
def test_extra_special_tokens(tmp_path: Path, new_tokens: list[str]) -> None:
    """A list of them is written under the name that transformers 4 and 5 both read."""
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    base = save_tiny_llama(tmp_path / "base", tokenizer=tokenizer)
    assert read(base / "tokenizer_config.json")["extra_special_tokens"] == ["<tool>"]
    directory = merged(base, tmp_path, new_tokens=new_tokens)
    config = read(directory / "tokenizer_config.json")
    assert "extra_special_tokens" not in config and config["additional_special_tokens"] == ["<tool>"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 has no TokenizersBackend
    trained = AutoTokenizer.from_pretrained(tmp_path / "adapter" if new_tokens else base)
    again = AutoTokenizer.from_pretrained(directory)
    assert again.encode("a<tool>b<fact>") == trained.encode("a<tool>b<fact>")
    assert "<tool>" in again.all_special_tokens


@pytest.mark.parametrize("new_tokens", [[], ["<fact>"]])
def test_every_named_template_survives(tmp_path: Path, new_tokens: list[str]) -> None:
    """In the adapter where it has a tokenizer, in the merged model and in its .gguf file."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    templates = {"default": CHATML_TEMPLATE, "tool_use": "{# tools #}" + CHATML_TEMPLATE}
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    base = save_tiny_llama(tmp_path / "base", tokenizer=tokenizer, vocab_size=320)
    directory = merged(base, tmp_path, new_tokens=new_tokens)
    if new_tokens:
        assert AutoTokenizer.from_pretrained(tmp_path / "adapter").chat_template == templates
    assert AutoTokenizer.from_pretrained(directory).chat_template == templates
    export_gguf(str(directory), tmp_path / "model.gguf", "f32", pre_tokenizer="gpt-2")
    fields = GGUFReader(tmp_path / "model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == templates["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == templates["tool_use"]


def test_generation_tags_of_a_gguf_are_plain_jinja(tmp_path: Path) -> None:
    """The same text by plain Jinja as by transformers, whitespace included."""
    import jinja2
    from gguf import GGUFReader

    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['role'] == 'assistant' %}  {%- generation -%}  {{ message['content'] }}<|im_end|>"
        "{% endgeneration %}\n{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    base = save_tiny_llama(tmp_path / "base", tokenizer=tokenizer, vocab_size=320)
    export_gguf(str(base), tmp_path / "model.gguf", "f32", pre_tokenizer="gpt-2")
    written = GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(written).render(messages=messages)
    assert plain == tokenizer.apply_chat_template(messages, tokenize=False)
