"""What a user may get wrong, and how an entry point says so: one sentence and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


class InputError(ValueError):
    """Something the user can mend: the message says what, which value, and what to do."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (a non-finite loss, an adapter without gradient); the last good state is saved."""


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Call an entry point; an expected failure becomes one sentence on standard error.

    Returns:
        Exit code: 0 done, 2 the input is at fault, 3 training stopped by itself, 130 interrupted.
        With --debug among `argv` the traceback is shown instead.
    """
    try:
        main(argv)
        return 0
    except (InputError, TrainingStopped, OSError) as error:
        if "--debug" in argv:
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3 if isinstance(error, TrainingStopped) else 2
    except KeyboardInterrupt:
        print("interrupted; --resume auto continues from the last checkpoint", file=sys.stderr)
        return 130
