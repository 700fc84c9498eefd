"""config/ and the entry points: every flag, the YAML file below it, and what a wrong one says."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from qlora.cli import main as command_line
from qlora.cli.exits import run
from qlora.config.data import DataConfig
from qlora.config.lora import LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.parse import _OURS, ALIASES, _field_names, config_file_flags, parse_args
from qlora.config.run import RunConfig
from qlora.config.saving import SavingConfig
from qlora.config.watching import WatchingConfig
from qlora.system.errors import InputError, StoppedOnRequest, TrainingStopped
from tests import fork_server

REPOSITORY = Path(train.__file__).parent
# Every flag that DESIGN.md promises to outsiders: (arguments, section, field, value).
FLAGS: list[tuple[list[str], str, str, Any]] = [
    (["--model", "huggyllama/llama-7b"], "model", "model", "huggyllama/llama-7b"),
    (["--use-4bit"], "model", "use_4bit", True),
    (["--no-4bit"], "model", "use_4bit", False),
    (["--compute-dtype", "float32"], "model", "compute_dtype", "float32"),
    (["--rank", "4"], "lora", "rank", 4),
    (["--alpha", "32"], "lora", "alpha", 32.0),
    (["--dropout", "0.1"], "lora", "dropout", 0.1),
    (["--adapter-dtype", "float32"], "lora", "adapter_dtype", "float32"),
    (["--target-modules", "all-linear"], "lora", "target_modules", ["all-linear"]),
    (["--data", "a.jsonl"], "data", "data", ["a.jsonl"]),
    (["--data", "a,b", "--data-weights", "1,0.3"], "data", "data_weights", [1.0, 0.3]),
    (["--columns", "prompt=a,completion=b"], "data", "columns", {"prompt": "a", "completion": "b"}),
    (["--chat-template", "a.jinja"], "data", "chat_template", "a.jinja"),
    (["--no-token-cache"], "data", "token_cache", False),
    (["--eval-data", "b.jsonl"], "data", "eval_data", "b.jsonl"),
    (["--max-length", "77"], "data", "max_length", 77),
    (["--packing"], "data", "packing", True),
    (["--no-packing"], "data", "packing", False),
    (["--output-dir", "elsewhere"], "saving", "output_dir", "elsewhere"),
    (["--max-steps", "5"], "loop", "max_steps", 5),
    (["--epochs", "2"], "loop", "epochs", 2),
    (["--batch-size", "3"], "loop", "batch_size", 3),
    (["--grad-accum", "6"], "loop", "grad_accum", 6),
    (["--learning-rate", "1e-5"], "optimizer", "learning_rate", 1e-5),
    (["--schedule", "constant"], "optimizer", "schedule", "constant"),
    (["--warmup-steps", "0"], "optimizer", "warmup_steps", 0),
    (["--seed", "7"], "loop", "seed", 7),
    (["--gradient-checkpointing", "on"], "loop", "gradient_checkpointing", "on"),
    (["--gradient-checkpointing", "off"], "loop", "gradient_checkpointing", "off"),
    (["--gradient-checkpointing", "auto"], "loop", "gradient_checkpointing", "auto"),
    (["--optim", "paged_adamw_8bit"], "optimizer", "optim", "paged_adamw_8bit"),
    (["--eval-every", "9"], "watching", "eval_every", 9),
    (["--save-every", "8"], "saving", "save_every", 8),
    (["--resume", "auto"], "saving", "resume", "auto"),
    (["--sample-every", "5"], "watching", "sample_every", 5),
    (["--num-samples", "0"], "watching", "num_samples", 0),
    (["--sample-prompts", "p.jsonl"], "watching", "sample_prompts", "p.jsonl"),
    (["--report-to", "tensorboard,wandb"], "watching", "report_to", ["tensorboard", "wandb"]),
    (["--run-name", "first"], "watching", "run_name", "first"),
    (["--best-metric", "exact_match"], "watching", "best_metric", "exact_match"),
    (["--score-match", "gsm8k"], "watching", "score_match", "gsm8k"),
    (["--early-stopping-patience", "3"], "watching", "early_stopping_patience", 3),
    (["--early-stopping-min-delta", "0.01"], "watching", "early_stopping_min_delta", 0.01),
    (["--load-best"], "saving", "load_best", True),
    (["--adapter", "out"], "generate", "adapter", "out"),
    (["--prompt", "Who are you?"], "generate", "prompt", "Who are you?"),
    (["--max-new-tokens", "12"], "generate", "max_new_tokens", 12),
    (["--temperature", "0.7"], "generate", "temperature", 0.7),
]
# One value outside the range of every field that has one.
OUT_OF_RANGE = [
    ("rank", "0"), ("alpha", "0"), ("alpha", "-1"), ("dropout", "1"), ("dropout", "-0.1"), ("max_length", "1"),
    ("eval_split", "-0.1"), ("eval_split", "1"), ("max_steps", "-1"), ("epochs", "0"), ("batch_size", "0"),
    ("grad_accum", "0"), ("learning_rate", "0"), ("warmup_steps", "-1"), ("weight_decay", "-0.1"),
    ("max_grad_norm", "-1"), ("eval_every", "-1"), ("save_every", "-1"), ("seed", "-1"), ("max_new_tokens", "0"),
    ("temperature", "-0.5"), ("top_p", "0"), ("top_p", "1.1"), ("sample_every", "-1"), ("num_samples", "-1"),
    ("sample_tokens", "0"), ("score_examples", "-1"), ("early_stopping_patience", "-1"),
    ("early_stopping_min_delta", "-0.1"),
]  # fmt: skip
FRACTIONS = (
    "alpha dropout eval_split learning_rate weight_decay max_grad_norm temperature early_stopping_min_delta"
)
NOT_A_NUMBER = [
    (name, value)
    for name in FRACTIONS.split()
    for value in ("nan", "inf")
    if (name, value) != ("max_grad_norm", "inf")  # a way to say: never clip
]
WRONG_CHOICE = [
    ("quant_type", "nf5"), ("compute_dtype", "float16"), ("adapter_dtype", "float16"), ("init", "zeros"),
    ("on_long", "keep"), ("train_on", "prompt"), ("schedule", "step"), ("optim", "sgd"),
    ("gradient_checkpointing", "maybe"), ("rank", "8.5"), ("rank", "eight"), ("learning_rate", "fast"),
    ("best_metric", "bleu"), ("score_match", "fuzzy"),
]  # fmt: skip


TRAIN = ["--model", "DIR", "--data", "DIR/a.txt"]
SCORED = ["--eval-every", "5", "--eval-split", "0.1", "--best-metric", "exact_match"]


def parse(*argv: str) -> RunConfig:
    return parse_args(RunConfig, "train.py", argv)


def parse_file(tmp_path: Path, text: str, *argv: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(text)
    return parse("--config", str(tmp_path / "run.yaml"), *argv)


def exit_code(main: Callable[[Sequence[str]], None], *argv: str) -> int | str | None:
    """What `python FILE ARGV` exits with: ours through `run`, or the command-line library's own."""
    try:
        return run(main, argv)
    except SystemExit as error:
        return error.code


def plain(text: str) -> str:
    """Standard error without the box that the command-line library draws, in one line."""
    return " ".join(re.sub(r"[│─╭╮╰╯|+]|-{5,}", " ", text).split())


def defaults() -> dict[str, Any]:
    config = RunConfig()
    sections = [getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "debug"]
    return {name: value for section in sections for name, value in vars(section).items()}


# ---- flags ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "section", "name", "value"), FLAGS, ids=lambda x: x[0] if type(x) is list else ""
)
def test_every_promised_flag(argv: list[str], section: str, name: str, value: Any) -> None:
    """It lands in its field with its type, and nothing else moves."""
    config = parse(*argv)
    actual = getattr(getattr(config, section), name)
    assert actual == value and type(actual) is type(value)
    for field_name in {name} | {"data"} & {flag[2:] for flag in argv}:  # weights are of --data
        setattr(getattr(config, section), field_name, getattr(getattr(RunConfig(), section), field_name))
    assert config == RunConfig()


def test_no_flags_give_the_defaults() -> None:
    assert parse() == RunConfig()
    assert RunConfig().model.use_4bit and LoRAConfig().target_modules == ["q_proj", "v_proj"]


def test_equals_sign_and_underscores() -> None:
    config = parse("--max_length=99", "--learning-rate=1e-3", "--use_4bit")
    assert (config.data.max_length, config.optimizer.learning_rate, config.model.use_4bit) == (99, 1e-3, True)


def test_target_modules_are_split_and_stripped() -> None:
    for names in (" q_proj, k_proj ,", ["q_proj", "k_proj"], ("q_proj", "k_proj")):
        assert LoRAConfig(target_modules=names).target_modules == ["q_proj", "k_proj"]  # type: ignore[arg-type]
    unordered: Any = {"q_proj", "k_proj"}
    assert LoRAConfig(target_modules=unordered).target_modules == ["k_proj", "q_proj"]


def test_a_name_is_in_one_class_only() -> None:
    """Flags are flat: the same name twice would be two flags with one spelling."""
    names = [
        item.name
        for section in dataclasses.fields(RunConfig)
        if section.name != "debug"
        for item in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    ]
    assert len(names) > 30 and len(names) == len(set(names))


def test_help_names_every_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        parse("--help")
    assert exited.value.code == 0
    text = plain(capsys.readouterr().out)
    missing = [name for name in defaults() if f"--{name.replace('_', '-')}" not in text]
    assert defaults() and not missing
    assert "(default: 0.0002)" in text and "(default: q_proj,v_proj)" in text and "--config" in text


# ---- wrong values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2; the message has the field, the value and what to give."""
    flag = f"--{name.replace('_', '-')}"
    assert exit_code(train.main, f"{flag}={value}") == 2
    error = plain(capsys.readouterr().err)
    assert re.search(rf"\b{name} is {re.escape(str(float(value)))}|\b{name} is {re.escape(value)}", error), error
    assert f"give {flag}" in error


@pytest.mark.parametrize(("name", "value"), NOT_A_NUMBER)
def test_nan_and_infinity(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """nan passes every `x < low` check; neither is a setting."""
    assert exit_code(train.main, f"--{name.replace('_', '-')}={value}") == 2
    assert f"{name} is {value}" in plain(capsys.readouterr().err)


@pytest.mark.parametrize(("name", "value"), WRONG_CHOICE)
def test_wrong_type_or_choice(name: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = f"--{name.replace('_', '-')}"
    assert exit_code(train.main, flag, value) == 2
    error = plain(capsys.readouterr().err)
    assert flag in error and value in error


def test_unknown_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(train.main, "--learning-rte", "1e-3") == 2
    assert "--learning-rate" in plain(capsys.readouterr().err)


@pytest.mark.parametrize(
    "bad", [dict(adapter_dtype="float16"), dict(init="zeros"), dict(rank=0), dict(dropout=1.0)]
)
def test_library_users_get_the_same_checks(bad: dict[str, Any]) -> None:
    """LoRAConfig is made from Python too, past the command line's check of choices."""
    with pytest.raises(InputError, match=next(iter(bad))):
        LoRAConfig(**bad)


# ---- patterns and layer ranges ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        (" ", {}),
        ("q_proj=4", {"q_proj": 4}),
        (" q_proj=4 , layers.0.mlp.up_proj=16", {"q_proj": 4, "layers.0.mlp.up_proj": 16}),
        (r"layers\.(0|1)\..*=2,v_proj=3", {r"layers\.(0|1)\..*": 2, "v_proj": 3}),
        ({"q_proj": 4, "v_proj": 2.0}, {"q_proj": 4, "v_proj": 2}),
    ],
)
def test_patterns(text: Any, expected: dict[str, int]) -> None:
    config = LoRAConfig(rank_pattern=text, alpha_pattern=text)
    assert config.rank_pattern == config.alpha_pattern == expected
    assert all(type(rank) is int for rank in config.rank_pattern.values())
    again = LoRAConfig(rank_pattern=config.rank_pattern)
    assert again.rank_pattern == expected


@pytest.mark.parametrize(
    "text",
    [
        "q_proj", "=4", "q_proj=", "q_proj=x", "q_proj=0", "q_proj=-1", "q_proj=nan", "q_proj=inf", "(=4", "*=4",
        "(a+)+=4", "(a|a)*=4", "(.*)*x=4", "a?a?a?a?a?=4", ".*.*.*.*.*=4", "a{99999999999999}=4", "x" * 201 + "=4",
        ",".join(f"x{i}=4" for i in range(5000)), "a)|(b=4",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_what_is_no_pattern(name: str, text: str) -> None:
    """Among them the patterns that can take for ever to fail."""
    with pytest.raises(InputError, match=rf"{name} holds .*give --{name.replace('_', '-')} "):
        LoRAConfig(**{name: text})


def test_a_rank_is_whole() -> None:
    with pytest.raises(InputError, match=r"rank_pattern gives q_proj the rank 2\.5; give a whole number"):
        LoRAConfig(rank_pattern="q_proj=2.5")
    assert LoRAConfig(alpha_pattern="q_proj=2.5").alpha_of("model.q_proj") == 2.5


def test_the_worst_pattern_that_is_taken_ends() -> None:
    """Four repeats against a name longer than any model has: polynomial, and asserted by ending at all."""
    config = LoRAConfig(rank_pattern=".*.*.*.*x=4")
    assert config.rank_of("a." * 40) == config.rank


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.q_proj", "q_proj", "model.xq_proj", "m.q_proj.x"],
)
@pytest.mark.parametrize(
    "pattern", ["q_proj", "0.self_attn.q_proj", r"layers\.\d\..*", "layers.1.*", "model.*", "x|q_proj", "proj"]
)
def test_patterns_mean_what_pefts_mean(name: str, pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key([pattern], name) == pattern and name != pattern
    assert (LoRAConfig(rank_pattern={pattern: 99}).rank_of(name) == 99) == (theirs or name == pattern)


@pytest.mark.parametrize(
    ("text", "expected"), [("", []), (" ", []), ("3", [3]), ("0,2,4-7", [0, 2, 4, 5, 6, 7]), ("0009", [9])]
)
def test_layers(text: str, expected: list[int]) -> None:
    assert LoRAConfig(layers=text).layers == expected


@pytest.mark.parametrize("text", ["a", "-1", "3-1", "1-", "1.5", "1;2", "99999", "1-2-3", " 1 - 1"])
def test_what_are_no_layers(text: str) -> None:
    with pytest.raises(InputError, match=r"layers is .*; give --layers numbers and ranges, such as 0,2,4-7"):
        LoRAConfig(layers=text)


def test_scales() -> None:
    """LoRA: alpha / rank; rsLoRA: alpha / sqrt(rank); each with the layer's own."""
    plain = LoRAConfig(rank=16, alpha=8, alpha_pattern="q_proj=2")
    assert plain.scaling_of("a.v_proj", 16) == 0.5 and plain.scaling_of("a.q_proj", 4) == 0.5
    stable = LoRAConfig(rank=16, alpha=8, alpha_pattern="q_proj=2", use_rslora=True)
    assert stable.scaling_of("a.v_proj", 16) == 2 and stable.scaling_of("a.q_proj", 4) == 1


# ---- the YAML file ----------------------------------------------------------------------------------------


def test_file_values(tmp_path: Path) -> None:
    """Numbers, words, booleans, lists and either spelling of a name; what YAML reads as text is still a number."""
    text = """
        model: some/model
        rank: 4
        alpha: 32
        use_4bit: false
        max-length: 128
        packing: true
        target_modules: [q_proj, k_proj]
        learning_rate: 1e-4     # text to YAML 1.1, which wants 1.0e-4
        resume: null
    """
    config = parse_file(tmp_path, text)
    expected = RunConfig(model=ModelConfig("some/model", use_4bit=False))
    expected.lora = LoRAConfig(rank=4, alpha=32.0, target_modules="q_proj,k_proj")
    expected.data.max_length, expected.optimizer.learning_rate = 128, 1e-4
    assert config == expected
    assert type(config.optimizer.learning_rate) is float and type(config.lora.alpha) is float


def test_command_line_wins(tmp_path: Path) -> None:
    """Over a value, and over a boolean in either direction, wherever --config stands."""
    (tmp_path / "run.yaml").write_text("rank: 4\nuse_4bit: false\npacking: true\nseed: 3\n")
    for argv in (
        ["--rank", "16", "--use-4bit", "--no-packing", "--config", str(tmp_path / "run.yaml")],
        [f"--config={tmp_path / 'run.yaml'}", "--rank", "16", "--use-4bit", "--no-packing"],
    ):
        config = parse(*argv)
        assert (config.lora.rank, config.model.use_4bit, config.data.packing) == (16, True, False)
        assert config.loop.seed == 3


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_file_on_and_off(tmp_path: Path, word: str) -> None:
    """YAML 1.1 reads a bare on or off as a boolean; for this flag they are words."""
    config = parse_file(tmp_path, f"gradient_checkpointing: {word}")
    assert config.loop.gradient_checkpointing == word


@pytest.mark.parametrize("prompt", ["--use-4bit", "-5", "- a list?", "", "two words", "'quoted' \"twice\""])
def test_file_text_is_taken_as_it_is(tmp_path: Path, prompt: str) -> None:
    """A text that looks like a flag is still the text."""
    import yaml

    assert parse_file(tmp_path, yaml.safe_dump({"prompt": prompt})).generate.prompt == prompt


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--lora-r", "8"], "--lora-r is called --rank here"),
        (["--lora_alpha=8"], "--lora_alpha is called --alpha here"),
        (["--per-device-train-batch-size", "2"], "--batch-size here"),
        (["--bf16"], "--bf16 is called --compute-dtype here"),
        (["--optim", "adamw_torch"], "--optim adamw_torch is called adamw here; write --optim adamw"),
        (["--compute-dtype=bf16"], "write --compute-dtype bfloat16"),
        (["--use-4bit", "true"], "--use-4bit takes no value; write --use-4bit"),
        (["--packing=False"], "--packing takes no value; write --no-packing"),
    ],
)
def test_names_of_other_tools_are_answered_with_ours(flags: list[str], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_args(RunConfig, "train", flags)


def test_other_tools_names_lead_to_settings() -> None:
    names = _field_names(RunConfig)
    assert set(ALIASES) <= names.keys() and not {*_OURS} & names.keys()
    assert len(_OURS) == sum(len(aliases.split()) for aliases in ALIASES.values()) > 40


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert parse_file(tmp_path, "# nothing yet\n") == RunConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks: 8", r"unknown key 'ranks'; did you mean rank\?"),
        ("lora:\n  rank: 8", r"'lora' is a section, and there are none here; .* at the left margin, as `rank: "),
        ("train:\n  rank: 8", r"'train' is a section, and there are none here; .* at the left margin, as `rank: "),
        ("train:\nrank: 8", r"run.yaml:1: 'train' has no value and is no setting; remove the line"),
        ("lora_r: 8", r"unknown key 'lora_r'; it is called rank here"),
        ("zzz: 1", r"unknown key 'zzz'; known keys: .*learning_rate.*"),
        ("a: b: c", r"not valid YAML"),
        ("rank: [8", r"not valid YAML"),
        ("[1, 2]", r"holds list; write one `name: value` a line"),
        ("just text", r"holds text alone; write"),
        ("rank: [8]", r"run.yaml:1: rank is a list; write a single value"),
        ("rank: {a: 1}", r"write a single value"),
        ("use_4bit: 1", r"run.yaml:1: use_4bit is 1; write true or false"),
        ("packing: maybe", r"run.yaml:1: packing is 'maybe'; write true or false"),
        ("rank: 8\n\nseed: 1\nrank: 4", r"run.yaml:4: rank was given in line 1 already; remove one of them"),
        ("max-steps: 8\nmax_steps: 4", r"run.yaml:2: max_steps was given in line 1 already"),
        ("seed: 2020-13-45", r"a value that does not exist: month must be"),
        ("seed: " + "9" * 5000, r"a value that does not exist: .*digits"),
        ("[" * 5000, r"not valid YAML"),
        ("data: !!python/object/apply:os.system ['true']", r"not valid YAML: could not determine a constructor"),
        ("data: \x07", r"not valid YAML"),
        ("? [1, 2]\n: 3", r"not valid YAML|unknown key"),
        ("data: !!binary aGk=", r"write a single value"),
    ],
    ids=range(23),
)
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        parse_file(tmp_path, text)
    assert "run.yaml" in str(raised.value)


@pytest.mark.parametrize("text", ["rank: 8.5", "rank: eight", "schedule: step", "rank: -1", "learning_rate: fast"])
def test_wrong_value_in_a_file(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert exit_code(train.main, "--config", str(tmp_path / "run.yaml")) == 2
    name, _, value = text.partition(": ")
    error = plain(capsys.readouterr().err)
    assert re.search(name.replace("_", "[_-]"), error) and value in error


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00rank"])
def test_unreadable_file(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"run\.yaml cannot be read"):
        parse("--config", str(tmp_path / "run.yaml"))


def test_config_without_a_file() -> None:
    with pytest.raises(InputError, match="--config needs a file"):
        parse("--rank", "8", "--config")


# ---- exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (InputError("The value\nis wrong."), 2),
        (FileNotFoundError(2, "No such file", "x.jsonl"), 2),
        (TrainingStopped("The loss is nan at step 3."), 3),
        (StoppedOnRequest("stopped after step 3 of 8 (SIGTERM); --resume auto goes on from there"), 4),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on standard error, nothing on standard output."""

    def main(argv: Sequence[str]) -> None:
        assert argv == ["--rank", "8"]
        if error is not None:
            raise error

    assert run(main, ["--rank", "8"]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == (code != 0)
    if code in (2, 3):
        assert captured.err == f"error: {' '.join(str(error).split())}\n"


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(InputError, match="No model given"):
        run(train.main, ["--debug"])


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes do not match")])
def test_our_own_mistakes_are_not_dressed_up(error: Exception) -> None:
    """A defect keeps its traceback: it is not the user's to mend."""

    def main(argv: Sequence[str]) -> None:
        raise error

    with pytest.raises(type(error)):
        run(main, [])


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory: 8 bytes")],
)
def test_out_of_memory_outside_a_step_is_one_sentence(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> None:
        raise error

    assert run(main, []) == 3
    assert re.fullmatch(r"error: out of memory \(.*\); lower --batch-size .*\n", capsys.readouterr().err)


def test_errors_show_no_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    secret = "hf_" + "aB3" * 12

    def main(argv: Sequence[str]) -> None:
        raise InputError(f"no {secret} at https://me:pass@host/x, correct-horse-battery")

    assert run(main, []) == 2
    said = capsys.readouterr().err
    assert not any(word in said for word in (secret, "pass@", "correct-horse")) and said.count("[redacted]") == 3


@pytest.mark.parametrize(
    ("main", "argv", "message"),
    [
        (train.main, [], "No model given; pass --model"),
        (train.main, ["--model", "DIR"], "Nothing to do; pass --data FILE"),
        (train.main, ["--model", "DIR", "--prompt", "Hi"], "DIR has no config.json"),
        (train.main, ["--model", "DIR/none", "--prompt", "Hi"], "DIR/none does not exist"),
        (train.main, ["--model", "DIR/a.txt", "--prompt", "Hi"], "is a file but no .gguf"),
        (train.main, ["--config", "DIR/none.yaml"], "none.yaml cannot be read"),
        (train.main, [*TRAIN, "--eval-every", "5"], "--eval-every needs held-out data; pass --eval-data FILE, or"),
        (train.main, [*TRAIN, "--load-best"], "--load-best goes by evaluations; pass --eval-every N with it"),
        (train.main, [*TRAIN, "--early-stopping-patience", "1"], "--early-stopping-patience goes by evaluations"),
        (train.main, [*TRAIN, "--best-metric", "exact_match"], "--best-metric goes by evaluations"),
        (train.main, [*TRAIN, *SCORED, "--train-on", "all"], "--best-metric exact_match needs answers apart from"),
        (train.main, [*TRAIN, "--report-to", "wandb"], "--report-to wandb needs a package; pip install wandb."),
        (train.main, [*TRAIN, "--report-to", "paper"], "report_to names 'paper'; give --report-to names of"),
        (command_line.main, ["frobnicate"], "Unknown command 'frobnicate'; choose"),
        (command_line.main, ["merge"], "No adapter given; pass --adapter"),
        (command_line.main, ["merge", "--adapter", "DIR/none"], "DIR/none has no adapter_config.json"),
        (command_line.main, ["merge", "--adapter", "DIR", "--model", "M"], "DIR has no adapter_config.json"),
        (command_line.main, ["merge", "--adapter", "DIR", "--max-shard-gb", "0"], "max_shard_gb is 0.0; give"),
        (command_line.main, ["merge", "--adapter", "DIR", "--max-shard-gb", "nan"], "max_shard_gb is nan; give"),
        (command_line.main, ["train"], "No model given; pass --model"),
    ],
)
def test_wrong_input_is_one_line(
    main: Any, argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert exit_code(main, *(arg.replace("DIR", str(tmp_path)) for arg in argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message.replace("DIR", str(tmp_path)) in captured.err


# ---- as a user would: a process of its own ----------------------------------------------------------------


def python(*argv: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "argv", [["train.py", "--help"], ["-m", "qlora", "--help"], ["-m", "qlora", "merge", "--help"]]
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    """--help answers at once, because torch (seconds) is not loaded; asserted on the modules, not on a clock."""
    result = python("-X", "importtime", *argv)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 0 and "usage:" in result.stdout
    assert "qlora.config" in imported
    assert not imported & {"torch", "transformers", "bitsandbytes", "accelerate", "numpy", "datasets"}


def test_import_qlora_is_instant_and_complete() -> None:
    """`import qlora` loads nothing; every name it advertises is there, among them all of DESIGN.md's."""
    import qlora

    promised = (
        "LoRAConfig LoRAModel get_lora_model load_base_model inject_lora freeze_base unfreeze lora_parameters "
        "base_parameters lora_state_dict load_lora_state_dict save_adapter load_adapter merge_lora unmerge_lora "
        "parameter_summary count_trainable_parameters count_parameters"
    ).split()
    assert set(promised) <= set(qlora.__all__)
    for name in qlora.__all__:
        assert callable(getattr(qlora, name))
    with pytest.raises(AttributeError, match="no attribute 'load_model'"):
        _ = qlora.load_model
    result = python("-c", "import qlora, sys; print('torch' in sys.modules)")
    assert result.stdout == "False\n"


def test_wrong_model_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Exit code 2 and one line, though by then every library has loaded and had its chance to print."""
    out = tmp_path / "out"
    model = str(tmp_path / "no-such-model")
    result = python("train.py", "--model", model, "--data", "x.jsonl", "--output-dir", str(out))
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: --model {model} does not exist; check the path.\n"
    assert not (out / "metrics.jsonl").exists()


def test_no_model_in_a_process_of_its_own() -> None:
    result = fork_server.run([sys.executable, "train.py"], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: No model given") and result.stderr.count("\n") == 1


def test_merge_without_adapter_in_a_process_of_its_own() -> None:
    result = python("-m", "qlora", "merge")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: No adapter given") and result.stderr.count("\n") == 1


def test_defaults_are_in_their_own_range() -> None:
    """Every default passes its own check, and no number among them is nan."""
    numbers = [value for value in defaults().values() if isinstance(value, float)]
    assert numbers and all(math.isfinite(value) for value in numbers)


def test_a_file_that_expands_without_end_is_refused_at_once(tmp_path: Path) -> None:
    """Nine lists of nine references each: 9^9 items if anyone wrote them out."""
    names = "abcdefghi"
    levels = ["&a [x, x, x, x, x, x, x, x, x]"]
    levels += [f"&{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise(names)]
    (tmp_path / "run.yaml").write_text(f"data: [{', '.join(levels)}]")
    with pytest.raises(InputError, match=r"run\.yaml:1: data is a list; write a single value"):
        config_file_flags(str(tmp_path / "run.yaml"), {"data": list})


@settings(max_examples=int(os.environ.get("QLORA_FUZZ", 300)), deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(
            st.tuples(st.sampled_from(["rank", "seed", "packing", "data", "x"]), st.text(max_size=12)), max_size=4
        ).map(lambda pairs: "\n".join(f"{k}: {v}" for k, v in pairs).encode("utf-8", "surrogatepass")),
        st.text(alphabet="[]{}:,-&*!?|>'\"%#\n\t 1a.~", max_size=40).map(str.encode),
    )
)
def test_any_bytes_are_flags_or_one_sentence(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_bytes(content)
        names = {"rank": int, "seed": int, "packing": bool, "data": list}
        try:
            flags = config_file_flags(file.name, names)
        except InputError as error:
            assert str(error).count("\n") == 0
        else:
            assert all(flag.startswith("--") for flag in flags) and len(flags) <= len(names)


@pytest.mark.parametrize(
    ("text", "seconds"), [("45s", 45), ("90m", 5400), ("3h", 10800), ("1h30m", 5400), ("2d", 172800), ("0s", 0)]
)
def test_times(text: str, seconds: int) -> None:
    assert WatchingConfig(stop_after=text).stop_after_seconds == seconds


@pytest.mark.parametrize("text", ["", "3", "h", "-1h", "1.5h", "3 h", "30m1h", "1h\n"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(InputError, match="give --stop-after a time such as 45s, 90m or 1h30m"):
        WatchingConfig(stop_after=text)


def test_forcing_without_resuming_is_refused() -> None:
    with pytest.raises(InputError, match="force_resume is given without resume"):
        SavingConfig(force_resume=True)


def test_sources_weights_and_columns_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "data: [a.jsonl, owner/name]\ndata_weights: [1, 0.3]\ncolumns: {prompt: question, completion: answer}\n"
    )
    data = parse_args(RunConfig, "x", ["--config", str(tmp_path / "run.yaml")]).data
    assert (data.data, data.data_weights) == (["a.jsonl", "owner/name"], [1.0, 0.3])
    assert data.columns == {"prompt": "question", "completion": "answer"}
    (tmp_path / "run.yaml").write_text("data: train.jsonl\ndata_weights: 2\n")
    data = parse_args(RunConfig, "x", ["--config", str(tmp_path / "run.yaml")]).data
    assert (data.data, data.data_weights) == (["train.jsonl"], [2.0])
    python = DataConfig(data=["a", "b"], data_weights=[1, 2], columns={"text": "body"})
    assert (python.data, python.data_weights, python.columns) == (["a", "b"], [1.0, 2.0], {"text": "body"})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt=a, completion=b,c=d", {"prompt": "a", "completion": "b", "c": "d"}),
        ("prompt=a,b=c=d", {"prompt": "a", "b": "c=d"}),
        ("prompt=a,b", {"prompt": "a,b"}),
        ("", {}),
    ],
)
def test_columns_may_hold_commas_and_equals_signs(text: str, expected: dict[str, str]) -> None:
    assert DataConfig(columns=text).columns == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"data_weights": "1,x"}, "data_weights is '1,x'; give --data-weights numbers"),
        ({"columns": "prompt"}, "columns holds 'prompt'; give --columns name=column"),
        ({"columns": "=a"}, "columns holds '=a'"),
        ({"columns": "prompt="}, "columns holds 'prompt='"),
        ({"columns": "prompt=a,prompt=b"}, "columns holds 'prompt=b'; .* each name once"),
    ],
)
def test_bad_weights_and_columns(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        DataConfig(**settings)
