"""A newcomer's path: the commands of the README and of docs/ run as written, page by page, in their order."""

from __future__ import annotations

import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import save_file
from tokenizers import pre_tokenizers

from eval.__main__ import main as evaluate
from examples.orders import write_task
from tests import fork_server
from tests.adapters.test_fused_formats import minimind_state
from tests.adapters.test_other_formats import (
    LAYERS,
    hf_model,
    random_factors,
    round_to_bf16,
    write_mlx,
    write_torchtune,
)
from tests.docs.pages import LOG, PAGES, commands, name_of
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
# Beginnings of commands that are not run here, and why.
NOT_RUN = {
    "make": "CI and the tests themselves are what it runs",
    "pip": "installs",
    "python -m venv": "installs",
    ". .venv": "needs a shell",
    "head": "only shows a file",
    **dict.fromkeys(
        ("vllm", "curl", "python -m sglang", "transformers", "text-generation-launcher", "llama-", "ollama"),
        "belongs to another project; tests/docs/test_serving.py checks what it reads",
    ),
    **dict.fromkeys(
        ("accelerate launch --config_file", "torchrun", "sbatch", "export"),
        "needs several devices or machines; tests/several_processes/test_launch.py has the launchers read it",
    ),
    "python -m qlora push": "uploads; tests/export/test_hub.py runs it against a hub on loopback",
    "python -m benchmarks": "measures for minutes; tests/benchmarks/test_benchmarks.py runs them small",
    "python -m tools": "proves for minutes; their tests run them small",
}
# Pages whose commands run here, and how many; of the others every command is named in NOT_RUN.
RUN = {
    "README.md": 7, "docs/adapters.md": 5, "docs/calibration.md": 1, "docs/chat.md": 4, "docs/data.md": 2,
    "docs/evaluation.md": 10, "docs/fidelity.md": 1, "docs/memory.md": 2, "docs/merge-and-export.md": 6,
    "docs/preferences.md": 8, "docs/serving.md": 6, "docs/training.md": 3, "docs/tutorial.md": 16,
}  # fmt: skip
STAND_INS = {  # words of the pages, for what tests cannot reach, or what only stands for something
    "huggyllama/llama-7b": "M",
    "BASE": "M",
    "out/sql": "A",
    "out/chat": "B",
    "sql=out/sql": "sql=A",
    "chat=out/chat": "chat=B",
    "chat.jsonl,code/*.jsonl,owner/name": "chat.jsonl,code/*.jsonl,train.jsonl",
    "configs/llama-13b.yaml": "configs/llama-13b.yaml --model configs/shapes/llama-13b",
    "arc_easy,my_task.yaml": "my_task.yaml",
    "OUTPUT_DIR": "out",
    "smollm2.gguf": "M",
    "books.jsonl": "train.jsonl",
    "keys/sft.jsonl": "train.jsonl",
    "keys/pairs_80.jsonl": "pairs.jsonl",
    "keys/test_pairs.jsonl": "pairs.jsonl",
    "keys/test.jsonl": "test.jsonl",
}
TINY_STEPS = ["--max-steps", "2"]
TINY_ANSWERS = ["--max-new-tokens", "8"]


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if command.startswith(start)), None)


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one in the working directory; Python's in this process, for each start would take seconds.

    What an earlier command has written where this one is to write is removed, unless this one resumes there.
    """
    known = {} if "--link-model" in command else STAND_INS
    words = [part for word in shlex.split(command) for part in (known[word].split() if word in known else [word])]
    trains = "train.py" in words and "--prompt" not in words
    outputs = [value for flag, value in pairwise(words) if flag.startswith("--output")]
    for output in map(Path, outputs or ["out"] * trains):
        if output.exists() and "--resume" not in words:
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    if "--modelfile" in words:
        Path("Modelfile").unlink(missing_ok=True)
    if words[0] == "accelerate":
        launch = [sys.executable, *fork_server.LAUNCHER, "-m", "accelerate.commands.accelerate_cli"]
        fork_server.run([*launch, *words[1:], *TINY_STEPS], check=True, timeout=300, capture_output=True)
        return
    assert words[0] == "python", f"the test cannot run {command}"
    if words[1].startswith("examples/") or words[2].startswith("examples."):
        script = words[1] if words[1] != "-m" else f"{words[2].replace('.', '/')}.py"
        monkeypatch.setattr(sys, "argv", words[1:] if words[1] != "-m" else words[2:])
        runpy.run_path(script, run_name="__main__")
        return
    doors = {"qlora": "qlora.cli.main", "eval": "eval.__main__"}
    in_package = words[1] == "-m"
    module = doors.get(words[2], f"{words[2]}.__main__") if in_package else "train"
    arguments = words[3:] if in_package else words[2:]
    answers = {"chat", "exact_match", "compare"} & set(words[:4]) and "--results" not in words
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    importlib.import_module(module).main(
        [*arguments, *(TINY_STEPS if trains else TINY_ANSWERS if answers else [])]
    )


def write_questions(directory: Path) -> None:
    """The data files that the README's evaluations name."""
    texts = [f"{number} and {number} are how many?" for number in range(8)]
    mmlu = [{"question": t, "choices": [*"0123"], "answer": 1, "subject": "sums"} for t in texts]
    arc = [
        {"question": t, "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "A"} for t in texts
    ]
    sums = [{"question": text, "answer": f"#### {2 * number}"} for number, text in enumerate(texts)]
    pairs = [{"prompt": text, "chosen": f"{number}", "rejected": "many"} for number, text in enumerate(texts * 4)]
    rows = {"mmlu_test": mmlu, "mmlu_dev": mmlu, "arc": arc, "arc_train": arc * 4, "gsm8k": sums, "held_out": sums}
    (directory / "code").mkdir()
    for name, content in {**rows, "chat": sums, "code/sums": sums, "pairs": pairs}.items():
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (directory / "book.txt").write_text("It was a dark and stormy night. " * 20)
    task = {
        "task": "my_task", "dataset_path": "json", "dataset_kwargs": {"data_files": str(directory / "arc.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices.text}}", "doc_to_target": 0,
    }  # fmt: skip
    (directory / "my_task.yaml").write_text(json.dumps(task))  # JSON is YAML


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with what the README's commands name: M, train.jsonl, adapters A and B, ..."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "configs", "examples", "README.md"):
        (directory / name).symlink_to(ROOT / name)
    tokenizer = tiny_tokenizer()  # that splits text in a way llama.cpp has
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model = round_to_bf16(save_tiny_llama(directory / "M", tokenizer=tokenizer))
    train, test = write_task(directory, num_train=24, num_test=4)
    assert train == directory / "train.jsonl" and test == directory / "test.jsonl"
    write_questions(directory)
    factors = random_factors(hf_model(model), LAYERS)
    write_mlx(directory / "MLX_ADAPTER", factors, dora=False)
    write_torchtune(directory / "TUNED", factors, dora=False)
    save_file(minimind_state()[0], directory / "lora_medical.safetensors")
    from qlora import LoRAConfig, get_lora_model, load_base_model

    for name in ("A", "B", "other", "out"):
        get_lora_model(load_base_model(str(model)), LoRAConfig(), base_name=str(model)).save(directory / name)
    for name in ("before", "after"):
        measured = [
            "exact_match",
            "--model",
            str(model),
            "--data",
            str(test),
            "--output",
            f"{directory / name}.json",
        ]
        evaluate([*measured, *TINY_ANSWERS])
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) in RUN], ids=name_of)
def test_the_commands_of_a_page(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run = 0
    for command in commands(page):
        if reason_not_to_run(command) is None:
            print(f"$ {command}")
            run_command(command, monkeypatch)
            run += 1
    assert run == RUN[name_of(page)]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "number"), [("README.md", 2), ("docs/adapters.md", 1)])
def test_the_python_of_a_page(page: str, number: int, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks as a reader types them, the path replaced; docs/qlora.md has its own test."""
    monkeypatch.chdir(workspace)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == number
    names: dict[str, object] = {}
    for block in blocks:
        for output in ("out", "merged"):  # of earlier commands
            shutil.rmtree(output, ignore_errors=True)
        for name, adapter in (("out/sql", "A"), ("out/chat", "B")):
            shutil.copytree(adapter, name)
        exec(compile(block.replace("path/to/llama", "M"), page, "exec"), names)
    shutil.copytree("A", "out", dirs_exist_ok=True)  # for the commands of later pages


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=name_of)
def test_no_command_escapes(page: Path) -> None:
    """Every command of a page's blocks is run above, or named with the reason why not."""
    runnable = [command for command in commands(page) if reason_not_to_run(command) is None]
    assert len(runnable) == RUN.get(name_of(page), 0), runnable
