"""What the fork server starts is as if the interpreter had been started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server

FACTS = """
import json, os, random, resource, signal, sys, threading
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": globals().get("__file__"),
    "main": sorted(sys.modules["__main__"].__dict__.keys() - {"__annotations__"}),
    "directory": os.getcwd(), "environment": dict(os.environ), "parent": os.getppid(),
    "own group": os.getpgid(0) == os.getpid(), "own session": os.getsid(0) == os.getpid(),
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)],
    "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))), "umask": os.umask(0),
    "threads": threading.active_count(), "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    "streams": [(s.encoding, s.errors, s.line_buffering, s.isatty()) for s in (sys.stdin, sys.stdout, sys.stderr)],
    "descriptors": sorted(int(n) for n in os.listdir("/proc/self/fd"))[:3],
}, sort_keys=True))
"""


def both(words: list[str], **options: Any) -> list[subprocess.CompletedProcess[Any]]:
    """What a real start and a forked one come to."""
    starts: list[Callable[..., Any]] = [subprocess.run, fork_server.run]
    return [start([sys.executable, *words], capture_output=True, timeout=60, **options) for start in starts]


@pytest.mark.parametrize("kind", ["script", "module", "code"])
@pytest.mark.parametrize("own_session", [False, True])
def test_a_process_is_as_if_started(tmp_path: Path, kind: str, own_session: bool) -> None:
    (tmp_path / "facts.py").write_text(FACTS)
    words = {"script": ["facts.py"], "module": ["-m", "facts"], "code": ["-c", FACTS]}[kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ONLY_HERE": "ä\n"}
    environment.pop("HOME", None)
    words += ["an argument", "--and=more"]
    real, forked = both(words, cwd=tmp_path, env=environment, start_new_session=own_session)
    assert (real.returncode, real.stderr) == (forked.returncode, forked.stderr) == (0, b"")
    assert json.loads(forked.stdout) == json.loads(real.stdout) and b"ONLY_HERE" in real.stdout


@pytest.mark.parametrize(
    "code",
    [
        "pass",
        "import sys; sys.exit(3)",
        "import sys; sys.exit(256 + 4)",
        "import sys; sys.exit('said')",
        "import sys; print('a'); sys.exit()",
        "import os; print('lost'); os._exit(5)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; signal.signal(signal.SIGTERM, lambda *_: print('seen')); os.kill(os.getpid(), 15)",
        "import os; os.abort()",
        "import atexit; atexit.register(print, 'last'); print('first')",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()",
        "import threading, time; threading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "import sys; sys.stdout.buffer.write(b'\\xff\\x00\\n'); sys.stderr.buffer.write(sys.stdin.buffer.read())",
        "import sys; print(sys.stdin.read().upper())",
        "import os; print('before'); os.write(1, b'by itself')",
        "import sys; sys.stdout.close()",
        "import os; print(os.read(0, 3))",
        "import logging; logging.warning('to stderr')",
    ],
)
def test_a_process_ends_as_if_started(code: str) -> None:
    real, forked = both(["-c", code], input=b"from outside \xe2\x82\xac\n")
    assert (forked.returncode, forked.stdout, forked.stderr) == (real.returncode, real.stdout, real.stderr)


@pytest.mark.parametrize("failure", ["raise KeyError('x')", "1 / 0", "raise KeyboardInterrupt", "(", "import nix"])
def test_a_failure_has_its_code_and_its_traceback_s_end(tmp_path: Path, failure: str) -> None:
    (tmp_path / "failing.py").write_text(failure)
    real, forked = both([str(tmp_path / "failing.py")], cwd=tmp_path, text=True)
    assert forked.returncode == real.returncode != 0
    assert forked.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


def test_signals_reach_it_and_its_end_is_known() -> None:
    """As a real child: it waits for nothing, leaves no zombie, and the caller adopts no one else's."""
    # SIGINT is ignored in what a shell starts with "&".
    code = "import signal, time; signal.signal(2, signal.default_int_handler); print('ready'); time.sleep(60)"
    command = [sys.executable, "-u", "-c", code]
    for number, code in ((signal.SIGINT, -2), (signal.SIGTERM, -15), (signal.SIGKILL, -9)):
        process = fork_server.Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n" and process.poll() is None
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == code
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run(command, timeout=0.2, capture_output=True)
    orphan = "import os, time; print(os.fork() and os.getpid() or time.sleep(0.5) or os.getppid(), flush=True)"
    said = fork_server.run([sys.executable, "-c", orphan], capture_output=True, text=True).stdout.split()
    assert len(said) == 2 and str(os.getpid()) not in said


def test_processes_are_independent() -> None:
    """Random numbers differ, what one changes the next does not see, and several run at once."""
    code = "import random, numpy, os; print(random.random(), numpy.random.rand()); random.marked = os.x = 1"
    first, second = (fork_server.run([sys.executable, "-c", code], capture_output=True).stdout for _ in range(2))
    assert first != second and len(set(first.split() + second.split())) == 4
    code = "import os, random; assert not hasattr(os, 'x') and not hasattr(random, 'marked')"
    fork_server.run([sys.executable, "-c", code], check=True)
    started = time.monotonic()
    sleepers = [fork_server.Program([sys.executable, "-c", "import time; time.sleep(1)"]) for _ in range(5)]
    assert [sleeper.wait() for sleeper in sleepers] == [0] * 5 and time.monotonic() - started < 4


def test_threads_of_torch_are_as_many_as_the_environment_says() -> None:
    code = "import torch; print(torch.get_num_threads())"
    for count in ("1", "2"):
        real, forked = both(["-c", code], env={**os.environ, "OMP_NUM_THREADS": count})
        assert forked.stdout == real.stdout == f"{count}\n".encode()


def test_what_the_server_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE, MALLOC_ARENA_MAX would come too late"):
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "MALLOC_ARENA_MAX": "1"}
        fork_server.run([sys.executable, "-c", "pass"], env=environment)
    with pytest.raises(ValueError, match="does not start"):
        fork_server.run(["ls"])
