"""Processes watch one another: who is named as lost, who is not, and how long it takes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import HashStore

from qlora.parallel import watchdog as peers
from qlora.parallel.watchdog import Peer, PeerWatch, is_running, this_process
from qlora.system.errors import StoppedOnRequest

ROOT = Path(__file__).parents[2]
LOST = RuntimeError("Connection closed by peer")


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in dict(PERIOD=0.1, SILENCE=1.0, CALL=0.8, GRACE=0.8).items():
        monkeypatch.setattr(peers, name, seconds)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(rank, why) of processes that would have ended themselves."""
    seen: list[tuple[int, str]] = []

    def end(watch: PeerWatch, lost: str) -> None:
        seen.append((watch.me, lost))
        watch.stop()

    monkeypatch.setattr(PeerWatch, "_end", end)
    return seen


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def far(rank: int) -> Peer:
    """A process on a machine of its own."""
    return Peer(rank, f"host{rank}", str(rank), 1000 + rank, 0.0)


def watches(count: int, store: Any, others: int = 0) -> list[PeerWatch]:
    """Watches of ranks 0 to `count` - 1, each on its machine; `others` more ranks are never heard of."""
    everyone = [far(rank) for rank in range(count + others)]
    return [PeerWatch(rank, everyone, store).start() for rank in range(count)]


def leave_all(everyone: list[PeerWatch]) -> None:
    for watch in everyone:
        watch.leave()


def test_a_rank_that_does_not_answer_is_named(ends: list[tuple[int, str]]) -> None:
    first, second = everyone = watches(2, HashStore(), others=1)
    began = time.monotonic()
    text = first.describe(LOST)
    assert text == "rank 2 (host host2, process 1002) died, or cannot be reached (Connection closed by peer)"
    assert time.monotonic() - began < peers.CALL + 1
    assert "rank 2" in second.describe(LOST) and "rank 0" not in second.describe(LOST)
    leave_all(everyone)
    assert 0 not in dict(ends)  # it had come out of its collective


def test_a_dead_process_of_this_machine_is_known_at_once(sleeper: subprocess.Popen[bytes]) -> None:
    own = this_process(0)
    other = own._replace(rank=1, pid=sleeper.pid, started=psutil.Process(sleeper.pid).create_time())
    both = [PeerWatch(0, [own, other], store).start() for store in (HashStore(), None)]
    assert [watch.near for watch in both] == [[other], [other]]
    sleeper.kill()
    while is_running(other):
        time.sleep(0.01)
    for watch in both:
        began = time.monotonic()
        assert watch.describe(LOST).startswith(f"rank 1 (host {own.host}, process {sleeper.pid}) died (")
        assert time.monotonic() - began < 1
    leave_all(both)


def test_an_error_of_its_own_is_what_is_told_of_a_rank(ends: list[tuple[int, str]]) -> None:
    """Also to one that only waits: it ends, after GRACE."""
    first, second, third = watches(3, HashStore())
    second.leave(ValueError("a bad row"))
    told = "rank 1 (host host1, process 1001) ended with an error of its own (ValueError: a bad row)"
    assert first.describe(LOST) == f"{told} (Connection closed by peer)"
    first.leave(RuntimeError("stopped since another did"))  # no story of its own
    deadline = time.monotonic() + 5
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ends == [(2, told)]
    third.leave()


def test_a_rank_that_waits_for_a_silent_one_ends_itself(ends: list[tuple[int, str]]) -> None:
    """Nobody's collective fails: the neighbour hears no beat, and tells the others."""
    began = time.monotonic()
    everyone = watches(3, HashStore(), others=1)
    while len(ends) < 3 and time.monotonic() < began + 10:
        time.sleep(0.05)
    took = time.monotonic() - began
    leave_all(everyone)
    assert sorted(ends) == [
        (rank, "rank 3 (host host3, process 1003) died, or cannot be reached") for rank in range(3)
    ]
    assert peers.SILENCE + peers.GRACE < took < 2 * (peers.SILENCE + peers.GRACE)


@pytest.mark.parametrize("error", [None, StoppedOnRequest("asked")])
def test_ranks_that_leave_or_are_slow_are_not_lost(error: Exception | None, ends: list[tuple[int, str]]) -> None:
    """The third is held up until it is missed, and is heard of again before that ends anyone."""

    class Held(HashStore):  # type: ignore[misc]
        def set(self, key: str, value: str) -> None:
            if key == "rank/2" and json.loads(value)[0] == 3:
                time.sleep(peers.SILENCE + peers.GRACE / 2)
            super().set(key, value)

    first, second, third = watches(3, Held())
    second.leave(error)
    missed, end = set(), time.monotonic() + peers.SILENCE + peers.GRACE + 1
    while time.monotonic() < end:
        missed.add(first._lost(first._view.time - peers.SILENCE))
        time.sleep(0.05)
    assert ends == [] and missed == {"", "rank 2 (host host2, process 1002) died, or cannot be reached"}
    assert first.describe(LOST).startswith("the connection to another process broke, though all of them answer (")
    leave_all([first, third])


def test_a_store_that_is_gone_ends_nothing_and_is_no_error(ends: list[tuple[int, str]]) -> None:
    class Gone:
        def set(self, _key: str, _value: str) -> None:
            raise RuntimeError("Broken pipe")

    for count, named in ((2, "rank 1 (host host1, process 1001)"), (3, "one of rank 1 (")):
        watch = PeerWatch(0, [far(rank) for rank in range(count)], Gone()).start()
        time.sleep(peers.SILENCE + peers.GRACE if count == 2 else 0.5)
        began = time.monotonic()
        text = watch.describe(LOST)
        assert text.startswith(named) and text.endswith(" died, or cannot be reached (Connection closed by peer)")
        watch.leave()
        assert time.monotonic() - began < peers.CALL + 1 and ends == []


def test_a_store_that_hangs_ends_who_waits(ends: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As the store of a machine without power does: its connections stay open."""

    class Hangs:
        def set(self, _key: str, _value: str) -> None:
            time.sleep(4)
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setenv("MASTER_ADDR", "host1")
    watch = PeerWatch(0, [far(0), far(1)], Hangs()).start()
    deadline = time.monotonic() + 5
    while not ends and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ends == [(0, "the launcher's store on host1, or that machine, does not answer")]
    began = time.monotonic()
    watch.leave()
    assert time.monotonic() - began < 4


def test_a_run_of_one_process_watches_nobody() -> None:
    from accelerate import Accelerator

    watch = peers.watch_peers(Accelerator())
    assert watch.others == []
    watch.leave(ValueError("as it ends"))
