"""Launching: docs/distributed.md's commands are read by the launchers' own parsers; one runs with -m full."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from tests.docs.pages import commands
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
PROCESSES = {"cpu": (1, 2), "gpus-2": (1, 2), "gpus-8": (1, 8), "nodes-2x8": (2, 16)}  # machines, processes
COMMANDS = [line for line in commands(ROOT / "docs" / "distributed.md") if not line.startswith("export ")]


def launched(words: list[str]) -> tuple[Any, list[str]]:
    """What the launcher's parser makes of a command, and the script's own flags."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(words[1:])
    else:
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser

        parsed = launch_command_parser().parse_args(words[2:])
        parsed, *_ = _validate_launch_command(parsed)
    assert parsed.training_script == "train.py"
    return parsed, parsed.training_script_args


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.distributed_type == "MULTI_GPU"
    assert (config.num_machines, config.num_processes) == PROCESSES[path.stem]
    assert config.mixed_precision == "no" and set(yaml.safe_load(path.read_text())) <= set(vars(config))
    header = " ".join(line[1:].rstrip("\\") for line in path.read_text().splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file configs/accelerate/{path.name} " in " ".join(header.split())


def test_every_config_is_known() -> None:
    assert [path.stem for path in CONFIGS] == sorted(PROCESSES)


@pytest.mark.parametrize("command", COMMANDS)
def test_launchers_read_the_page_s_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "sbatch":
        words = script_command(words)
    parsed, flags = launched(words)
    config = parse_args(RunConfig, "train.py", flags)
    assert config.model.model == "M" and config.data.data == ["train.jsonl"] and config.saving.output_dir == "out"
    if "--config_file" in words:
        machines, processes = PROCESSES[Path(parsed.config_file).stem]
        assert (parsed.num_machines, parsed.num_processes, parsed.multi_gpu) == (machines, processes, True)


def script_command(words: list[str]) -> list[str]:
    """The torchrun command of a Slurm script, its variables filled in."""
    subprocess.run(["bash", "-n", words[1]], check=True)
    text = (ROOT / words[1]).read_text().replace("\\\n", " ").rstrip()
    last = text.splitlines()[-1].partition("torchrun ")[2]
    last = last.replace("$SLURM_JOB_NUM_NODES", "2").replace("$SLURM_JOB_ID", "7").replace("$first", "node1")
    return ["torchrun", *shlex.split(last.replace('"$@"', shlex.join(words[2:])), comments=True)]


def test_the_page_shows_every_config_and_script() -> None:
    assert len(COMMANDS) >= 8
    page = (ROOT / "docs" / "distributed.md").read_text()
    for name in ("cpu.yaml", "gpus-8.yaml", "nodes-2x8.yaml", "train.sbatch"):
        assert name in page


@pytest.mark.full
def test_accelerate_trains_with_the_cpu_config(tmp_path: Path) -> None:
    """The page's first command as it stands, shortened."""
    save_tiny_llama(tmp_path / "M", tokenizer=tiny_tokenizer())
    rows = [{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("train.py", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = shlex.split(COMMANDS[0])
    assert words[:4] == ["accelerate", "launch", "--config_file", "configs/accelerate/cpu.yaml"]
    port = ["--main_process_port", "0"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *port, *words[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, "--max-steps", "1", "--compute-dtype", "float32"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["facts"]
    assert facts["num_processes"] == 2


def test_a_run_that_is_done_leaves_its_process_group(tmp_path: Path) -> None:
    """Left to the interpreter's end, its threads now and then abort a process whose work is done."""
    code = (
        "import sys; from qlora.cli.exits import run; import torch.distributed as d;"
        "d.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=0, world_size=1);"
        "assert run(lambda argv: None, []) == 0 and not d.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store")], cwd=ROOT, check=True)
