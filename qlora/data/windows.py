"""Long conversations in pieces: rendering every beginning of one would take time that grows with its square.

    window   some turns, after the system text and the user's turn that the first of them answers
    block    a window of BLOCK answers, two more before them and one after

Whether a template writes the turns of a window as it writes them in the whole conversation is not known before:
who renders windows compares their texts with the whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

Messages = list[dict[str, Any]]
LONG = 32  # answers; conversations up to here are rendered whole
BLOCK = 16
OVERLAP = 2


class Windows:
    """The windows of one conversation."""

    def __init__(self, messages: Messages) -> None:
        self.messages = messages
        self.answers, self.users = (
            [index for index, turn in enumerate(messages) if turn["role"] == role]
            for role in ("assistant", "user")
        )
        self.is_long = len(self.answers) > LONG

    def blocks(self) -> Iterator[tuple[Messages, int, int]]:
        """Yield (block, number of its parts to skip, number of parts to take) for all answers but the last.

        Part 0 of a block is what stands before its first answer. The parts taken belong to consecutive answers.
        """
        last = len(self.answers) - 1
        for start in range(0, last, BLOCK):
            end, first = min(start + BLOCK, last), max(0, start - OVERLAP)
            stop = self.answers[end + 1] if end < last else len(self.messages)
            yield self._window(self.answers[first], stop), 1 + start - first, end - start

    def __iter__(self) -> Iterator[Messages]:
        """Windows that end with an answer and hold, together, all turns up to the last; a short one is whole."""
        if not self.is_long:
            yield self.messages
            return
        for start in range(0, len(self.answers), BLOCK):
            end = min(start + BLOCK, len(self.answers))
            yield self._window(self.answers[max(0, start - OVERLAP)], self.answers[end - 1] + 1)

    def until(self, index: int) -> Messages:
        """The turns up to an answer; of a long conversation a window that ends with it."""
        if not self.is_long:
            return self.messages[: index + 1]
        number = bisect_right(self.answers, index) - 1
        return self._window(self.answers[max(0, number - OVERLAP)], index + 1)

    def _window(self, first: int, end: int) -> Messages:
        """messages[first:end], which begins with an answer, after what it needs."""
        user = self.users[max(0, bisect_right(self.users, first) - 1)]
        head = self.messages[:1] if self.messages[0]["role"] == "system" else []
        return [*head, self.messages[user], *self.messages[first:end]]
