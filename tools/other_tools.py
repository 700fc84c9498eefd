"""Trained tokens of one row of each shape, here and in other tools; the table in docs/data.md.

    python -m tools.other_tools ours
    pip install --no-deps --target T trl==1.16.0
    PYTHONPATH=T python -m tools.other_tools trl

and so on, for `mlx` with mlx-lm 0.32.2, mlx and mlx-cpu 0.32.4; for `llama_factory` with llamafactory 0.9.5,
omegaconf and antlr4-python3-runtime 4.9.3; for `axolotl` with axolotl 0.19.0, addict, fire, colorama, termcolor,
python-dotenv, art and axolotl-contribs-lgpl. Each prints a line for each row, with targets between ⟦ and ⟧.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import sys
import tempfile
import types
from collections.abc import Callable
from itertools import groupby
from typing import Any

from tests.data.test_chat_template import HERMES
from tests.data.test_keys import QWEN3
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

Row = tuple[list[int], list[bool]]  # ids, whether each is a target


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


CALL = {"name": "add", "arguments": {"x": 1}}
TOOL = {"name": "add", "description": "d", "parameters": {"type": "object", "properties": {}}}
CALLING = [_user("q"), _answer("", tool_calls=[{"type": "function", "function": CALL}])]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(CALL)}]
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": [_user("q"), _answer("a"), _user("r"), _answer("b")]}, CHATML_TEMPLATE),
    "thought": ({"messages": [_user("q"), _answer("a", reasoning_content="t")]}, QWEN3),
    "tool calls": (
        {"messages": [*CALLING, {"role": "tool", "content": "2"}, _answer("a")],
         "tools": [{"type": "function", "function": TOOL}]},
        HERMES,
    ),
    "ShareGPT, system": (
        {"conversations": [SHAREGPT[0], {"from": "gpt", "value": "a"}], "system": "S"}, CHATML_TEMPLATE,
    ),
    "ShareGPT, function_call": (
        {"conversations": [*SHAREGPT, {"from": "observation", "value": "2"}, {"from": "gpt", "value": "a"}],
         "tools": json.dumps([TOOL])},
        HERMES,
    ),
    "Alpaca": ({"instruction": "i", "input": "n", "output": "a"}, CHATML_TEMPLATE),
    "Alpaca, no instruction": ({"instruction": "", "input": "n", "output": "a"}, CHATML_TEMPLATE),
    "Alpaca, system, history": (
        {"instruction": "i", "input": "", "output": "a", "system": "S", "history": [["q", "h"]]}, CHATML_TEMPLATE,
    ),
    "prompt": ({"prompt": "p", "completion": "a"}, CHATML_TEMPLATE),
    "prompt of messages": (
        {"prompt": [_user("q"), _answer("h"), _user("p")], "completion": [_answer("a")]}, CHATML_TEMPLATE,
    ),
    "text": ({"text": "once"}, CHATML_TEMPLATE),
    "completion_mask": ({"input_ids": [5, 6, 7, 8], "completion_mask": [0, 0, 1, 1]}, CHATML_TEMPLATE),
}  # fmt: skip


def ours(row: dict[str, Any], tokenizer: Any) -> Row:
    from qlora.data.conversations import to_messages
    from qlora.data.row_encoder import RowEncoder
    from qlora.data.rows import Record

    return RowEncoder(tokenizer).encode_row(to_messages(Record(row, "row")), "completion", "row")


def trl(row: dict[str, Any], tokenizer: Any) -> Row:
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config: dict[str, Any] = {"report_to": "none", "use_cpu": True, "bf16": False, "max_length": None}
    with tempfile.TemporaryDirectory() as directory:
        trainer = SFTTrainer(
            LlamaForCausalLM(LlamaConfig(vocab_size=269, **sizes)),
            args=SFTConfig(output_dir=directory, **config),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        batch = next(iter(trainer.get_train_dataloader()))
    return batch["input_ids"][0].tolist(), [label != -100 for label in batch["labels"][0].tolist()]


def mlx(row: dict[str, Any], tokenizer: Any) -> Row:
    from mlx_lm.tuner.datasets import create_dataset

    is_text = "text" in row  # it has no prompt to mask
    dataset = create_dataset([row], tokenizer, types.SimpleNamespace(mask_prompt=not is_text))
    ids, offset = dataset.process(dataset[0])
    return list(ids), [place >= max(offset, 1) for place in range(len(ids))]


def llama_factory(row: dict[str, Any], tokenizer: Any) -> Row:
    os.environ["DISABLE_VERSION_CHECK"] = "1"
    audio: Any = types.ModuleType("torchaudio")  # imported at its start, not used for text
    audio.__spec__, audio.__version__ = importlib.machinery.ModuleSpec("torchaudio", None), "0"
    sys.modules.setdefault("torchaudio", audio)
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor.supervised import SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    template = {QWEN3: "qwen3", HERMES: "qwen"}.get(tokenizer.chat_template, "chatml")
    arguments, columns = DataArguments(template=template), DatasetAttr("file", "row")
    own = get_template_and_fix_tokenizer(tokenizer, arguments)
    if {"messages", "conversations"} & row.keys():
        columns.formatting, columns.messages = "sharegpt", next(iter(row))
        if "messages" in row:
            columns.role_tag, columns.content_tag, columns.system_tag = "role", "content", "system"
            columns.user_tag, columns.assistant_tag, columns.observation_tag = "user", "assistant", "tool"
    else:
        names = ("instruction", "input", "output") if "output" in row else ("prompt", None, "completion")
        columns.formatting, (columns.prompt, columns.query, columns.response) = "alpaca", names
    for name in ("system", "tools", "history"):
        setattr(columns, name, name if name in row else None)
    read = get_dataset_converter(columns.formatting, columns, arguments)(row)
    processor = SupervisedDatasetProcessor(template=own, tokenizer=tokenizer, processor=None, data_args=arguments)
    parts = {name: read[f"_{name}"] for name in ("prompt", "response", "system", "tools")}
    ids, labels = processor._encode_data_example(**parts, images=[], videos=[], audios=[])
    return ids, [label != -100 for label in labels]


def axolotl(row: dict[str, Any], tokenizer: Any) -> Row:
    from axolotl.prompt_strategies.chat_template import ChatTemplatePrompter, ChatTemplateStrategy

    if not {"messages", "conversations"} & row.keys():
        raise ValueError("another of its prompt strategies reads this shape; not measured")
    names = {"role": "from", "content": "value"} if "conversations" in row else None
    options = {"message_property_mappings": names, "field_messages": next(iter(row))}
    prompter = ChatTemplatePrompter(tokenizer, tokenizer.chat_template, **options)
    roles = ["assistant", "gpt"]
    strategy = ChatTemplateStrategy(prompter, tokenizer, False, 4096, roles_to_train=roles, train_on_eos="turn")
    read = strategy.tokenize_prompt(row)
    return read["input_ids"], [label != -100 for label in read["labels"]]


def show(ids: list[int], is_target: list[bool]) -> str:
    pieces = []
    for trained, run in groupby(zip(ids, [False, *is_target[1:]], strict=True), key=lambda pair: pair[1]):
        text = str(tiny_tokenizer().decode([token for token, _ in run])).replace("\n", "\\n")
        pieces.append(f"⟦{text}⟧" if trained else text)
    return "".join(pieces)


def main(tool: str) -> None:
    encode: Callable[[dict[str, Any], Any], Row] = {
        "ours": ours, "trl": trl, "mlx": mlx, "llama_factory": llama_factory, "axolotl": axolotl,
    }[tool]  # fmt: skip
    for name, (row, template) in ROWS.items():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        try:
            shown = show(*encode(row, tokenizer))
        except Exception as error:  # a tool refuses a shape in its own way
            shown = f"refused: {type(error).__name__}: {' '.join(str(error).split())[:90]}"
        print(f"ROW {name}: {shown[-150:]}")


if __name__ == "__main__":
    main(sys.argv[1])
