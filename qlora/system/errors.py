"""The errors a user may meet."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user can mend: the message says what, which value, and what to do."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (non-finite losses, a process that died); the last good state is saved."""


class CheckFailed(RuntimeError):
    """A result is outside the bounds that were asked for."""


class StoppedOnRequest(Exception):
    """A signal or --stop-after ended the run between two steps; its state is saved."""
