"""Kill training at random moments, restart it, and compare it with an uninterrupted run.

    python -m tools.crash --kills 100                   a tiny random LLaMA, a quarter of an hour or more
    python -m tools.crash --kills 20 --model smollm2    the packaged SmolLM2-135M, on short rows
    python -m tools.crash --kills 1000 --mixes          a new random mix of flags after every dozen of kills

Each run is `train.py` in a separate process group, ended by SIGKILL: no handler, no flush, no clean-up. It is
restarted with `--resume auto` and killed again until it finishes. Then nothing may be missing, duplicated or
different: checkpoints, adapter and samples byte for byte, metrics.jsonl line for line except speed and memory.

There are four kinds of kills, so that each part of a run gets its share:

    start-up    at any time before the first step: imports, data, model, restoring the checkpoint
    training    at any time after the first new line of metrics.jsonl
    writing     while the staging directory of a checkpoint exists
    end         after the last step: the last checkpoint, the adapter, the curve

A mix of flags (tools/crash_mixes.py) has a reference of its own; some mixes are runs of two processes. One in
three kills of those takes one process alone, and the run must end by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from qlora.system.errors import InputError
from qlora.training.checkpoint import list_checkpoints, read_state
from tests.models import save_tiny_llama, smollm2_path
from tests.shortcuts import new_cache
from tests.tiny import tiny_tokenizer
from tools.crash_mixes import Mix, draw_mix

ROOT = Path(__file__).parent.parent
START: Callable[..., subprocess.Popen[Any]] = subprocess.Popen  # or tests/fork_server.py's, without imports
VOLATILE = ("tokens_per_second", "peak_memory_gib")
KINDS = {"start-up": 25, "training": 40, "writing": 25, "end": 10}  # kind -> share of the kills
TIME_LIMIT = 3600  # seconds; a process that takes longer hangs
KILLS_PER_MIX = 12
PATIENCE = 600  # seconds for the others to notice that a process has died


@dataclass
class Job:
    """What every run does, and how long it takes without kills (seconds)."""

    flags: list[str]
    work: Path
    reference: Path
    mix: Mix = field(default_factory=Mix)
    last_step: int = 0
    start_up: float = 0.0  # until the first line of metrics
    training: float = 0.0  # from there to the last line
    closing: float = 0.0  # from there to the end of the process


@dataclass
class Kill:
    """One SIGKILL, and what the run was doing at that moment."""

    phase: str  # start-up, step or writing
    seconds: float  # since the process started
    logged: int  # last step in metrics.jsonl
    saved: int  # step of the newest whole checkpoint
    staging: list[str]  # unfinished files of the killed process

    def __str__(self) -> str:
        left = f", left {', '.join(self.staging)}" if self.staging else ""
        return (
            f"{self.phase:8} {self.seconds:5.2f} s after the start, {self.logged} logged, {self.saved} saved{left}"
        )


@dataclass
class Summary:
    """The outcome of all runs."""

    kills: list[Kill] = field(default_factory=list)
    runs: int = 0
    mixes: int = 0  # of flags
    problems: list[str] = field(default_factory=list)  # each names its run
    seconds: float = 0.0

    def count(self, phase: str) -> int:
        """Kills in this phase."""
        return sum(kill.phase == phase for kill in self.kills)

    @property
    def lost(self) -> int:
        """Number of runs that did not end like the reference."""
        return len({problem.partition(":")[0] for problem in self.problems})

    def __str__(self) -> str:
        phases = ", ".join(f"{self.count(phase)} {words}" for phase, words in PHASES.items())
        verdict = "all identical to the reference" if not self.problems else f"{self.lost} LOST OR DIFFERENT"
        runs = f"{self.runs} runs" + (f" of {self.mixes} mixes of flags" if self.mixes > 1 else "")
        return f"{len(self.kills)} kills ({phases}), {runs}: {verdict}; {self.seconds / 60:.1f} minutes"


PHASES = {"start-up": "during start-up", "step": "during steps", "writing": "while writing a checkpoint"}


def run_crash_test(
    work: Path,
    num_kills: int,
    model: str = "tiny",
    seed: int = 0,
    num_steps: int = 40,
    kinds: Iterable[str] | None = None,
    with_mixes: bool = False,
    say: Callable[[str], Any] = print,
) -> Summary:
    """Train until `num_kills` kills are done and the last run has finished.

    Args:
        work: an empty directory for model, data and runs.
        model: "tiny", "smollm2", or what --model takes.
        num_steps: about the length of a run, in optimizer steps.
        kinds: of the kills, in turn; None draws them by their shares.
        with_mixes: draw a mix of flags for the first run, and another one after every KILLS_PER_MIX kills.
    """
    started, rng = time.monotonic(), random.Random(seed)
    flags = write_job(work, model, seed, num_steps)
    new_cache(work / "cache")
    planned = iter(kinds) if kinds is not None else draw_kinds(rng)
    summary, job, until = Summary(), None, 0
    while len(summary.kills) < num_kills:
        if job is None or (with_mixes and len(summary.kills) >= until):
            job = start_job(flags, work, rng if with_mixes else None, say)
            until = len(summary.kills) + KILLS_PER_MIX
            summary.mixes += 1
        summary.runs += 1
        name = f"run {summary.runs}"
        out = work / f"run-{summary.runs:03d}"
        try:
            for kill in kill_until_done(job, out, planned, rng, num_kills - len(summary.kills), summary.runs):
                summary.kills.append(kill)
                say(f"kill {len(summary.kills)} of {num_kills}, {name}: {kill}")
            problems = compare_runs(out, job.reference)
        except RunLostError as error:
            problems = [str(error)]
        summary.problems += [f"{name}: {problem}" for problem in problems]
        say(f"{name} ended: {'; '.join(problems) or 'identical'}")
        if not problems:
            shutil.rmtree(out)
    summary.seconds = time.monotonic() - started
    return summary


def start_job(flags: list[str], work: Path, rng: random.Random | None, say: Callable[[str], Any]) -> Job:
    """A job with its reference run; with `rng`, the first mix that is drawn and not refused.

    Raises:
        RunLostError: the reference fails.
    """
    while True:
        reference = work / "reference"
        shutil.rmtree(reference, ignore_errors=True)
        Path(f"{reference}.log").unlink(missing_ok=True)
        mix = Mix() if rng is None else draw_mix(rng)
        job = Job([*flags, *(flag.format(work=work) for flag in mix.flags)], work, reference, mix)
        try:
            run_reference(job)
        except RunRefusedError as error:
            if rng is None:
                raise
            say(f"{mix}: {error}; drawing another")
            continue
        say(
            f"{mix}: {job.last_step} steps; {job.start_up:.1f} s until the first line, {job.training:.1f} s of "
            f"training, {job.closing:.1f} s after the last line"
        )
        return job


class RunLostError(Exception):
    """A run lost a saved step, or could not be resumed."""


class RunRefusedError(RunLostError):
    """The flags of a run were refused (exit code 2)."""


# ---- the job ----------------------------------------------------------------------------------------------


def write_job(work: Path, model: str, seed: int, num_steps: int) -> list[str]:
    """Write data and, for "tiny", a model; return train.py's flags.

    Two epochs of packed windows of four rows: shuffling, accumulation, dropout and evaluations all take part,
    and a checkpoint after each step makes writing them a large part of the time.
    """
    rng, rows = random.Random(seed), num_steps * 2
    words = "red blue mug lamp send order two five Anna Oslo Friday please 7 42 ünï 🙂".split()

    def sentence(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    # SmolLM2's template would put a longer system message of its own.
    system = [] if model == "tiny" else [{"role": "system", "content": ""}]
    data, pairs, labels = (work / f"{name}.jsonl" for name in ("data", "pairs", "labels"))
    with data.open("w") as file, pairs.open("w") as pair_file, labels.open("w") as label_file:
        for number in range(rows + rows // 10):
            question, answer = ({"role": role, "content": sentence(1, 6)} for role in ("user", "assistant"))
            row = {"messages": [*system, question, answer]}
            pair = {"prompt": row["messages"][:-1], "chosen": answer["content"], "rejected": f"No {number}"}
            for out, line in ((file, row), (pair_file, pair), (label_file, row | {"label": bool(number % 2)})):
                out.write(json.dumps(line) + "\n")
    if model == "tiny":
        path = str(save_tiny_llama(work / "model", tokenizer=tiny_tokenizer()))
    elif model == "smollm2":
        path = str(smollm2_path())
    else:
        path = model
    return (
        f"--model {path} --data {data} --max-length {64 if model == 'tiny' else 32} --eval-split 0.1 "
        "--eval-every 5 --epochs 2 --batch-size 2 --grad-accum 2 --dropout 0.1 --learning-rate 5e-3 "
        "--warmup-steps 3 --schedule cosine --save-every 1 --keep-last 2 --num-samples 2 --sample-tokens 8"
    ).split()


def start_training(job: Job, out: Path, num_workers: int = 0) -> subprocess.Popen[bytes]:
    """Start or continue a run in a new process group; its output goes to OUT.log."""
    several = ["-m", "tests.processes", str(job.mix.processes)] if job.mix.processes > 1 else []
    command = [sys.executable, *several, "train.py", *job.flags, "--output-dir", str(out), "--resume", "auto"]
    command += ["--num-workers", str(num_workers)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "QLORA_CACHE": str(job.work / "cache")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(f"{out}.log", "ab") as log:
        return START(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip


def run_reference(job: Job) -> None:
    """Run without kills; fills the cache and measures how long each part takes."""
    started = time.time()
    process = start_training(job, job.reference)
    metrics = job.reference / "metrics.jsonl"
    wait_until(process, lambda: metrics.is_file() and metrics.stat().st_size > 0)
    first = time.time()
    check_ended_well(process, job.reference)
    job.last_step = last_logged(job.reference)
    last = metrics.stat().st_mtime
    job.start_up, job.training, job.closing = first - started, last - first, time.time() - last


def check_ended_well(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the process to end.

    Raises:
        RunLostError: it fails or does not end.
    """
    try:
        code = process.wait(TIME_LIMIT)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise RunLostError(f"hangs, see {out}.log") from None
    if code != 0:
        text = Path(f"{out}.log").read_text(errors="replace").strip()
        refused = code == 2 or "terminated with exit code 2" in text  # of one of several processes
        raise (RunRefusedError if refused else RunLostError)(
            f"ended with code {code}, see {out}.log: {text.splitlines()[-1] if text else 'no output'}"
        )


# ---- killing ----------------------------------------------------------------------------------------------


def draw_kinds(rng: random.Random) -> Iterator[str]:
    while True:
        yield rng.choices(list(KINDS), list(KINDS.values()))[0]


def kill_until_done(
    job: Job, out: Path, kinds: Iterator[str], rng: random.Random, num_kills: int, number: int
) -> Iterator[Kill]:
    """Start the run and kill it, at most `num_kills` times, until it finishes.

    Raises:
        RunLostError: it ended in an error, or a saved step is gone.
    """
    saved = 0
    for _ in range(num_kills):
        kind, fraction = next(kinds, "training"), rng.random()
        before, staged = read_metrics(out), set(staging_paths(out))
        started = time.monotonic()
        process = start_training(job, out, num_workers=2 if number % 3 == 2 else 0)
        try:
            wait_for_moment(process, out, job, kind, fraction, before)
        finally:
            seconds, is_done = time.monotonic() - started, process.poll() is not None
            if job.mix.processes > 1 and rng.random() < 1 / 3:
                kill_one(process, out, rng)
            kill_group(process)
        if is_done:
            return check_ended_well(process, out)
        left = sorted(path.name for path in set(staging_paths(out)) - staged)
        phase = "writing" if left else "step" if has_new_line(out, before) else "start-up"
        previous, saved = saved, newest_whole(out)
        yield Kill(phase, seconds, last_logged(out), saved, left)
        if saved < previous:
            raise RunLostError(f"step {previous} was saved, now the newest whole checkpoint is step {saved}")
    check_ended_well(start_training(job, out), out)


def wait_for_moment(
    process: subprocess.Popen[bytes], out: Path, job: Job, kind: str, fraction: float, before: bytes
) -> None:
    """Return when it is time to kill, or when the process has ended."""
    if kind == "start-up":
        return pause(process, fraction * job.start_up)
    started = time.monotonic()
    wait_until(process, lambda: has_new_line(out, before))
    job.start_up = min(job.start_up, time.monotonic() - started)  # the reference also filled the caches
    if kind == "end":
        wait_until(process, lambda: last_logged(out) == job.last_step)
        return pause(process, fraction * job.closing)
    pause(process, fraction * 0.6 * job.training)
    if kind == "writing":
        stop_while_writing(process, out)


def stop_while_writing(process: subprocess.Popen[bytes], out: Path) -> None:
    """Freeze the process while a checkpoint is half written, until the kill."""

    def is_writing() -> bool:
        return any((out / "checkpoints").glob(".step-*.tmp"))

    wait_until(process, is_writing)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(0.005)  # a system call under way, such as the last rename, still completes
        if is_writing():
            return
        os.killpg(process.pid, signal.SIGCONT)
        wait_until(process, is_writing)


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """Return as soon as the condition holds or the process has ended.

    Raises:
        RunLostError: neither happened within TIME_LIMIT seconds.
    """
    deadline = time.monotonic() + TIME_LIMIT
    while process.poll() is None and not condition():
        if time.monotonic() > deadline:
            raise RunLostError(f"neither goes on nor ends within {TIME_LIMIT} s")
        time.sleep(0.001)


def pause(process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    wait_until(process, lambda: time.monotonic() >= end)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the process and its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def kill_one(process: subprocess.Popen[bytes], out: Path, rng: random.Random) -> None:
    """Send SIGKILL to one of several processes, and wait until the run has ended.

    Raises:
        RunLostError: they go on.
    """
    ranks = psutil.Process(process.pid).children() if process.poll() is None else []
    if len(ranks) < 2:
        return  # not there yet, or no more
    os.killpg(process.pid, signal.SIGCONT)
    rng.choice(ranks).kill()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        raise RunLostError(f"goes on {PATIENCE} s after the death of a process, see {out}.log") from None


# ---- looking at a run -------------------------------------------------------------------------------------


def read_metrics(out: Path) -> bytes:
    try:
        return (out / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return b""


def has_new_line(out: Path, before: bytes) -> bool:
    """Whether a line was added since the content was `before`; resuming may have removed lines at the end."""
    return not before.startswith(read_metrics(out))


def last_logged(out: Path) -> int:
    """The last whole line's step; 0 if there is none."""
    lines = read_metrics(out).splitlines(keepends=True)
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def newest_whole(out: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    for path in reversed(list_checkpoints(out)):
        try:
            return read_state(path)["progress"].step
        except InputError:
            continue
    return 0


def staging_paths(out: Path) -> list[Path]:
    """Unfinished files and directories, which have temporary names."""
    return [path for directory in (out, out / "checkpoints") for path in directory.glob(".*.tmp")]


def compare_runs(out: Path, reference: Path) -> list[str]:
    """All differences between two finished runs: files, their bytes, lines of metrics."""
    problems = [f"left behind {path.relative_to(out)}" for path in staging_paths(out)]
    ours, theirs = ({str(path.relative_to(d)) for path in visible_files(d)} for d in (out, reference))
    problems += [f"lacks {name}" for name in sorted(theirs - ours)]
    problems += [f"has {name}, unlike the reference" for name in sorted(ours - theirs)]
    for name in sorted(ours & theirs):
        if name.endswith(".safetensors") and (out / name).read_bytes() != (reference / name).read_bytes():
            problems.append(f"{name} differs")
        if name == "samples.jsonl" and (out / name).read_bytes() != (reference / name).read_bytes():
            problems.append(f"{name} differs")
    lines = zip_longest(metric_lines(out), metric_lines(reference))
    for number, (line, expected) in enumerate(lines, start=1):
        if line != expected:
            problems.append(f"metrics.jsonl:{number} is {line}, not {expected}")
            break
    for path in list_checkpoints(out):
        try:
            read_state(path)
        except InputError as error:
            problems.append(str(error))
    return problems


def visible_files(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts):
            yield path


def metric_lines(out: Path) -> list[str]:
    """Lines of metrics.jsonl without values that vary between runs; a line that is not JSON is kept unchanged."""
    lines = []
    for line in read_metrics(out).decode(errors="replace").splitlines():
        try:
            lines.append(json.dumps({k: v for k, v in json.loads(line).items() if k not in VOLATILE}))
        except ValueError:
            lines.append(line)
    return lines


def main() -> int:
    from transformers.utils.logging import disable_progress_bar

    parser = argparse.ArgumentParser(prog="python -m tools.crash", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--model", default="tiny", help="tiny (default), smollm2, or any --model of train.py")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run, about (default: 40)")
    parser.add_argument("--mixes", action="store_true", help="draw flags at random, again and again")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the moments (default: 0)")
    parser.add_argument("--keep", type=Path, help="a new directory for model, data and runs, not removed")
    args = parser.parse_args()
    disable_progress_bar()
    work = (args.keep or Path(tempfile.mkdtemp(prefix="crash-"))).resolve()
    work.mkdir(parents=True, exist_ok=True)
    summary = run_crash_test(work, args.kills, args.model, args.seed, args.steps, with_mixes=args.mixes)
    for problem in summary.problems:
        print(problem)
    print(summary)
    if summary.problems:
        print(f"see {work}")
    elif args.keep is None:
        shutil.rmtree(work)
    return 1 if summary.problems else 0


if __name__ == "__main__":
    sys.exit(main())
