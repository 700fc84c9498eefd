"""Print an answer while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class AnswerStream:
    """A streamer for transformers' generate: passes on the answer's text as tokens arrive.

    White space and unfinished characters at the end are held back, so `shown` is a prefix of the stripped answer.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] | None = None  # None until the prompt arrives
        self.shown = ""
        self.is_stopped = False

    def stop(self, _number: int, _frame: Any) -> None:
        """SIGINT handler: stop at the next token; a second signal stops at once.

        Between tokens nothing is half done; Python's own handler could raise anywhere.
        """
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True

    def put(self, value: Any) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        if self.ids is None:
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        ready = text.rstrip("\ufffd").rstrip()
        if ready.startswith(self.shown):
            self.write(ready[len(self.shown) :])
            self.shown = ready

    def end(self) -> None:
        pass
