"""Chunks mapped in other processes, and processes that die. A test that hangs has failed: nothing is timed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from qlora.system.errors import TrainingStopped
from qlora.system.processes import map_chunks

FOREVER = 3600


def square(chunk: list[int]) -> list[Any]:
    """The later a chunk, the sooner it is done; and who did it."""
    time.sleep(0.2 / (1 + chunk[0]))
    return [*(number**2 for number in chunk), os.getpid()]


def sleep_or(chunk: list[Any]) -> None:
    """Sleep on, or wait until the other one does and then die in some way."""
    action, file = chunk
    if action == "sleep":
        file.write_text(str(os.getpid()))
        time.sleep(FOREVER)
    wait_for(file)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "exit":
        os._exit(7)
    raise OSError("a mistake of ours")


def wait_for(file: Path) -> int:
    """The number in the file, once it is there."""
    while not (file.exists() and file.read_text()):
        time.sleep(0.01)
    return int(file.read_text())


def report_and_wait(files: list[Path]) -> None:
    files[0].write_text(str(os.getpid()))
    wait_for(files[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_are_those_of_map_and_in_order(num_workers: int) -> None:
    results = list(map_chunks(square, ([2 * n, 2 * n + 1] for n in range(10)), num_workers))
    assert [result[:2] for result in results] == [[(2 * n) ** 2, (2 * n + 1) ** 2] for n in range(10)]
    workers = {result[2] for result in results}
    assert workers == {os.getpid()} if num_workers == 0 else len(workers) <= 2 and os.getpid() not in workers
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("die_first", [False, True])
@pytest.mark.parametrize(
    ("action", "cause"), [("kill", "signal 9, Killed"), ("exit", "exit code 7"), ("raise", "exit code 1")]
)
def test_a_worker_that_dies_ends_the_others_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], action: str, cause: str, die_first: bool
) -> None:
    """With concurrent.futures this hung now and then, and with torch's DataLoader when one slept on."""
    file = tmp_path / "pid"
    chunks = [["sleep", file], [action, file]]
    with pytest.raises(TrainingStopped, match=rf"^A worker process died \({cause}\); if memory ran out, pass"):
        list(map_chunks(sleep_or, reversed(chunks) if die_first else chunks, 2))
    assert multiprocessing.active_children() == []
    assert not is_running(int(file.read_text()))
    assert ("a mistake of ours" in capfd.readouterr().err) == (action == "raise")


def test_a_worker_that_cannot_begin(tmp_path: Path) -> None:
    """The function is not known in the other process, and the chunk is larger than the pipe."""
    script = tmp_path / "script.py"
    script.write_text(
        "from qlora.system.processes import map_chunks\nif __name__ == '__main__':\n"
        "    def f(chunk): pass\n    list(map_chunks(f, [bytes(10**7)], 2))\n"
    )
    run = subprocess.run([sys.executable, script], env=with_root(), capture_output=True, text=True)
    assert "TrainingStopped: A worker process died (exit code 1)" in run.stderr


def test_closing_drops_what_has_not_begun() -> None:
    asked = 0

    def chunks() -> Iterator[list[int]]:
        nonlocal asked
        while True:
            yield [asked := asked + 1]

    with closing(map_chunks(square, chunks(), 1)) as results:
        assert next(results)[0] == 1
    assert asked == 2 and multiprocessing.active_children() == []


def test_a_killed_parent_leaves_no_worker(tmp_path: Path) -> None:
    file, go_on = tmp_path / "pid", tmp_path / "go on"
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom qlora.system.processes import map_chunks\n"
        "from tests.system.test_processes import report_and_wait\n"
        "if __name__ == '__main__':\n"
        f"    files = [Path({str(file)!r}), Path({str(go_on)!r})]\n"
        "    list(map_chunks(report_and_wait, [files], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, script], env=with_root(), stderr=subprocess.PIPE, text=True)
    worker = wait_for(file)
    parent.kill()
    parent.wait()
    assert is_running(worker)
    go_on.write_text("1")
    assert parent.stderr is not None
    # Read to the end, which comes when both workers, the busy one and the idle one, have exited. Python's own
    # resource tracker may report what the killed parent left.
    assert "Traceback" not in parent.stderr.read()
    while is_running(worker):
        time.sleep(0.01)


def test_an_interrupt_is_left_to_the_parent(tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group; a worker that obeyed would print a traceback of its own."""
    files = [tmp_path / "pid", tmp_path / "go on"]
    with ThreadPoolExecutor(1) as thread:
        results = thread.submit(list, map_chunks(report_and_wait, [files], 1))
        os.kill(wait_for(files[0]), signal.SIGINT)
        files[1].write_text("1")
        assert results.result() == [None]


def with_root() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))


def is_running(pid: int) -> bool:
    """A zombie has ended: in a container, nobody may collect it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
