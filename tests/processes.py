"""Processes that know their rank as torchrun would tell it, forked once everything is imported.

    python -m tests.processes 2 train.py --model M --data train.jsonl
    python -m tests.processes 2 -m eval choice --model M --data test.jsonl

does what torchrun --nproc_per_node 2 would, with one process' imports in the place of three's, and no elasticity.
"""

from __future__ import annotations

import importlib
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from qlora.system.startup import collection_paused, importing_transformers, limit_spinning
from tests import fork_server

limit_spinning()
with collection_paused(), importing_transformers():
    import torch
    import torch.distributed
    import torch.multiprocessing
    import transformers.modeling_utils  # noqa: F401
    from accelerate import Accelerator  # noqa: F401

    for name in (  # what training, evaluating and answering import later
        "qlora.cli.commands.train", "qlora.cli.commands.generate", "qlora.training.run", "qlora.export.hub",
        "qlora.export.merge", "qlora.report.loss_figure", "eval.choice", "eval.exact_match", "tyro", "typeguard",
        "docstring_parser", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
        "PIL.JpegImagePlugin", "numpy.ctypeslib", "tokenizers.trainers", "transformers.convert_slow_tokenizer",
        "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto",
    ):  # fmt: skip
        importlib.import_module(name)

ROOT = Path(__file__).parent.parent


def run_processes(size: int, work: Callable[..., object], *arguments: Any, timeout: float = 1800) -> None:
    """Call work(*arguments) in so many processes.

    This process must not have computed with more than one thread: a forked one has no others.

    Raises:
        ProcessRaisedException, ProcessExitedException: the first that failed, with its traceback; the others are
            ended.
        TimeoutError: they are not done after so many seconds, and are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _enter, (size, port, work, arguments), nprocs=size, join=False, start_method="fork"
    )
    try:
        end = time.monotonic() + timeout
        while not context.join(max(0, end - time.monotonic()), grace_period=2):
            if time.monotonic() >= end:
                raise TimeoutError(f"{size} processes were not done after {timeout:g} seconds")
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _enter(rank: int, size: int, port: int, work: Callable[..., object], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if size > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(rank)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(size)
    work(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(size: int, *arguments: str, timeout: float = 300) -> CompletedProcess[str]:
    """A script, or -m and a module, with its arguments in so many processes, and what they said."""
    return fork_server.run(
        [sys.executable, "-m", "tests.processes", str(size), *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def run_program(*arguments: str) -> None:
    """A script, or -m and a module, with its arguments, in this process.

    Raises:
        SystemExit: it ends with another code than 0.
    """
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise


if __name__ == "__main__":
    run_processes(int(sys.argv[1]), run_program, *sys.argv[2:])
