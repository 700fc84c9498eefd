"""A map over chunks in other processes: same results, same order, and no process survives when one dies.

Each worker has a pipe of its own and one chunk at a time. A pipe ends with its process, so each side sees at
once that the other is gone, whatever took it:

    a worker dies          the others are killed, and TrainingStopped names the cause
    the parent dies        every worker exits, after its chunk at the latest
    Ctrl-C                 reaches all processes; the workers ignore it, the parent kills them

(concurrent.futures has no watch on a worker that it spawned while it waited, Python 3.11, and hung one run in
four when that one was killed.) Workers are spawned, not forked: the tokenizer and torch have threads, whose
locks a fork would copy as they stand. So a script that uses them needs its `if __name__ == "__main__"`.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from qlora.system.errors import TrainingStopped


def map_chunks(
    function: Callable[[Any], Any], chunks: Iterable[Any], num_workers: int
) -> Generator[Any, None, None]:
    """map(function, chunks); with num_workers > 0 in that many processes. Close it to end them early.

    Args:
        function: picklable; an exception in it is the death of a worker, which prints the traceback.
    Raises:
        TrainingStopped: a worker died.
    """
    if num_workers == 0:
        yield from map(function, chunks)
        return
    context = multiprocessing.get_context("spawn")
    # As bytes, which a new process takes at once: it would import what they need before it had read them all.
    pickled = pickle.dumps(function)
    workers: dict[Any, Any] = {}  # our end of the pipe: process
    busy: dict[Any, int] = {}  # our end of the pipe: which chunk
    done: dict[int, Any] = {}  # results that wait for an earlier one
    num_yielded = 0
    pipe: Any
    try:
        for _ in range(num_workers):
            pipe, their_end = context.Pipe()
            process = context.Process(target=_serve, args=(their_end, pickled), daemon=True)
            with _name_the_dead(process):
                process.start()
            workers[pipe] = process
            their_end.close()  # else it would stay open after the worker's death
        numbered = enumerate(chunks)
        idle = list(workers)
        while True:
            while idle and (item := next(numbered, None)):
                pipe = idle.pop()
                with _name_the_dead(workers[pipe]):
                    pipe.send(item[1])
                busy[pipe] = item[0]
            while num_yielded in done:
                yield done.pop(num_yielded)
                num_yielded += 1
            if not busy:
                return
            for pipe in wait(list(workers)):
                with _name_the_dead(workers[pipe]):
                    result = pipe.recv()
                done[busy.pop(pipe)] = result
                idle.append(pipe)
    finally:
        for pipe, process in workers.items():
            pipe.close()
            process.kill()
            process.join()


@contextmanager
def _name_the_dead(process: Any) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # the other end of the pipe is gone
        raise TrainingStopped(
            f"A worker process died ({_cause_of_death(process)}); if memory ran out, pass a smaller --num-workers."
        ) from error


def _cause_of_death(process: Any) -> str:
    if process.pid is None:
        return "it did not start"
    process.join()
    code = process.exitcode
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.strsignal(-code)}"


def _serve(pipe: Any, pickled: bytes) -> None:
    """Answer each chunk with its result, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    function = pickle.loads(pickled)
    while True:
        try:
            chunk = pipe.recv()
        except (EOFError, OSError):
            return
        result = function(chunk)
        try:
            pipe.send(result)
        except OSError:
            return
