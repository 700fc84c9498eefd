"""Python programs that start in a tenth of a second: forked from a process that has imported what they import.

    run([sys.executable, "train.py", "--model", ...], cwd=ROOT, capture_output=True)    as subprocess.run
    Program([sys.executable, "-m", "eval", ...], cwd=ROOT, stdout=PIPE)                 as subprocess.Popen

train.py imports for five seconds, and then trains a test's model in one. The server (one for each process that
asks) imports once, computes nothing, has no threads, and forks a process for each program. That is a child of the
caller as any other, with its own descriptors, directory, environment, signals, session and exit code.
tests/test_fork_server.py compares it with real starts.

Not for programs that are about their start: imports, memory at the start, or settings that libraries read while
they are imported (`READ_AT_IMPORT`).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from subprocess import PIPE, CompletedProcess
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
READ_AT_IMPORT = ("HF_", "TRANSFORMERS_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "LD_", "PYTHON", "BNB_")
SET_BY_IMPORTS = {"KMP_DUPLICATE_LIB_OK"}  # scikit-learn sets it, in whichever process imports it
PR_SET_CHILD_SUBREAPER, PR_SET_NAME = 36, 15
LONGEST = 2**17  # bytes of a request

# ---- who asks ---------------------------------------------------------------------------------------------


class Program(subprocess.Popen):  # type: ignore[type-arg]
    """`subprocess.Popen` of [sys.executable, SCRIPT or -m MODULE or -c CODE, ...], forked by the server."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        _, preexec_fn, _, pass_fds, cwd, env, _, _, shell = rest[:9]
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[9:15]
        words = [os.fspath(word) for word in args]
        if words[0] != sys.executable or shell or preexec_fn or pass_fds:
            raise ValueError(f"the server does not start {words}")
        request = {
            "words": words[1:], "directory": os.path.abspath(os.fspath(cwd or ".")), "caller": os.getpid(),
            "environment": dict(os.environ if env is None else env), "new_session": rest[20],
        }  # fmt: skip
        given = ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))
        try:
            self.pid = Server.own().fork(request, [own if fd == -1 else fd for fd, own in given])
            self._child_created = True
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]


def run(
    args: Any, input: Any = None, capture_output: bool = False, timeout: float | None = None, **options: Any
) -> CompletedProcess[Any]:
    """`subprocess.run` of a `Program`."""
    if capture_output:
        options |= {"stdout": PIPE, "stderr": PIPE}
    if input is not None:
        options["stdin"] = PIPE
    check = options.pop("check", False)
    with Program(args, **options) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = CompletedProcess(args, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


class Server:
    """A server, and the socket to it."""

    _of_process: tuple[int, Server] | None = None
    _lock = threading.Lock()

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.environment = connection, dict(os.environ)

    @classmethod
    def own(cls) -> Server:
        """This process's server, started by its first request; it ends with this process."""
        with cls._lock:
            if cls._of_process is None or cls._of_process[0] != os.getpid():
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                    )  # fmt: skip
                cls._of_process = os.getpid(), cls(ours)
                atexit.register(lambda: (ours.close(), process.wait()))
            return cls._of_process[1]

    @classmethod
    def fork_own(cls) -> None:
        """Let this process's server be a fork of it as it is now; it must have no threads yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork() == 0:
            ours.close()
            end(exit_code(serve(theirs)))
        theirs.close()
        cls._of_process = os.getpid(), cls(ours)

    def fork(self, request: dict[str, Any], descriptors: list[int]) -> int:
        """Start a program with these three descriptors; returns its process id.

        Raises:
            ValueError: it needs an environment that is read while libraries are imported.
        """
        asked = request["environment"]
        names = {name for name in asked.keys() | self.environment if name.startswith(READ_AT_IMPORT)}
        names -= SET_BY_IMPORTS
        other = sorted(name for name in names if asked.get(name) != self.environment.get(name))
        if other:
            raise ValueError(f"{', '.join(other)} would come too late: start a process of its own")
        message = json.dumps(request).encode()
        if len(message) > LONGEST:
            raise ValueError(f"a request of {len(message)} bytes")
        with self._lock, _adopting():
            socket.send_fds(self.connection, [message], descriptors)
            answer = self.connection.recv(100)
        if not answer:
            raise RuntimeError("the fork server is gone")
        return int(answer)


class _adopting:  # noqa: N801
    """Meanwhile this process becomes the parent of its descendants whose parents end."""

    def __enter__(self) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def __exit__(self, *_: object) -> None:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def execute_launcher(words: list[str]) -> None:
    """Execute torchrun or accelerate, its processes forked; their names are "rank 0", "rank 1", ..."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    Server.fork_own()
    subprocess_handler.Popen = Program  # type: ignore[attr-defined]
    execute(words)


LAUNCHER = ["-c", "import sys; from tests.fork_server import execute_launcher; execute_launcher(sys.argv[1:])"]

# ---- the server -------------------------------------------------------------------------------------------


def serve(connection: socket.socket) -> list[str]:
    """Answer requests until the other end is closed; returns only in forked processes, what each shall run."""
    interrupt = signal.signal(signal.SIGINT, lambda *_: None)  # may come for the whole group
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, LONGEST, 3)
        if not message:
            os._exit(0)
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in what is forked"
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:  # it ends at once, so that the caller becomes the parent of its child
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
                os._exit(0)
            for fd in (read, write):
                os.close(fd)
            connection.close()
            signal.signal(signal.SIGINT, interrupt)
            return enter(json.loads(message), descriptors)
        for fd in (write, *descriptors):
            os.close(fd)
        os.waitpid(middle, 0)
        connection.send(os.read(read, 100))
        os.close(read)


def enter(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Become the process that was asked for; returns what it shall run."""
    while os.getppid() != request["caller"]:
        time.sleep(0.001)
    if request["new_session"]:
        os.setsid()
    os.chdir(request["directory"])
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, fd in enumerate(descriptors):
        os.dup2(fd, number)
    for fd in descriptors:
        if fd > 2:
            os.close(fd)
    words = list(request["words"])
    unbuffered = words[0] == "-u"
    open_streams(unbuffered)
    if "RANK" in os.environ:  # in /proc stands the server's environment
        ctypes.CDLL(None).prctl(PR_SET_NAME, f"rank {os.environ['RANK']}".encode(), 0, 0, 0)
    random.seed()
    numpy, torch = sys.modules["numpy"], sys.modules["torch"]
    numpy.random.seed()
    if os.environ.get("OMP_NUM_THREADS") != threads:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    return words[unbuffered:]


def open_streams(unbuffered: bool = False) -> None:
    """stdin, stdout and stderr of the present descriptors, as the interpreter opens them."""
    unbuffered |= bool(os.environ.get("PYTHONUNBUFFERED"))
    streams = []
    for number, before in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        is_raw = unbuffered and number > 0
        binary = open(number, "wb" if number else "rb", buffering=0 if is_raw else -1, closefd=False)  # noqa: SIM115
        line_buffering = not is_raw and (number == 2 or binary.isatty())
        streams.append(io.TextIOWrapper(binary, before.encoding, before.errors, None, line_buffering, is_raw))
    sys.stdin, sys.stdout, sys.stderr = streams
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]


def execute(words: list[str]) -> None:
    """A script, -m and a module, or -c and code, as the interpreter would run it."""
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], os.getcwd()
        sys.modules.pop(words[1], None)  # it was imported for others
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
        return
    path = os.path.abspath(words[0])
    sys.argv, sys.path[0] = words, os.path.dirname(path)
    main.__file__, main.__loader__ = path, SourceFileLoader("__main__", path)
    main.__dict__["__cached__"] = None
    exec(compile(Path(path).read_bytes(), path, "exec"), main.__dict__)


def exit_code(words: list[str]) -> int:
    """Execute a program; returns the interpreter's exit code, or a signal's number less than zero."""
    try:
        execute(words)
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def end(code: int) -> None:
    """End as the interpreter does, without taking apart what was imported, which takes half a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    import gc

    import tests.processes  # noqa: F401  # what programs import

    gc.collect()
    gc.freeze()
    words = serve(connection)
    end(exit_code(words))
