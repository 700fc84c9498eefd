"""Kill training before each of its file operations in turn, restart it, and compare with an uninterrupted run.

    python -m tools.crash_points [--steps 4] [-- more flags of train.py]      a tiny random LLaMA, two minutes

tools/crash.py picks random moments; this program tests every file operation: opening a file for writing, renaming,
removing, creating a directory. Python reports each of them to an audit hook (PEP 578), which kills the process
group right before the k-th one in the output directory. For each k there is one run, which `--resume auto` must
finish like the reference, byte for byte. tools/crash.py covers half-written files with temporary names.

Runs are forked from this process, which has imported everything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from tests.processes import ROOT, run_program
from tests.shortcuts import new_cache
from tools.crash import compare_runs, write_job

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


def visit_points(
    work: Path, num_steps: int, more_flags: Sequence[str] = (), last: int = 0, say: Callable[[str], Any] = print
) -> list[str]:
    """Kill and resume one run for each file operation of a whole run; returns all problems.

    Args:
        work: an empty directory for model, data and runs.
        num_steps: about the length of a run, in optimizer steps.
        more_flags: of train.py.
        last: only this many operations at the end of the run; 0 = all.
    """
    flags, reference = [*write_job(work, "tiny", 0, num_steps), *more_flags], work / "reference"
    os.environ["QLORA_CACHE"] = new_cache(work / "cache")
    train(flags, reference)
    record = work / "operations"
    assert train(flags, work / "recorded", record=record) == 0, f"see {work / 'recorded.log'}"
    problems = [f"unkilled: {problem}" for problem in compare_runs(work / "recorded", reference)]
    operations = record.read_text().splitlines()
    for number, operation in [*enumerate(operations, start=1)][-last:]:
        out = work / f"run-{number:03d}"
        code, found = train(flags, out, at=number), []
        if code != -signal.SIGKILL:
            found.append(f"ended with {code}, not killed")
        if (code := train(flags, out)) != 0:
            found.append(f"resumed, it ended with {code}")
        found += compare_runs(out, reference)
        problems += [f"killed before {number}, {operation}: {problem}" for problem in found]
        say(f"{number} of {len(operations)}, {operation}: {'; '.join(found) or 'identical'}")
        if not found:
            shutil.rmtree(out)
    return problems


def train(flags: list[str], out: Path, at: int = 0, record: Path | None = None) -> int:
    """Start or continue a run in a forked process; returns its exit code, negative for a signal.

    Args:
        at: kill the process before this operation on files in `out`, counted from 1; 0 = never.
        record: file that lists the operations.
    """
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.setsid()
            with open(f"{out}.log", "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.addaudithook(Hook(out, at, record))
            run_program(str(ROOT / "train.py"), *flags, "--output-dir", str(out), "--resume", "auto")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Hook:
    """An audit hook that counts changes in a directory."""

    def __init__(self, out: Path, at: int, record: Path | None) -> None:
        self.out, self.at, self.count = str(out), at, 0
        self.record = record.open("w") if record is not None else None

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)):
            return
        path = str(path)
        # shutil.rmtree names files by their directory's descriptor; nothing else here does.
        has_descriptor = event != "open" and arguments[-1] not in (-1, None)
        if not has_descriptor and path != self.out and not path.startswith(self.out + os.sep):
            return
        self.count += 1
        if self.record is not None:
            print(event, path.removeprefix(self.out + os.sep), file=self.record, flush=True)
        if self.count == self.at:
            os.killpg(0, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.crash_points", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run, about (default: 4)")
    parser.add_argument(
        "--last", type=int, default=0, help="only so many operations from a run's end (default: all)"
    )
    parser.add_argument("flags", nargs="*", help="more flags of train.py, after --")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="crash-points-"))
    problems = visit_points(work, args.steps, args.flags, args.last)
    print("\n".join(problems) or "all identical to the reference")
    if problems:
        print(f"see {work}")
    else:
        shutil.rmtree(work)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
