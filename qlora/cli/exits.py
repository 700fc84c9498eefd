"""Run an entry point: a failure becomes one sentence on standard error and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from qlora.system.errors import CheckFailed, InputError, StoppedOnRequest, TrainingStopped
from qlora.system.redact import redact
from qlora.system.startup import limit_spinning

CUT_OFF = 141  # as a shell reports SIGPIPE


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Call an entry point; print an expected failure as one sentence on standard error.

    Returns:
        Exit code: 0 success; 2 bad input or a disk error; 3 training failed or a check failed; 4 stopped on
        request, state saved; 130 interrupted outside training; 141 the reader of standard output closed the pipe
        (`| head`), without a message. (A second signal in training: 128 + its number.) --debug in `argv` shows the
        traceback instead.
    """
    limit_spinning()
    try:
        main(argv)
        _leave_process_group()
        return CUT_OFF if _is_cut_off() else 0
    except SystemExit:  # of --help
        if _is_cut_off():
            return CUT_OFF
        raise
    except StoppedOnRequest as request:
        return _say(str(request), 4)
    except KeyboardInterrupt:
        return _say("interrupted; saved files are intact", 130)
    except (InputError, TrainingStopped, CheckFailed, OSError, RuntimeError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _is_cut_off("\n"):
            return CUT_OFF
        from qlora.system.memory import is_out_of_memory  # imports torch, which --help does not need

        expected = isinstance(error, (InputError, TrainingStopped, CheckFailed, OSError))
        if "--debug" in argv or not (expected or is_out_of_memory(error)):
            raise
        if not expected:
            hint = "lower --batch-size or --max-length, or pass --gradient-checkpointing on"
            return _say(f"error: out of memory ({error}); {hint}.", 3)
        return _say(f"error: {error}", 3 if isinstance(error, (TrainingStopped, CheckFailed)) else 2)


def _leave_process_group() -> None:
    """Stop torch.distributed's threads, which can make the interpreter abort at exit and look like a failure."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_cut_off(probe: str = "") -> bool:
    """Whether the reader of standard output is gone; what is still to be written is then dropped.

    Args:
        probe: written there to find out, since a long text that failed leaves nothing to write.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.write(probe)
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _say(text: str, code: int) -> int:
    print(redact(" ".join(text.split())), file=sys.stderr)
    return code
