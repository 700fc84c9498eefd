"""Deaths in runs of several processes and machines: python -m pytest -m full
tests/several_processes/test_deaths.py.

Two machines are two launchers on this one, joined by a rendezvous as real ones are; each believes itself alone.
tests/robustness/test_faults.py has the short form.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qlora.training.checkpoint import list_checkpoints, read_state
from tests.robustness.test_faults import (
    ENDLESS,
    ROOT,
    await_steps,
    check_whole,
    finish,
    free_port,
    job,
    start,
    torchrun,
    training_processes,
)

__all__ = ["job"]
pytestmark = pytest.mark.full
HOST = socket.gethostname()


def processes(count: int, *more: str) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *more]


@contextlib.contextmanager
def two_nodes(log: Path, *arguments: str) -> Iterator[list[subprocess.Popen[str]]]:
    """Two launchers of one process each; what they say is in node0.txt and node1.txt of `log`."""
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", f"localhost:{free_port()}", "--rdzv_id", "deaths"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as files:
        logs = [files.enter_context(open(log / f"node{node}.txt", "w")) for node in range(2)]
        words = [sys.executable, *launcher, str(ROOT / "train.py"), *arguments]
        agents = [subprocess.Popen(words, text=True, stdout=f, stderr=f, env=environment) for f in logs]
    try:
        yield agents
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.parametrize("kind", ["rank killed", "machine killed", "machine frozen"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_death_on_another_machine(job: list[str], tmp_path: Path, victim: int, kind: str) -> None:
    """What is left ends within 30 s and says who died, also where connections stay open: a freeze is no power."""
    out = tmp_path / "out"
    flags = [
        *job,
        *ENDLESS,
        "--batch-size",
        "4",
        "--output-dir",
        str(out),
        "--save-every",
        "1",
        "--keep-last",
        "3",
    ]
    with two_nodes(tmp_path, *flags) as agents:
        await_steps(agents[0], out, 3)
        homes = {rank: (agent, p) for agent in agents for rank, p in training_processes(agent).items()}
        assert sorted(homes) == [0, 1]
        (agent, dying), (_, other) = homes[victim], homes[1 - victim]
        began, number = time.monotonic(), signal.SIGSTOP if "frozen" in kind else signal.SIGKILL
        if "machine" in kind:
            agent.send_signal(number)
        dying.send_signal(number)
        while not has_ended(other) and time.monotonic() < began + 40:
            time.sleep(0.1)
        took = time.monotonic() - began
        said = "".join((tmp_path / f"node{node}.txt").read_text() for node in range(2))
        print(f"{kind}, rank {victim}: rank {1 - victim} ended after {took:.1f} s")
        for process in (dying, other):
            with contextlib.suppress(psutil.Error):
                process.kill()
    assert took < 30, said
    lines = [line for line in said.splitlines() if line.startswith("error: Training stopped")]
    named = f"rank {victim} (host {HOST}, process {dying.pid}) died, or cannot be reached"
    with_store = "launcher's store on localhost, or that machine, does not answer"
    assert len(lines) == 1
    assert named in lines[0] or ("frozen" in kind and with_store in lines[0])
    assert ("is saved." in lines[0]) == ("frozen" not in kind)
    assert read_state(list_checkpoints(out)[-1])["progress"].step >= 1


def test_a_run_of_two_goes_on_with_three_and_with_one(job: list[str], tmp_path: Path) -> None:
    """24 examples a step each time."""
    out = tmp_path / "out"
    flags = [*job, "--output-dir", str(out), "--save-every", "1", "--keep-last", "3"]
    process = start(*flags, *ENDLESS, "--batch-size", "12", launcher=torchrun())
    await_steps(process, out, 3)
    training_processes(process)[1].kill()
    finish(process)
    for count, batch_size in ((3, 8), (1, 24)):
        done = read_state(list_checkpoints(out)[-1])["progress"].step
        steps = ("--max-steps", str(done + 2), "--batch-size", str(batch_size), "--resume", "auto")
        code, said, err = finish(start(*flags, *steps, launcher=processes(count) if count > 1 else ()), 240)
        assert code == 0, err
        assert f"{done} steps done" in said
        check_whole(out, done + 2)


def test_a_launcher_that_may_restart_goes_on_by_itself(
    job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a store for each start: in a launcher's own one, ranks find the addresses of the dead."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    out = tmp_path / "out"
    flags = [*job, "--output-dir", str(out), "--save-every", "1", "--keep-last", "3", "--batch-size", "4"]
    restarts = processes(2, "--max-restarts", "1")
    process = start(*flags, "--max-steps", "60", "--resume", "auto", launcher=restarts)
    await_steps(process, out, 3)
    training_processes(process)[1].kill()
    code, said, err = finish(process, 240)
    assert code == 0, err
    assert re.search(r"resumed from \S+step-0*\d+, \d+ steps done", said)
    check_whole(out, 60)
