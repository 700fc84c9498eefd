"""Faults injected for real into `train.py`: signals, full and read-only disks, a memory limit, a dead process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

import train as program
from qlora.cli import exits
from qlora.lora.trainable import lora_parameters
from qlora.system.errors import TrainingStopped
from qlora.training.checkpoint import list_checkpoints, read_state
from qlora.training.progress import Progress
from tests import fork_server
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer
from tests.training.test_loop import adapted, limit_memory, make_examples, run

ROOT = Path(__file__).parents[2]
ENDLESS = ["--max-steps", "100000"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a small run: a random model, 24 rows, windows of 8."""
    directory = tmp_path_factory.mktemp("job")
    save_tiny_llama(directory / "model", tokenizer=tiny_tokenizer())
    rows = [{"prompt": f"What is {n} times {n}?", "completion": f"{n * n}. " * (1 + n % 4)} for n in range(24)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(directory / "model"), "--data", str(directory / "data.jsonl"), "--max-length", "128"]
    return [*flags, "--compute-dtype", "float32", "--learning-rate", "1e-3", "--warmup-steps", "1"]


def start(*arguments: str, launcher: Sequence[str] = ()) -> subprocess.Popen[str]:
    return fork_server.Program(
        [sys.executable, *launcher, str(ROOT / "train.py"), *arguments], cwd=ROOT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def train(*arguments: str) -> tuple[int, str, str]:
    return finish(start(*arguments))


def train_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """As `train`, in this process: for a run that is not hurt, and needs no second start of Python."""
    capsys.readouterr()
    code = exits.run(program.main, arguments)
    return code, *capsys.readouterr()


def read_lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "metrics.jsonl").read_text() if (directory / "metrics.jsonl").is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def await_steps(process: subprocess.Popen[str], directory: Path, count: int) -> None:
    """Wait until the run has made `count` steps."""
    deadline = time.monotonic() + 120
    while len(read_lines(directory)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_whole(directory: Path, last_step: int) -> None:
    """Metrics of every step to the last, once each, and a whole checkpoint of it."""
    assert [line["step"] for line in read_lines(directory)] == list(range(1, last_step + 1))
    newest = list_checkpoints(directory)[-1]
    assert read_state(newest)["progress"].step == last_step
    assert not list(directory.rglob(".*.tmp"))


# ---- requests to stop -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(*job, *ENDLESS, "--output-dir", str(out))
    await_steps(process, out, 2)
    process.send_signal(number)
    code, _, err = finish(process)
    steps = len(read_lines(out))
    assert code == 4
    assert f"stopped after step {steps} of 100000 ({number.name}); --resume auto goes on from there" in err
    assert "Traceback" not in err
    check_whole(out, steps)
    assert (out / "adapter_model.safetensors").is_file() and (out / "loss.png").is_file()

    if number == signal.SIGTERM:  # and it does go on, to its end
        on = ["--max-steps", str(steps + 2), "--output-dir", str(out), "--resume", "auto"]
        code, said, err = train_here(capsys, *job, *on)
        assert code == 0, err
        assert f"{steps} steps done" in said and "planned for 100000 steps, now for" in said
        check_whole(out, steps + 2)


@pytest.mark.slow
def test_the_time_limit_does_the_same(job: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = train(*job, *ENDLESS, "--output-dir", str(out), "--stop-after", "6s")
    steps = len(read_lines(out))
    assert code == 4 and f"stopped after step {steps} of 100000 (--stop-after)" in err
    if steps:  # a machine that is busy enough spends the time on imports
        check_whole(out, steps)
    else:
        assert list_checkpoints(out) == []


LISTENER = """
import os, sys, time
from qlora.system.signals import StopRequest
with StopRequest(*map(float, sys.argv[1:])) as stop:
    print("ready", flush=True)
    end = time.monotonic() + 20
    while time.monotonic() < end and stop() is None:
        time.sleep(0.01)
    print(stop(), flush=True)
    time.sleep(20)  # a long step
"""


@contextlib.contextmanager
def listener(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENER, *arguments], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_exits_at_once(second: signal.Signals) -> None:
    with listener() as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "SIGINT\n"
        process.send_signal(signal.SIGINT)  # the same request, delivered twice as launchers do
        time.sleep(0.3)
        assert process.poll() is None
        time.sleep(1)
        sent = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=10) == 128 + second
        assert time.monotonic() - sent < 5


def test_a_deadline_asks_without_a_signal() -> None:
    with listener(str(time.monotonic() + 0.3)) as process:
        assert process.stdout is not None and process.stdout.readline() == "--stop-after\n"


def test_the_handlers_are_given_back() -> None:
    from qlora.system.signals import StopRequest

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
        assert stop() is None
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_clock_that_jumps_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines and rates are taken from clocks that nobody sets."""
    from qlora.system.signals import StopRequest

    stop = StopRequest(time.monotonic() + 1000)
    monkeypatch.setattr(time, "time", lambda: 10**12)
    assert stop() is None
    monkeypatch.setattr(time, "time", lambda: -(10**12))
    assert stop() is None
    files = list((ROOT / "qlora").rglob("*.py"))
    assert len(files) > 100 and not any("time.time(" in file.read_text() for file in files)


# ---- disks ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, options: str) -> Iterator[Path]:
    """A tmpfs mounted at `path`; the test is skipped where this user may mount none."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing(job: list[str], tmp_path: Path) -> None:
    """About five of twelve checkpoints fit; the run says so, goes on, and after a clean-up it is all there."""
    flags = [*job, "--epochs", "4", "--save-every", "1"]
    with small_disk(tmp_path / "disk", "size=640k") as disk:
        code, said, err = train(*flags, "--output-dir", str(disk / "out"))
        whole = list_checkpoints(disk / "out")
        assert code == 3 and 1 < len(whole) < 11
        assert re.search(r"step-\d+ could not be written \(.*No space left on device", said)
        assert f"The last state could not be written to {disk}/out" in err
        assert f"--resume auto goes on from {whole[-1].name}" in err and "Traceback" not in err
        for path in whole:
            read_state(path)
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        code, said, err = train(*flags, "--output-dir", str(disk / "out"), "--resume", "auto")
        assert code == 0, err
        assert f"resumed from {whole[-1]}" in said
        check_whole(disk / "out", 12)
        finished = (disk / "out" / "adapter_model.safetensors").read_bytes()
    code, _, err = train(*flags, "--output-dir", str(tmp_path / "reference"))
    assert code == 0, err
    assert finished == (tmp_path / "reference" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_read_only_output_is_refused_before_any_work(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", "ro,size=1m") as disk:
        code, _, err = train_here(capsys, *job, "--output-dir", str(disk / "out"))
    assert code == 2
    assert re.fullmatch(r"error: --output-dir \S+ cannot be written \(.*Read-only.*\); choose another\.\n", err)


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = start(*job, *ENDLESS, "--output-dir", str(out))
    await_steps(process, out, 1)
    code, _, err = train_here(capsys, *job, "--output-dir", str(out), "--resume", "auto")
    assert code == 2 and err.startswith("error: Another run is writing to --output-dir")
    process.terminate()
    assert finish(process)[0] == 4
    check_whole(out, len(read_lines(out)))


# ---- memory -----------------------------------------------------------------------------------------------

LIMITED = """
import contextlib, ctypes, json, resource, sys
M_ARENA_MAX = -8  # one: glibc reserves 64 MiB of addresses for each thread, and that is room within the limit
ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
import numpy, psutil, torch
import matplotlib.pyplot
import qlora.training.loop, train
fit = qlora.training.loop.Trainer.fit
def grow_stack():
    # Where the stack itself cannot grow, the kernel sends SIGSEGV and no code of ours is asked.
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(9000)
    with contextlib.suppress(RecursionError):
        json.loads("[" * 8000 + "]" * 8000)
    sys.setrecursionlimit(limit)
def limited_fit(*arguments, **options):
    grow_stack()
    torch.randn(512, 512) @ torch.randn(512, 512)  # buffers that stay
    numpy.ones((512, 512)) @ numpy.ones((512, 512))
    room = int(float(sys.argv[1]) * 2**20)
    limit = psutil.Process().memory_info().vms + room if room else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fit(*arguments, **options)
qlora.training.loop.Trainer.fit = limited_fit
from qlora.cli.exits import run
sys.exit(run(train.main, sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def wide_job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A step of 4,000 tokens in three micro-batches, each of which leaves about 60 MiB for the backward pass."""
    directory = tmp_path_factory.mktemp("wide")
    width = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    save_tiny_llama(directory / "model", tokenizer=tiny_tokenizer(), **width)
    rows = [{"prompt": "word " * 20, "completion": f"{n} " * 20} for n in range(32)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", str(directory / "model"), "--data", str(directory / "data.jsonl"), "--batch-size", "32"]
    return [*flags, "--compute-dtype", "float32", "--epochs", "3", "--gradient-checkpointing", "off"]


def train_limited(mebibytes: float, *arguments: str) -> tuple[int, str, str]:
    done = fork_server.run(
        [sys.executable, "-c", LIMITED, str(mebibytes), *arguments], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_memory_limit_makes_micro_batches_smaller(wide_job: list[str], tmp_path: Path) -> None:
    code, said, err = train_limited(0, *wide_job, "--output-dir", str(tmp_path / "free"))
    assert code == 0 and "out of memory" not in said, err
    code, said, err = train_limited(60, *wide_job, "--output-dir", str(tmp_path / "tight"))
    assert code == 0, err
    assert 1 <= said.count("out of memory; the step is repeated as") <= 3
    free, tight = read_lines(tmp_path / "free"), read_lines(tmp_path / "tight")
    assert len(free) == len(tight) == 3
    for a, b in zip(free, tight, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)  # the same sums in another order
        assert a["num_tokens"] == b["num_tokens"] and a["target_tokens"] == b["target_tokens"]


@pytest.mark.slow
def test_too_little_memory_for_one_example_is_one_sentence(wide_job: list[str], tmp_path: Path) -> None:
    code, _, err = train_limited(2, *wide_job, "--output-dir", str(tmp_path / "out"))
    assert code == 3 and "Traceback" not in err, err
    assert re.search("error: .*(does not fit in memory|out of memory)", err.splitlines()[-1])


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("can't start new thread"), OSError("disk full")])
def test_a_save_that_fails_does_not_hide_why_training_stopped(
    failure: Exception, job: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a step finds no memory, the save after it may find none: that was a traceback."""
    model, saved, freed = adapted(job[1]), [], []

    def log(line: dict[str, Any]) -> None:
        if line["step"] == 3:
            limit_memory(monkeypatch, 10, MemoryError())

    def save(progress: Progress) -> None:
        if progress.step > 2:
            freed.append(all(parameter.grad is None for parameter in lora_parameters(model)))
            raise failure
        saved.append(progress.step)

    with pytest.raises(TrainingStopped) as stopped:
        run(model, make_examples(), 6, log=log, save=save, save_every=2)
    assert re.fullmatch(
        r"Training stopped at step 4: even a micro-batch of one example does not fit in memory; .*; the state "
        r"before it could not be saved \((MemoryError|can't start new thread|disk full)\); that after step 2 is "
        r"the last saved\.",
        str(stopped.value),
    )
    assert saved == [2] and freed == [True]


# ---- processes --------------------------------------------------------------------------------------------


def training_processes(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Rank -> process, of the children that a launcher started; forked ones have it in their names."""
    ranks = {}
    for child in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            forked = re.fullmatch(r"rank (\d+)", child.name())
            rank = forked[1] if forked else child.environ().get("RANK")
            if forked or (rank is not None and any(word.endswith("train.py") for word in child.cmdline())):
                ranks[int(rank)] = child
    return ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def torchrun() -> list[str]:
    """Two processes."""
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    return [*fork_server.LAUNCHER, *words]


@pytest.mark.slow
def test_two_processes_stop_together(job: list[str], tmp_path: Path) -> None:
    """Ctrl-C reaches launcher and processes, some of them twice; the state of the last step is saved."""
    out = tmp_path / "out"
    process = start(*job, *ENDLESS, "--batch-size", "4", "--output-dir", str(out), launcher=torchrun())
    await_steps(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)
    _, _, err = finish(process)
    steps = len(read_lines(out))
    assert f"stopped after step {steps} of 100000 (SIGINT)" in err
    check_whole(out, steps)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_others_with_the_cause(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], victim: int
) -> None:
    """SIGKILL for one of two; the other names it within 30 s, and one process goes on with the same windows."""
    out = tmp_path / "out"
    flags = [*job, "--output-dir", str(out), "--save-every", "1", "--keep-last", "3"]
    process = start(*flags, *ENDLESS, "--batch-size", "4", launcher=torchrun())
    await_steps(process, out, 3)
    ranks = training_processes(process)
    assert sorted(ranks) == [0, 1]
    killed = time.monotonic()
    ranks[victim].send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert time.monotonic() - killed < 30
    assert code != 0 and not any(rank.is_running() for rank in ranks.values())
    said = f"rank {victim} (host {socket.gethostname()}, process {ranks[victim].pid}) died ("
    assert re.search(
        rf"^error: Training stopped at step \d+: {re.escape(said)}.*is saved\.$", err, re.MULTILINE
    ), err
    assert "exitcode" in err and "-9" in err  # the launcher names the rank that died
    done = read_state(list_checkpoints(out)[-1])["progress"].step
    assert done >= 1
    on = ["--batch-size", "8", "--max-steps", str(done + 2), "--resume", "auto"]
    code, said, err = train_here(capsys, *flags, *on)
    assert code == 0, err
    assert f"{done} steps done" in said
    check_whole(out, done + 2)
