"""docs/flags.md is what the config says, and every flag that a page names exists."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import train
from docs.flags import NONE, PAGE, Flag, flags_of, flags_page, groups, show_type, show_value
from eval.__main__ import COMMANDS as EVALUATIONS
from eval.__main__ import main as evaluate
from qlora.cli.main import main
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from tests.docs.pages import LOG, PAGES, ROOT, code_spans, commands, name_of

COMMANDS = ("chat", "plan", "merge", "mix", "check-data", "import", "inspect", "export", "push", "report")
OUR_COMMAND = re.compile(r"(?:python |qlora |accelerate |torchrun |sbatch |plan |train\.py|--)")
# Flags on the pages that belong to other programs: launchers, servers, torchrun, tests and benchmarks.
OTHERS = re.compile(
    r"python -m (?:benchmarks|examples|tools|docs|sglang|pytest)|python examples/|pytest|accelerate config"
)
LAUNCHERS = {
    "--config_file", "--machine_rank", "--main_process_ip", "--master_port", "--max-restarts", "--multi_gpu",
    "--nnodes", "--nproc_per_node", "--num_processes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id",
    "--standalone", "--kill-on-bad-exit",
}  # fmt: skip
SERVERS = {"--quantization", "--enable-lora", "--lora-modules", "--max-lora-rank"}  # vLLM's, on docs/serving.md
BENCHMARKS = {"--only", "--dtype", "--peers", "--rounds", "--seeds"}  # on the pages about benchmarks


def all_flags() -> list[Flag]:
    return [flag for group in groups(RunConfig) for flag in flags_of(group)]


def test_the_page_is_what_the_command_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run python -m docs.flags"


def test_the_page_has_every_setting_and_the_parser_every_flag() -> None:
    def names(settings: dict[str, Any]) -> Iterator[str]:
        for name, value in settings.items():
            yield from names(value) if isinstance(value, dict) and value else (name,)

    rows = [re.findall(r"--[a-z0-9-]+", flag.name) for flag in all_flags()]
    assert [row[0] for row in rows] == [f"--{name.replace('_', '-')}" for name in names(asdict(RunConfig()))]
    shown = set(re.findall(r"--[a-z0-9][a-z0-9-]*", help_text(train.main)))
    assert len(rows) > 80 and {name for row in rows for name in row} - shown <= {"--no-4bit"}


def test_the_parser_takes_every_default_as_it_is_written() -> None:
    """All flags at once, then every switch the other way."""
    given, switches = [], []
    for flag in all_flags():
        name, *other = re.findall(r"--[a-z0-9-]+", flag.name)
        if other:
            is_on = flag.default == "`on`"
            given.append(name if is_on else other[0])
            switches.append(other[0] if is_on else name)
        elif flag.default != NONE:
            given.append(f"{name}={flag.default.strip('`')}")
    assert len(given) > 60 and len(switches) > 12
    assert parse_args(RunConfig, "train.py", given) == RunConfig()
    together = {"--use-adalora", "--cpu-offload", "--sequence-parallel", "--force-resume"}  # need other flags
    config = parse_args(RunConfig, "train.py", [name for name in switches if name not in together])
    assert not config.model.use_4bit and config.lora.use_dora and not config.data.packing


def test_values_and_defaults_are_written_as_they_are_typed() -> None:
    shown = [show_value(value) for value in (None, "", True, False, 0, 1.0, "a", ["a", "b"], {"a": 1})]
    assert shown == [NONE, NONE, "`on`", "`off`", "`0`", "`1.0`", "`a`", "`a,b`", "`a=1`"]
    types = [show_type(kind) for kind in (int, str | None, list[str], dict[str, int])]
    assert types == ["integer", "text", "list", "name=value list"]


def test_writing_the_page_imports_no_torch() -> None:
    code = "import sys, docs.flags as f; f.flags_page(); print('torch' in sys.modules, 'tyro' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def help_text(command: Callable[[Sequence[str]], None], *words: str) -> str:
    """What a command's --help prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        command([*words, "--help"])
    return text.getvalue()


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """The flags of all commands, from their help pages."""
    pages = [help_text(train.main), *(help_text(main, name) for name in COMMANDS)]
    pages += [help_text(evaluate, name) for name in EVALUATIONS]
    return {*re.findall(r"--[a-z0-9][a-z0-9-]*", "".join(pages)), "--no-4bit", "--config", "--version"}


@pytest.mark.parametrize("page", [page for page in PAGES if page != LOG], ids=name_of)
def test_the_flags_that_a_page_names_exist(page: Path, known_flags: set[str]) -> None:
    """In commands of this project and in code spans; other programs' flags are listed above."""
    assert len(known_flags) > 120
    others = LAUNCHERS | (SERVERS if page.stem == "serving" else set())
    others |= BENCHMARKS if page.stem in ("benchmarks", "distributed", "fidelity") else set()
    for code in (*commands(page), *code_spans(page)):
        if OUR_COMMAND.match(code) and not OTHERS.match(code):
            named = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*", code))
            assert named <= known_flags | others, code
