"""An Ollama Modelfile for a .gguf file: what it is made of, how a conversation becomes text, where answers end.

Ollama's templates are Go's, not Jinja. A chat template is translated only if it renders a conversation exactly as
one of FORMATS does; otherwise TEMPLATE is left out, and Ollama goes by the chat template inside the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora.data.chat_template import fallback_template
from qlora.export.gguf_vocabulary import stop_ids
from qlora.system.errors import InputError
from qlora.system.files import new_file

# Name -> what each role's turn looks like; an assistant's turn up to its text is also what asks for an answer.
FORMATS = {
    "ChatML": {
        "system": "<|im_start|>system\n{}<|im_end|>\n",
        "user": "<|im_start|>user\n{}<|im_end|>\n",
        "assistant": "<|im_start|>assistant\n{}<|im_end|>\n",
    },
    "Llama 3": {
        "system": "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
        "user": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
        "assistant": "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    },
    "Zephyr": {
        "system": "<|system|>\n{}</s>\n",
        "user": "<|user|>\n{}</s>\n",
        "assistant": "<|assistant|>\n{}</s>\n",
    },
    "Mistral": {"user": "[INST] {} [/INST]", "assistant": "{}</s>"},
    "Mistral v3": {"user": "[INST] {}[/INST]", "assistant": " {}</s>"},
    "plain": {  # tokenize.FALLBACK_TEMPLATE
        "system": "{}\n\n",
        "user": "### Instruction:\n{}\n\n",
        "assistant": "### Response:\n{}[EOS]\n\n",
    },
}


def write_modelfile(gguf: Path, tokenizer: Any, base: str | None = None) -> str | None:
    """Write `Modelfile` beside a .gguf file.

    Args:
        gguf: a model; or an adapter alone, where `base` is the name of the .gguf it is loaded onto.
    Returns:
        Name of the format that its TEMPLATE was translated from, or None where it has none.
    Raises:
        InputError: there is a Modelfile already.
    """
    target = check_modelfile(gguf)
    lines = [f"FROM ./{base or gguf.name}"]
    if base is not None:
        lines.append(f"ADAPTER ./{gguf.name}")
    name, default_system = recognise_format(tokenizer)
    if name is not None:
        lines.append(f'TEMPLATE """{go_template(FORMATS[name], tokenizer.eos_token or "")}"""')
    if default_system and '"""' not in default_system:
        lines.append(f'SYSTEM """{default_system}"""')
    lines += [
        f"PARAMETER stop {json.dumps(tokenizer.convert_ids_to_tokens(end))}" for end in sorted(stop_ids(tokenizer))
    ]
    with new_file(target) as file:
        file.write_text("\n".join(lines) + "\n")
    return name


def check_modelfile(gguf: Path) -> Path:
    """Where the Modelfile of a .gguf file goes.

    Raises:
        InputError: there is one already.
    """
    target = gguf.parent / "Modelfile"
    if target.exists():
        raise InputError(f"{target} exists already; remove it or choose another directory for --output.")
    return target


def recognise_format(tokenizer: Any) -> tuple[str | None, str]:
    """Which of FORMATS the chat template is, by rendering conversations with it.

    Returns:
        (name or None, the system message that the template adds to a conversation without one, or "").
    """
    from jinja2 import TemplateError

    template = tokenizer.chat_template or fallback_template(tokenizer)

    def render(turns: list[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        return text.removeprefix(tokenizer.bos_token or "")  # Ollama adds it as the file says

    exchange = [("user", "one"), ("assistant", "two"), ("user", "three")]
    for name, turns in FORMATS.items():

        def expected(conversation: list[tuple[str, str]], turns: dict[str, str] = turns) -> str:
            text = "".join(turns[role].format(content) for role, content in conversation)
            return (text + turns["assistant"].partition("{}")[0]).replace("[EOS]", tokenizer.eos_token or "")

        try:
            plain, system = render(exchange), [("system", "zero"), *exchange]
            if "system" in turns and render(system) != expected(system):
                continue
            if plain == expected(exchange):
                return name, ""
            before, _, after = turns.get("system", "").partition("{}")
            start, end = len(before), len(plain) - len(after + expected(exchange))
            default = plain[start:end]
            if default and "system" in turns and plain == expected([("system", default), *exchange]):
                return name, default
        except TemplateError:  # it refuses a role
            continue
    return None, ""


def go_template(turns: dict[str, str], eos_token: str) -> str:
    """One exchange in Go's template language: system, user and the beginning of the answer."""
    text = turns["assistant"].replace("{}", "{{ .Response }}")
    for role, variable in (("user", ".Prompt"), ("system", ".System")):
        if role in turns:
            turn = turns[role].replace("{}", "{{ " + variable + " }}")
            text = "{{ if " + variable + " }}" + turn + "{{ end }}" + text
    return text.replace("[EOS]", eos_token)
