"""A newcomer's path: the commands of the README and of docs/ run as they stand there, in their order."""

from __future__ import annotations

import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers

from examples.orders import write_task
from tests.models import save_tiny_llama
from tests.test_foreign import LAYERS, hf_model, random_factors, round_to_bf16, write_mlx, write_torchtune
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parent.parent
# Beginnings of the commands that are not run here, and why.
NOT_RUN = {
    "make": "CI and the tests themselves are what it runs",
    "pip": "installs",
    "python -m qlora push": "uploads; tests/test_hub.py runs it against a stand-in",
    "python -m benchmarks": "measures for minutes; tests/test_benchmarks.py runs them small",
}
STAND_INS = {"huggyllama/llama-7b": "M"}  # hub ids, which tests cannot reach
TINY_STEPS = ["--max-steps", "2"]


def commands(document: Path) -> list[str]:
    """The commands in a page's `sh` blocks, one a line, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if re.match(rf"{re.escape(start)}\b", command)), None)


def run_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one in the working directory; Python's in this process, for each start would take seconds.

    What an earlier command has written where this one is to write is removed, unless this one resumes there.
    """
    words = [STAND_INS.get(word, word) for word in shlex.split(command)]
    trains = "train.py" in words and "--prompt" not in words
    outputs = [value for flag, value in pairwise(words) if flag.startswith("--output")]
    for output in map(Path, outputs or ["out"] * trains):
        if output.exists() and "--resume" not in words:
            shutil.rmtree(output) if output.is_dir() else output.unlink()
    if words[0] == "accelerate":
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:], *TINY_STEPS]
        subprocess.run(launch, check=True, timeout=300, capture_output=True)
        return
    assert words[0] == "python", f"the test cannot run {command}"
    module, arguments = (f"{words[2]}.__main__", words[3:]) if words[1] == "-m" else (words[1][:-3], words[2:])
    main = importlib.import_module(module.replace("/", ".")).main
    monkeypatch.setattr(sys, "argv", [words[1], *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/quit\n"))
    main(*([] if words[1].startswith("examples/") else [[*arguments, *(TINY_STEPS if trains else [])]]))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with what the README's commands name: M, train.jsonl, adapters A and B, ..."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "configs", "examples"):
        (directory / name).symlink_to(ROOT / name)
    tokenizer = tiny_tokenizer()  # that splits text in a way llama.cpp has
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    model = round_to_bf16(save_tiny_llama(directory / "M", tokenizer=tokenizer))
    train, test = write_task(directory, num_train=24, num_test=4)
    assert train == directory / "train.jsonl" and test == directory / "test.jsonl"
    factors = random_factors(hf_model(model), LAYERS)
    write_mlx(directory / "MLX_ADAPTER", factors, dora=False)
    write_torchtune(directory / "TUNED", factors, dora=False)
    from qlora import LoRAConfig, get_lora_model, load_base_model

    for name in ("A", "B"):
        get_lora_model(load_base_model(str(model)), LoRAConfig(), base_model=str(model)).save(directory / name)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md"])
def test_the_commands_of_a_page(page: str, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run = 0
    for command in commands(ROOT / page):
        if reason_not_to_run(command) is None:
            print(f"$ {command}")
            run_command(command, monkeypatch)
            run += 1
    assert run > 5
