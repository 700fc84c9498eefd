"""Find out which process of a run died: a collective only says that "a peer" is gone, or waits forever.

torchrun's agent ends the ranks of its own machine when one of them dies. It does not say whose death broke a
collective, and misses a frozen rank or a machine that vanished without closing its connections. So the ranks watch
one another through the launcher's store (the TCPStore at MASTER_ADDR:MASTER_PORT, which outlives them). Under the
key rank/R each rank writes a count that it raises once a second and, when it leaves, the error that ended it. It
reads all other ranks' in one request (128 ranks: 1 ms), less often the more there are.

A rank whose collective fails names the ranks that are gone from this machine, whose count has stopped, or that
left with an error (`describe`); then it saves and stops. A rank that keeps waiting in a collective (NCCL within a
machine; a machine without power) ends itself GRACE seconds after it detects a loss, since nothing can interrupt
the wait: the last checkpoint counts. If the count moves again before that, nothing happens.

SILENCE + GRACE and two checks make 24 s, so that a run ends within 30 s of a death.
"""

from __future__ import annotations

import contextlib
import itertools
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

PERIOD = 1.0  # seconds between two checks
SILENCE = 12.0  # seconds without a heartbeat that count as a loss
CALL = 4.0  # seconds that a rank whose collective failed waits for heartbeats
GRACE = 10.0  # seconds from a loss until a rank that still waits ends itself
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
    """Whether a process of this machine is still running, not a zombie."""
    try:
        process = psutil.Process(peer.pid)
        return process.create_time() == peer.started and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class View(NamedTuple):
    """The store's last state, by rank, read at `time` (time.monotonic())."""

    time: float
    beats: dict[int, int]
    heard: dict[int, float]  # when its count last moved
    left: dict[int, str]  # the error that ended it; "" = none


class PeerWatch:
    """Watches the other processes from `start` to `leave`.

    Args:
        me: this process's rank.
        peers: all processes.
        store: shared by all; None: watch only the processes on this machine.
    """

    def __init__(self, me: int, peers: Sequence[Peer], store: Any = None) -> None:
        own = next((peer for peer in peers if peer.rank == me), None)
        self.me, self.others = me, [peer for peer in peers if peer.rank != me]
        self.near = [p for p in self.others if own and p[1:3] == own[1:3] and is_running(p)]
        now = time.monotonic()
        self._store, self._view = store, View(now, {}, {peer.rank: now for peer in self.others}, {})
        self._wake, self._told = threading.Event(), threading.Event()
        self._leaving: str | None = None
        self._is_waiting, self._is_survivor = True, False

    def start(self) -> PeerWatch:
        if self.others:
            threading.Thread(target=self._check_peers, daemon=True).start()
            if self._store is not None:
                threading.Thread(target=self._send_heartbeats, daemon=True).start()
        return self

    # ---- from the training loop ---------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop guarding: the loop has left its collectives, so this process must not be ended."""
        self._is_waiting = False

    def describe(self, error: BaseException) -> str:
        """Name the processes that a failed collective has lost, as a clause; takes at most CALL seconds."""
        self.stop()
        self._is_survivor, asked, first = True, time.monotonic(), 0.0
        self._wake.set()
        while time.monotonic() < asked + CALL:
            view = self._view
            if not first and view.time > asked:
                first = view.time  # a heartbeat seen by then may be older than the error
            known = {*view.left, *(peer.rank for peer in self.near if not is_running(peer))}
            known |= {rank for rank, heard in view.heard.items() if first and heard > first}
            if (first or self._store is None) and known.issuperset(peer.rank for peer in self.others):
                break
            time.sleep(0.05)
        lost = self._lost(first)
        if not lost:
            suspects = [p for p in self.others if p not in self.near and p.rank not in self._view.left]
            lost = f"{'one of ' * (len(suspects) > 1)}{_names(suspects)} died, or cannot be reached"
            if first or not suspects:
                lost = "the connection to another process broke, though all of them answer"
        return f"{lost} ({explain(error)})"

    def leave(self, error: BaseException | None = None) -> None:
        """Stop watching and being watched; tell the others the error that ends this process, if any."""
        self._is_waiting = False
        is_shared = self._is_survivor or isinstance(error, StoppedOnRequest)
        self._leaving = "" if error is None or is_shared else f"{type(error).__name__}: {explain(error)}"
        self._wake.set()
        if self.others and self._store is not None:
            self._told.wait(timeout=CALL)

    # ---- threads ------------------------------------------------------------------------------------------

    def _send_heartbeats(self) -> None:
        """Write to and read from the store until this process leaves or the store stops answering."""
        store, keys = self._store, [f"rank/{peer.rank}" for peer in self.others]
        try:
            for beat in itertools.count(1):
                leaving = self._leaving
                store.set(f"rank/{self.me}", json.dumps([beat, leaving]))
                if leaving is not None:
                    return
                if beat == 1:
                    for key in keys:  # reading a missing key would wait for it
                        store.compare_set(key, "", "[0, null]")
                if beat % (1 + len(keys) // 128) == 0 or self._is_survivor:
                    self._view = self._look(store.multi_get(keys))
                self._wake.wait(PERIOD / 4 if self._is_survivor else PERIOD)
                self._wake.clear()
        except RuntimeError:  # from torch.distributed: the launcher that holds the store has ended
            self._store = None
        finally:
            self._told.set()

    def _look(self, texts: Sequence[bytes]) -> View:
        """Parse the other ranks' keys."""
        now, last = time.monotonic(), self._view
        states = {peer.rank: json.loads(text) for peer, text in zip(self.others, texts, strict=True)}
        beats = {rank: count for rank, (count, _) in states.items()}
        heard = {rank: last.heard[rank] if beats[rank] == last.beats.get(rank) else now for rank in beats}
        return View(now, beats, heard, {rank: why for rank, (_, why) in states.items() if why is not None})

    def _check_peers(self) -> None:
        """End this process if it waits for a lost one."""
        since = 0.0  # when the loss was detected
        while self._leaving is None:
            time.sleep(PERIOD / 2)
            now, heard_of = time.monotonic(), self._view.time
            is_silent = self._store is not None and now - heard_of > SILENCE
            lost = self._lost(0 if self._store is None or is_silent else heard_of - SILENCE)
            if is_silent and not lost:
                lost = f"the launcher's store on {os.environ.get('MASTER_ADDR')}, or that machine, does not answer"
            since = (since or now) if lost else 0.0
            if lost and now - since >= GRACE and self._is_waiting:
                self._end(lost)

    def _lost(self, since: float) -> str:
        """The ranks that died, ended with an error or have been silent since `since`, as a clause; "" for none."""
        view = self._view
        rest = [peer for peer in self.others if peer.rank not in view.left]
        died = [peer for peer in rest if peer in self.near and not is_running(peer)]
        silent = [peer for peer in rest if peer not in died and view.heard[peer.rank] <= since]
        ended = [
            f"{peer} ended with an error of its own ({view.left[peer.rank]})"
            for peer in self.others
            if view.left.get(peer.rank)
        ]
        parts = [f"{_names(died)} died"] if died else []
        parts += [f"{_names(silent)} died, or cannot be reached"] if silent else []
        return " and ".join(parts + ended[:SHOWN])

    def _end(self, lost: str) -> None:
        text = (
            f"error: Training stopped: {lost}, and this process would wait forever; the last checkpoint counts.\n"
        )
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            os.write(2, text.encode())
        os._exit(3)


def _names(peers: Sequence[Peer]) -> str:
    more = f" and {len(peers) - SHOWN} more" if len(peers) > SHOWN else ""
    return ", ".join(map(str, peers[:SHOWN])) + more


def launcher_store(prefix: str) -> Any:
    """The store of this run's launcher, for keys below `prefix`; None if there is none."""
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
    """Start to watch the other processes of the run; call on all of them, and call `leave` on all."""
    if accelerator.num_processes == 1:
        return PeerWatch(0, [])
    from accelerate.utils import gather_object

    peers = gather_object([this_process(accelerator.process_index)])
    peers = sorted((Peer(*peer) for peer in peers), key=lambda peer: peer.rank)
    return PeerWatch(accelerator.process_index, peers, launcher_store(peers[0].token)).start()
