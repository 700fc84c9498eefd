"""Run `train.py` of an earlier commit and of this checkout on the same flags, in turns: speed and peak memory.

    python -m benchmarks.before d130d9e -- --model M --data gsm8k.jsonl --max-steps 20
    python -m benchmarks.before d130d9e --sequence 16384 -- --model M --gradient-checkpointing on --max-steps 1

Each run is a process of its own, in the directory that this command was started in. The two sides take turns, and
each round begins with the other one, so a ratio compares runs that were made one after the other. Speed is the
median over a run's steps without its first three (all of them, if there are no more); memory is the peak of the
process, libraries included (ru_maxrss). Each side has caches of its own, filled by an unmeasured run of one step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.roofline import describe_machine, describe_versions
from qlora.cli.exits import run
from qlora.system.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps left out


@dataclass(frozen=True)
class Side:
    """A checkout: its name, its directory, and where its caches are."""

    name: str
    checkout: Path
    caches: Path


@dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
        tokens_per_second: median over its steps.
        peak_gib: of the process.
        loss: of its last step.
    """

    tokens_per_second: float
    peak_gib: float
    loss: float


def check_out(commit: str, directory: Path) -> None:
    """Write the files of a commit to a directory.

    Raises:
        InputError: git does not know the commit.
    """
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        raise InputError(f"git knows no commit {commit!r} here. Give one that `git log` of this checkout lists.")
    directory.mkdir()
    subprocess.run(["tar", "-x"], cwd=directory, input=archive.stdout, check=True)


def write_sequence(path: Path, num_tokens: int) -> None:
    """One row of text with more than `num_tokens` tokens; `--max-length` cuts it there."""
    words = " ".join(f"{number} squared is {number * number}." for number in range(num_tokens))
    path.write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")


def measure(side: Side, flags: Sequence[str]) -> Measured:
    """Run one training.

    Raises:
        InputError: it failed; its last lines say why.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, str(side.checkout / "train.py"), *flags, "--output-dir", str(out)]
        environment = {**os.environ, "QLORA_CACHE": str(side.caches)}
        with (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            _, status, usage = os.wait4(process.pid, 0)
            if code := os.waitstatus_to_exitcode(status):
                log.seek(0)
                said = "\n".join(log.read().strip().splitlines()[-5:])
                raise InputError(f"train.py of {side.name} ended with exit code {code}; it printed last:\n{said}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "tokens_per_second" in line]
    steady = steps[WARM_UP:] or steps
    speed = statistics.median(line["tokens_per_second"] for line in steady)
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return Measured(speed, usage.ru_maxrss / scale, steps[-1]["loss"])


def report(results: dict[str, list[Measured]], console: Console) -> None:
    """Print both sides, and the ratios of runs in the same round."""
    old, new = results.values()
    table = Table(title=f"medians of {len(new)} rounds")
    for heading in ("side", "tokens/s", "peak GiB", "loss of the last step"):
        table.add_column(heading, justify="left" if heading == "side" else "right")
    for name, runs in results.items():
        speed, peak = (
            statistics.median(getattr(r, key) for r in runs) for key in ("tokens_per_second", "peak_gib")
        )
        table.add_row(name, f"{speed:,.0f}", f"{peak:.2f}", f"{runs[-1].loss:.6f}")
    console.print(table)
    pairs = list(zip(old, new, strict=True))
    speeds = sorted(b.tokens_per_second / a.tokens_per_second for a, b in pairs)
    peaks = sorted(b.peak_gib / a.peak_gib for a, b in pairs)
    console.print(
        f"this checkout / before: speed {statistics.median(speeds):.2f} ({speeds[0]:.2f} to {speeds[-1]:.2f})"
    )
    console.print(
        f"this checkout / before: memory {statistics.median(peaks):.2f} ({peaks[0]:.2f} to {peaks[-1]:.2f})"
    )


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequence", type=int, help="train on one sequence of this many tokens instead of --data")
    parser.epilog = "After -- come train.py's flags, without --output-dir."
    end = list(argv).index("--") if "--" in argv else len(argv)
    options, flags = parser.parse_args(argv[:end]), list(argv[end + 1 :])
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        check_out(options.commit, work / "before")
        warm_up = [*flags, "--max-steps", "1"]
        if options.sequence:
            write_sequence(work / "rows.jsonl", options.sequence)
            flags += ["--data", str(work / "rows.jsonl"), "--batch-size", "1"]
            warm_up = [*flags, "--max-length", "128"]
            flags += ["--max-length", str(options.sequence)]
        sides = [
            Side(options.commit, work / "before", work / "caches-before"),
            Side("this checkout", ROOT, work / "caches"),
        ]
        results: dict[str, list[Measured]] = {side.name: [] for side in sides}
        for side in sides:
            measure(side, warm_up)
        for number in range(options.rounds):
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                found = measure(side, flags)
                results[side.name].append(found)
                print(f"round {number + 1}, {side.name}: {found}", flush=True)
    console = Console(width=115)
    report(results, console)
    console.print(describe_versions())
    console.print(describe_machine())


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
