"""Who has died: a collective only says that "a peer" is gone, or waits for ever; so processes watch one another.

At the start each tells all others its rank, host and process number. From then on a thread of each speaks to the
launcher's store (the TCPStore at MASTER_ADDR:MASTER_PORT, which outlives the ranks) once a second:

    beat/R     a count that rank R moves on and rank R - 1 reads: a few requests a second and rank, however many
    alarms     how many were raised: by a rank whose neighbour's count stands still, whose neighbour on the same
               machine is gone, whose collective failed, or that ends with an error of its own
    alive/K    the ranks that have answered alarm K
    left       the ranks that have ended by themselves, and the error that ended them

Who has neither answered nor left is lost. A rank whose collective fails names the lost ones (`describe`), saves
and stops. One that goes on waiting in a collective (NCCL within a machine; a machine whose power is gone, which
closes no connection) ends itself GRACE seconds after an alarm that not all have answered: nothing can interrupt
the wait, so the last checkpoint counts. Where all do answer, the alarm was false and nothing happens.

Times: SILENCE + GRACE and two looks make 24 s, so that a run ends within 30 s of a death.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import psutil

from qlora.system.errors import StoppedOnRequest
from qlora.system.wording import explain

PERIOD = 1.0  # seconds between two looks
SILENCE = 12.0  # seconds without a beat that raise an alarm
CALL = 4.0  # seconds that a rank whose collective failed waits for the others' answers
GRACE = 10.0  # seconds from an alarm to the end of a rank that still waits
SHOWN = 8  # ranks named in a sentence


class Peer(NamedTuple):
    """A process of the run. `node`: the launcher's number of its machine; `started`: psutil's create_time."""

    rank: int
    host: str
    node: str
    pid: int
    started: float
    token: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, process {self.pid})"


def this_process(rank: int) -> Peer:
    started, node = psutil.Process().create_time(), os.environ.get("GROUP_RANK", "0")
    return Peer(rank, socket.gethostname(), node, os.getpid(), started, uuid.uuid4().hex)


def is_running(peer: Peer) -> bool:
    """Whether a process of this machine is there: neither gone, nor dead and unburied."""
    try:
        process = psutil.Process(peer.pid)
        return process.create_time() == peer.started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class View(NamedTuple):
    """What the store said last: at `time` (time.monotonic()), after alarm number `alarm` (0: none yet)."""

    time: float
    alarm: int
    answered: set[int]
    left: dict[int, str]


class PeerWatch:
    """Watches the other processes from `start` to `leave`.

    Args:
        me: this process's rank.
        peers: all processes.
        store: one that all share, or None: then only those on the same machine are watched.
    """

    def __init__(self, me: int, peers: Sequence[Peer], store: Any = None) -> None:
        own = next((peer for peer in peers if peer.rank == me), None)
        self.me, self.others = me, [peer for peer in peers if peer.rank != me]
        self.near = [p for p in self.others if own and p[1:3] == own[1:3] and is_running(p)]
        self.next = sorted(p.rank for p in peers)[(me + 1) % len(peers)] if peers else me
        self._store, self._view = store, View(time.monotonic(), 0, set(), {})
        self._asked, self._wake, self._told = threading.Event(), threading.Event(), threading.Event()
        self._leaving: str | None = None
        self._is_waiting, self._is_survivor, self._alarm_at = True, False, 0.0

    def start(self) -> PeerWatch:
        if self.others:
            threading.Thread(target=self._judge, daemon=True).start()
            if self._store is not None:
                threading.Thread(target=self._talk, daemon=True).start()
        return self

    # ---- from the training loop ---------------------------------------------------------------------------

    def stand_down(self) -> None:
        """The loop has come out of its collectives: nobody has to end this process any more."""
        self._is_waiting = False

    def describe(self, error: BaseException) -> str:
        """Which processes a failed collective has lost, as a clause; takes CALL seconds at the most."""
        self.stand_down()
        self._is_survivor, asked, before = True, time.monotonic(), self._view.alarm
        self._asked.set()
        self._wake.set()
        while time.monotonic() < asked + CALL:
            gone = [peer.rank for peer in self.near if not is_running(peer)]
            view = self._view
            if self._store is None and len(self.near) == len(self.others) and gone:
                break
            known = {*view.answered, *view.left, *gone}
            if view.alarm > before and known.issuperset(peer.rank for peer in self.others):
                break
            time.sleep(0.1)
        is_fresh = self._view.alarm > before
        lost = self._lost(is_fresh)
        if not lost:
            suspects = [p for p in self.others if p not in self.near and p.rank not in self._view.left]
            lost = f"{'one of ' * (len(suspects) > 1)}{_names(suspects)} died, or cannot be reached"
            if is_fresh or not suspects:
                lost = "the connection to another process broke, though all of them answer"
        return f"{lost} ({explain(error)})"

    def leave(self, error: BaseException | None = None) -> None:
        """This process stops watching and being watched, and tells the others the error that ends it, if any."""
        self._is_waiting = False
        is_shared = self._is_survivor or isinstance(error, StoppedOnRequest)
        self._leaving = "" if error is None or is_shared else f"{type(error).__name__}: {explain(error)}"
        self._wake.set()
        if self.others and self._store is not None:
            self._told.wait(timeout=CALL)

    # ---- threads ------------------------------------------------------------------------------------------

    def _talk(self) -> None:
        """Exchange with the store, until leaving or for as long as it answers."""
        beat, moved, silent = 0, time.monotonic(), False
        try:
            while True:
                store, asked = self._store, self._asked.is_set()
                if asked:
                    self._asked.clear()
                if self._leaving is not None:
                    store.append("left", json.dumps([self.me, self._leaving]) + "\n")
                    if self._leaving:
                        store.add("alarms", 1)
                    return
                store.add(f"beat/{self.me}", 1)
                count, now = store.add(f"beat/{self.next}", 0), time.monotonic()
                if count != beat:
                    beat, moved, silent = count, now, False
                is_new = now - moved > SILENCE and not silent
                silent = silent or is_new
                if asked or (is_new and self.next not in self._view.left):
                    store.add("alarms", 1)
                self._view = self._look(store)
                self._wake.wait(PERIOD if self._alarm_at == 0 else PERIOD / 4)
                self._wake.clear()
        except RuntimeError:  # of torch.distributed: the launcher that holds the store has ended
            self._store = None
        finally:
            self._told.set()

    def _look(self, store: Any) -> View:
        """What the store says; answers a new alarm."""
        alarm = store.add("alarms", 0)
        answered: set[int] = set()
        left: dict[int, str] = {}
        if alarm > self._view.alarm:
            store.append(f"alive/{alarm}", f"{self.me},")
            self._alarm_at = time.monotonic()
        if alarm:
            answered = {int(rank) for rank in store.get(f"alive/{alarm}").decode().split(",") if rank}
        if store.check(["left"]):
            left = dict(json.loads(line) for line in store.get("left").decode().splitlines())
        return View(time.monotonic(), alarm, answered, left)

    def _judge(self) -> None:
        """End this process if it waits for one that is lost."""
        known: set[int] = set()
        while self._leaving is None:
            time.sleep(PERIOD / 2)
            now = time.monotonic()
            gone = {peer.rank for peer in self.near if not is_running(peer)}
            if not gone <= known | self._view.left.keys():
                known |= gone
                self._asked.set()
                self._wake.set()
                self._alarm_at = self._alarm_at or now
            is_store_silent = self._store is not None and now - self._view.time > SILENCE
            if is_store_silent:
                self._alarm_at = self._alarm_at or now
            if self._alarm_at == 0 or now - self._alarm_at < GRACE:
                continue
            lost = self._lost(is_fresh=self._store is not None and not is_store_silent)
            if is_store_silent and not lost:
                lost = f"the launcher's store on {os.environ.get('MASTER_ADDR')}, or that machine, does not answer"
            if lost and self._is_waiting:
                self._end(lost)
            self._alarm_at = 0.0  # all have answered

    def _lost(self, is_fresh: bool) -> str:
        """The ranks that died, ended with an error or do not answer, as a clause; "" for none.

        Args:
            is_fresh: whether the store has been heard since it mattered; if not, only who died here is known.
        """
        view = self._view
        died, silent, ended = [], [], []
        for peer in self.others:
            if view.left.get(peer.rank):
                ended.append(f"{peer} ended with an error of its own ({view.left[peer.rank]})")
            elif peer.rank in view.left:
                continue
            elif peer in self.near and not is_running(peer):
                died.append(peer)
            elif is_fresh and peer.rank not in view.answered:
                silent.append(peer)
        parts = [f"{_names(died)} died"] if died else []
        parts += [f"{_names(silent)} died, or cannot be reached"] if silent else []
        return " and ".join(parts + ended[:SHOWN])

    def _end(self, lost: str) -> None:
        text = f"error: Training stopped: {lost}, and this one waits for it in vain; the last checkpoint counts.\n"
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            os.write(2, text.encode())
        os._exit(3)


def _names(peers: Sequence[Peer]) -> str:
    more = f" and {len(peers) - SHOWN} more" if len(peers) > SHOWN else ""
    return ", ".join(map(str, peers[:SHOWN])) + more


def launcher_store(prefix: str) -> Any:
    """The store of this run's launcher, for keys below `prefix`; None where there is none."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if host is None or not port.isdecimal():
        return None
    wait = timedelta(seconds=10)
    try:
        store = TCPStore(host, int(port), is_master=False, timeout=wait, wait_for_workers=False)
    except RuntimeError:
        return None
    return PrefixStore(f"qlora/{prefix}", store)


def watch_peers(accelerator: Any) -> PeerWatch:
    """Begin to watch the other processes of the run; to be called on all of them, and left by all."""
    if accelerator.num_processes == 1:
        return PeerWatch(0, [])
    from accelerate.utils import gather_object

    peers = gather_object([this_process(accelerator.process_index)])
    peers = sorted((Peer(*peer) for peer in peers), key=lambda peer: peer.rank)
    return PeerWatch(accelerator.process_index, peers, launcher_store(peers[0].token)).start()
