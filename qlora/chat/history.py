"""A conversation, and the .jsonl file that saves it as training data."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.data.conversations import to_messages
from qlora.data.readers import read_records
from qlora.system.errors import InputError
from qlora.system.files import new_file


@dataclass
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    is_whole: bool = True  # False: cut at max_new_tokens
    answered_by: str | None = None  # None: unknown, in a resumed conversation


def to_turns(messages: Sequence[dict[str, Any]]) -> tuple[str, list[Turn]]:
    """Split what `to_messages` returns into (system message or "", turns)."""
    system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    texts = [message for message in messages if message["role"] != "system"]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return system, [Turn(ask["content"], answer["content"], answer.get("weight") != 0) for ask, answer in pairs]


def from_turns(system: str, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The conversation in OpenAI's format."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        messages.append({"role": "assistant", "content": turn.answer} | ({} if turn.is_whole else {"weight": 0}))
    return messages


class History:
    """A .jsonl file with one conversation per line, ready for train.py; saving rewrites the newest line.

    Saving is atomic. If another program has written to the file meanwhile, its lines are kept and the conversation
    goes below them.

    Raises:
        InputError: the file is not a list of conversations; it is left untouched.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        if self.path.suffix.lower() != ".jsonl":
            raise InputError(f"{path} does not end in .jsonl; choose a .jsonl file, which training can read.")
        if not self.path.parent.is_dir():
            raise InputError(f"Directory {self.path.parent} does not exist; create it first.")
        self._content = self._read()
        self._above = self._content
        self._last = to_messages(read_records(str(self.path))[-1]) if self._content.strip() else []

    def resume(self) -> list[dict[str, Any]]:
        """The newest conversation, to be continued in its line; [] if the file has none."""
        if self._last and self._last[0]["role"] == "document":
            raise InputError(f"{self.path} ends with plain text, not a conversation; choose another file.")
        if self._last:
            self._above = self._content[: self._content.rstrip().rfind(b"\n") + 1]
        return self._last

    def begin(self) -> None:
        """Give the next conversation a new line."""
        self._above = self._content

    def save(self, messages: list[dict[str, Any]]) -> None:
        """Write the current conversation; [] removes its line."""
        content = self._read()
        if content != self._content:
            self._above = content
        above = self._above + (b"\n" if self._above and not self._above.endswith(b"\n") else b"")
        line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n" if messages else b""
        try:
            mode = self.path.stat().st_mode & 0o777 if self.path.exists() else None
            with new_file(self.path) as file:
                file.write_bytes(above + line)
            if mode is not None:  # it may be private
                os.chmod(self.path, mode)
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written ({error}); choose another with /save FILE."
            ) from error
        self._above, self._content = above, above + line

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise InputError(f"{self.path} cannot be read; check its permissions ({error}).") from error
