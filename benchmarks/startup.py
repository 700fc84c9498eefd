"""Measure seconds from a command to its first result in a fresh process: --help, an answer, a training step.

    python -m benchmarks.startup [--rounds 5] [--model M] [--config configs/demo.yaml]

    help            until the process ends
    first token     --prompt with the quantized base cached, until something is printed
    first step      the demo's training with the quantized base cached, until metrics.jsonl has a line

They take turns, `--rounds` times, after one round that fills the cache and is not counted. Each ratio is the
median over the rounds of (command / `python -c "import torch, transformers"` in the same round), since machines
are shared and drift. CPU seconds are those of all threads until the process ends or is killed after its first
step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.demo import QUESTION, packaged_model
from examples.orders import write_task
from qlora.cli.exits import run
from qlora.system.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
YARDSTICK = 'python -c "import torch, transformers"'
GOALS = {"train.py --help": 1.0, "the demo's first step": 15.0}  # seconds


def measure(arguments: list[str], cache: Path, is_done: Callable[[bytes], bool]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a command until `is_done` (given the first byte it printed) or its end."""
    environment = os.environ | {"QLORA_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as complaints:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=printed, stderr=complaints, env=environment, cwd=ROOT
        )
        seconds, ended = 0.0, 0
        while not ended:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not seconds and (ended or is_done(os.pread(printed.fileno(), 1, 0))):
                seconds = time.perf_counter() - start
                if not ended and "--data" in arguments:
                    process.kill()
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode > 0:
            complaint = os.pread(complaints.fileno(), 1 << 16, 0).decode(errors="replace")
            if process.returncode == 2:  # bad input
                raise InputError(complaint.strip().rpartition("\n")[2].removeprefix("error: "))
            sys.exit(f"error: {' '.join(arguments)} failed:\n{complaint}")
    return seconds, usage.ru_utime + usage.ru_stime


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="by default the demo's")
    parser.add_argument("--config", default=str(ROOT / "configs/demo.yaml"), help="of the training run")
    options = parser.parse_args(argv)
    model = options.model or str(packaged_model())

    with tempfile.TemporaryDirectory() as folder:
        data, _ = write_task(Path(folder) / "task", num_test=1)
        run, cache = Path(folder) / "run", Path(folder) / "cache"
        base = ["train.py", "--use-4bit", "--model", model]
        commands = {
            YARDSTICK: ["-c", "import torch, transformers"],
            "train.py --help": ["train.py", "--help"],
            "-m qlora --help": ["-m", "qlora", "--help"],
            "-m qlora merge --help": ["-m", "qlora", "merge", "--help"],
            "an answer's first token": [*base, "--prompt", QUESTION, "--max-new-tokens", "1"],
            "the demo's first step": [*base, "--config", options.config, "--data", str(data)],
        }
        figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for number in range(options.rounds + 1):
            for name, arguments in commands.items():
                metrics = run / str(number) / "metrics.jsonl"

                def is_done(printed: bytes, name: str = name, metrics: Path = metrics) -> bool:
                    if "step" in name:
                        return metrics.is_file() and metrics.stat().st_size > 0
                    return "token" in name and bool(printed)

                target = ["--output-dir", str(metrics.parent)] if "step" in name else []
                figure = measure([*arguments, *target], cache, is_done)
                if number:
                    figures[name].append(figure)

    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    title = f"{versions}; {torch.get_num_threads()} threads; {date.today()}; medians of {options.rounds} rounds"
    table = Table(title=title)
    for heading in ("command", "seconds", "of the imports", "CPU seconds", "goal"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    for name, pairs in figures.items():
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(pairs, figures[YARDSTICK], strict=True))
        seconds, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        goal = f"{GOALS[name]:.0f} s" if name in GOALS else ""
        table.add_row(name, f"{seconds:.2f}", f"{ratio:.2f} ×", f"{cpu:.2f}", goal)
    Console(width=110).print(table)


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
