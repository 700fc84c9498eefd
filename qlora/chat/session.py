"""An interactive chat with a base model and its adapters: `python -m qlora chat`.

A turn is a question and its whole answer. A stopped answer (Ctrl-C) is dropped together with its question. An
answer cut at --max-new-tokens is kept and marked "weight": 0 in the history file, so that training uses it as
context only and does not learn to stop there.

Answers equal those of `generate` for the same messages: each turn reads the whole conversation again. Reusing the
keys and values of the last turn would start faster, but they were computed row by row, round differently, and in
bf16 change answers (docs/LOG.md).

A conversation has one system message. /system starts a new conversation; otherwise the saved answers would stand
under a text that the model never read.
"""

from __future__ import annotations

import difflib
import io
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qlora.adapters.model import LoRAModel
from qlora.chat.commands import COMMANDS, NO_ADAPTER
from qlora.chat.history import History, Turn, from_turns, to_turns
from qlora.chat.stream import AnswerStream
from qlora.config.generate import Sampling
from qlora.data.encode import encode_prompt
from qlora.generation import end_ids, generate
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from qlora.system.memory import is_out_of_memory
from qlora.system.redact import redact
from qlora.system.wording import show_controls


def split_adapter(text: str, taken: Sequence[str] = ()) -> tuple[str, Path]:
    """Parse NAME=DIRECTORY, or DIRECTORY (named after its last part), into (name, directory)."""
    name, directory = "", Path(text).expanduser()
    if "=" in text and not directory.is_dir():
        name, _, rest = text.partition("=")
        directory = Path(rest).expanduser()
    name = name or directory.resolve().name
    if not directory.is_dir():
        loaded = ", ".join([*taken, NO_ADAPTER])
        raise InputError(f"No adapter or directory is named {text!r}; loaded: {loaded}.")
    if name in (*taken, NO_ADAPTER):
        raise InputError(f"The name {name!r} is taken; choose another: NAME={directory}.")
    return name, directory


@dataclass
class Chat:
    """One conversation at a time, read line by line.

    Args:
        model: a base with any number of adapters; the active adapter answers.
        name: the base, as given to `load_base_model`; the tokenizer is loaded from there.
        options: length and sampling of answers; answer k (from 1) is sampled with its seed + k - 1.
        console: receives answers; notes go to standard error unless it is a terminal.
    """

    model: LoRAModel
    name: str
    options: Sampling
    system: str = ""
    console: Console = field(default_factory=lambda: Console(highlight=False, soft_wrap=True))
    history: History | None = None

    def __post_init__(self) -> None:
        self.turns: list[Turn] = []
        self.tokenizers: dict[str | None, Any] = {None: load_tokenizer(self.name)}
        elsewhere = Console(stderr=True, highlight=False, soft_wrap=True)
        self._notes = self.console if self.console.is_terminal else elsewhere
        self._last: tuple[list[Turn], str] | None = None  # what /retry asks: the turns before it, the question
        self._num_answers = self._num_unread = 0

    # ---- adapters -------------------------------------------------------------------------------------------

    def load_adapter(self, text: str) -> str:
        """Load NAME=DIRECTORY, or DIRECTORY under its last part, inactive; returns the name."""
        name, directory = split_adapter(text, self.model.adapters)
        tokenizer = load_tokenizer(self.name, directory)
        self.model.load_adapter(directory, name, self.note)
        self.tokenizers[name] = tokenizer
        return name

    # ---- one turn -------------------------------------------------------------------------------------------

    def ask(self, question: str, turns: list[Turn] | None = None) -> None:
        """Answer a question after `turns` (default: all); these and the new turn become the conversation."""
        before = self.turns if turns is None else turns
        self._last = before, question
        answered_by = self.model.active_adapter
        answer, cut_at = self._answer(before, question, answered_by, self._stream)
        self._stream("\n")
        if cut_at:
            self.note(f"cut at {cut_at} tokens; raise the limit with /settings max_new_tokens=N")
        self.turns = [*before, Turn(question, answer, not cut_at, answered_by or NO_ADAPTER)]
        self._save()

    def _answer(
        self, turns: list[Turn], question: str, adapter: str | None, write: Callable[[str], Any]
    ) -> tuple[str, int]:
        """(answer, number of tokens it was cut at or 0) from an adapter, or from the base (None)."""
        tokenizer = self.tokenizers[adapter]
        messages, num_tokens = self._fit(turns, question, tokenizer)
        active = self.model.active_adapter
        self.model.set_adapter(adapter)
        stream = AnswerStream(tokenizer, write)
        seed = self.options.seed + self._num_answers
        drawn = replace(self.options, max_new_tokens=num_tokens, seed=seed)
        in_main = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGINT, stream.stop) if in_main else None
        try:
            answer = generate(self.model.model, tokenizer, [messages], drawn, streamer=stream)[0]
        finally:
            if in_main:
                signal.signal(signal.SIGINT, previous)
            self.model.set_adapter(active)
        self._num_answers += 1
        write(answer[len(stream.shown) :] if answer.startswith(stream.shown) else f"\n{answer}")
        ids = stream.ids or [-1]
        cut_at = 0 if ids[-1] in end_ids(self.model.model, tokenizer) else len(ids)
        return answer.replace("\0", ""), cut_at  # data files must not contain NUL

    def _fit(self, turns: list[Turn], question: str, tokenizer: Any) -> tuple[list[dict[str, Any]], int]:
        """(messages, most new tokens): drops the oldest turns if the model cannot read them all."""
        config: Any = self.model.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
        wanted = self.options.max_new_tokens
        for num_unread in range(len(turns) + 1):
            messages = [*from_turns(self.system, turns[num_unread:]), {"role": "user", "content": question}]
            room = limit - len(encode_prompt(messages, tokenizer))
            if room >= wanted:
                break
        if room < 1:
            raise InputError(
                f"The message is {1 - room:,} tokens too long for this model's limit of {limit:,}; shorten it."
            )
        if num_unread > self._num_unread:
            self.note(
                f"the conversation exceeds the model's limit of {limit:,} tokens: the oldest {num_unread} of "
                f"{len(turns)} turns are left out of the prompt"
            )
        self._num_unread = num_unread
        return messages, min(wanted, room)

    def _save(self) -> None:
        if self.history is not None:
            self.history.save(from_turns(self.system, self.turns) if self.turns else [])

    # ---- commands -------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Run a line that begins with "/"; False ends the chat."""
        name, _, text = line[1:].strip().partition(" ")
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean /{close[0]}?" if close else "/help lists them."
            raise InputError(
                f"Unknown command /{name}; {hint} To send a message with a / first, begin with a space."
            )
        if name == "quit":
            return False
        getattr(self, f"do_{name}")(text.strip())
        return True

    def do_help(self, _text: str) -> None:
        for usage, meaning in COMMANDS.values():
            self._print(f"{usage:<26}{meaning}")
        self._print("Ctrl-C stops an answer; end a line with \\ to continue the message on the next one.")

    def do_adapter(self, text: str) -> None:
        if text:
            known = text in self.model.adapters or text == NO_ADAPTER
            name = text if known else self.load_adapter(text)
            self.model.set_adapter(None if name == NO_ADAPTER else name)
        active = self.model.active_adapter or NO_ADAPTER
        names = (f"[{name}]" if name == active else name for name in (*self.model.adapters, NO_ADAPTER))
        self.note(f"adapters: {', '.join(names)}")

    def do_base(self, _text: str) -> None:
        if not self.turns:
            raise InputError("No question to compare yet; ask one first.")
        *before, last = self.turns
        if last.answered_by == NO_ADAPTER:
            raise InputError("The base gave the last answer; choose an adapter with /adapter NAME, then /retry.")
        with self.console.status("the base is answering ..."):
            answer, _ = self._answer(before, last.question, None, lambda text: None)
        sides = {last.answered_by or "saved": last.answer, "base": answer}
        if not self.console.is_terminal:
            for name, text in sides.items():
                self._print(f"{name}: {show_controls(text)}")
            return
        table = Table(expand=True)
        for name in sides:
            table.add_column(Text(name), ratio=1)
        table.add_row(*(Text(show_controls(text)) for text in sides.values()))
        self.console.print(table, soft_wrap=False)

    def do_retry(self, _text: str) -> None:
        if self._last is None and self.turns:
            self._last = self.turns[:-1], self.turns[-1].question
        if self._last is None:
            raise InputError("No question to ask again yet.")
        before, question = self._last
        self.ask(question, before)

    def do_undo(self, _text: str) -> None:
        if not self.turns:
            raise InputError("Nothing to undo.")
        self.turns = self.turns[:-1]
        self._last = None
        self._save()
        self.note(f"removed; {len(self.turns)} turn(s) left")

    def do_reset(self, _text: str) -> None:
        self.turns = []
        self._last = None
        self._num_unread = 0
        if self.history is not None:
            self.history.begin()
        self.note("new conversation")

    def do_system(self, text: str) -> None:
        self.system = text
        self.do_reset("")

    def do_save(self, text: str) -> None:
        if not self.turns or not text:
            raise InputError("Nothing to save yet." if text else "/save needs the name of a .jsonl file.")
        file = History(text)
        file.save(from_turns(self.system, self.turns))
        self.note(f"{len(self.turns)} turn(s) appended to {file.path}")

    def do_settings(self, text: str) -> None:
        kinds = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
        changes: dict[str, Any] = {}
        for part in text.split():
            name, _, value = part.partition("=")
            if name not in kinds:
                raise InputError(f"Unknown setting {name!r}; write NAME=VALUE with one of {', '.join(kinds)}.")
            try:
                changes[name] = kinds[name](value)
            except ValueError as error:
                raise InputError(f"{name} is {value!r}; give a number.") from error
        self.options = replace(self.options, **changes)
        self._print("  ".join(f"{name}={getattr(self.options, name)}" for name in kinds))
        self._print(f"model={self.name}  adapter={self.model.active_adapter or NO_ADAPTER}")
        self._print(f"system={self.system or '(none)'}  turns={len(self.turns)}")

    # ---- the terminal ---------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self._notes.print(Text(redact(" ".join(text.split()))), style="dim")

    def _print(self, text: str) -> None:
        self.console.print(Text(text))

    def _stream(self, text: str) -> None:
        """Print part of an answer unchanged: rich would turn tabs into spaces."""
        self.console.file.write(show_controls(text))
        self.console.file.flush()

    def open_history(self, path: str) -> None:
        """Save to this file from now on, and continue its newest conversation.

        A file that is not a chat history is reported and left untouched; nothing is saved then.
        """
        try:
            history = History(path)
            system, turns = to_turns(history.resume())
        except InputError as error:
            self.note(f"{error} Nothing will be saved.")
            return
        self.history = history
        if self.system and turns and system != self.system:
            history.begin()
            self.note(f"{path} ends with another system message: starting a new conversation")
        elif turns:
            self.system, self.turns = system, turns
            self.note(
                f"continuing {path} after {len(turns)} turn(s); the last question was: {turns[-1].question:.60}"
            )

    def run(self) -> None:
        """Read messages and commands until /quit or end of input."""
        if self.console.is_terminal:
            adapter = self.model.active_adapter
            self.note(
                f"{Path(self.name).name}, {f'adapter {adapter}' if adapter else 'no adapter'}; /help for help"
            )
        for stream in (sys.stdin, self.console.file):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a byte that is not text must not end the chat
        reading = self._start_reading()
        with suppress(EOFError):
            while True:
                line = ""
                try:
                    line = reading().replace("\0", "")  # data files must not contain NUL
                    if line.startswith("/"):
                        if not self.command(line):
                            return
                    elif line.strip():
                        self.ask(line.strip())
                except InputError as error:
                    self.note(str(error))
                except KeyboardInterrupt:
                    self._stream("\n")
                    stopped = "stopped, and left out of the conversation; /retry asks again"
                    self.note(f"{stopped if line else 'nothing was running'}; /quit ends the chat")
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    self.note(f"out of memory ({error}); start a shorter conversation with /reset")

    def _start_reading(self) -> Callable[[], str]:
        """A function that reads a message; on a terminal with line editing and the resumed questions."""
        is_interactive = self.console.is_terminal and sys.stdin.isatty()
        if is_interactive:
            with suppress(ImportError):  # missing on some systems
                import readline

                for turn in self.turns:
                    readline.add_history(turn.question)

        def read() -> str:
            lines: list[str] = []
            while True:
                prompt = "... " if lines else f"{self.model.active_adapter or 'base'}> "
                try:
                    lines.append(input(prompt if is_interactive else ""))
                except EOFError:
                    if not lines:
                        raise
                    return "\n".join(lines)
                if not lines[-1].endswith("\\"):
                    return "\n".join(lines)
                lines[-1] = lines[-1][:-1]

        return read
