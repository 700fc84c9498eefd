"""The chat: answers are those of generate, commands do what /help says, the history file is training data."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qlora.chat.session
from qlora.adapters.model import LoRAModel
from qlora.chat.commands import COMMANDS
from qlora.chat.history import History, Turn, from_turns
from qlora.chat.session import Chat, split_adapter
from qlora.chat.stream import AnswerStream
from qlora.config.generate import Sampling
from qlora.config.lora import LoRAConfig
from qlora.data.conversations import to_messages
from qlora.data.encode import encode_prompt
from qlora.data.example import IGNORE_INDEX
from qlora.data.readers import read_records
from qlora.generation import generate
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.quant.layers import Linear4bit
from qlora.system.errors import InputError
from qlora.system.wording import show_controls
from tests import fork_server
from tests.models import save_tiny_llama
from tests.shortcuts import encode_example
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["Hi", "What is the capital of France?", "a b c d e f g"]
OPTIONS = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base and the adapters sql and poem, far enough from it to answer otherwise."""
    directory = tmp_path_factory.mktemp("chat")
    base = save_tiny_llama(directory / "base", tokenizer=tiny_tokenizer(), max_position_embeddings=4096)
    for seed, name in enumerate(("sql", "poem")):
        model = LoRAModel(load(base), LoRAConfig(rank=4), seed=seed, base_name=str(base))
        for parameter in model.lora_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save(directory / name)
    return directory


def load(base: Path) -> Any:
    return load_base_model(str(base), compute_dtype="float32", cache=False)


def start(tiny: Path, adapters: tuple[str, ...] = ("sql", "poem"), **settings: Any) -> Chat:
    """A chat whose console is a buffer; the first adapter is active."""
    name = str(tiny / "base")
    model = LoRAModel(load(tiny / "base"), base_name=name)
    console = Console(file=io.StringIO(), soft_wrap=True)
    chat = Chat(model, name, settings.pop("options", OPTIONS), console=console, **settings)
    for adapter in adapters:
        chat.load_adapter(str(tiny / adapter))
    model.set_adapter(adapters[0] if adapters else None)
    return chat


def printed(chat: Chat) -> str:
    assert isinstance(chat.console.file, io.StringIO)
    return chat.console.file.getvalue()


def reference(tiny: Path, adapter: str | None, messages: list[dict[str, Any]], seed: int, **options: Any) -> str:
    """`generate` on a model that was loaded for this answer alone."""
    model = LoRAModel(load(tiny / "base"))
    if adapter is not None:
        model.load_adapter(tiny / adapter, adapter)
        model.set_adapter(adapter)
    tokenizer = load_tokenizer(str(tiny / "base"))
    return generate(model.model, tokenizer, [messages], Sampling(seed=seed, **options))[0]


# ---- answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (1.5, 0.9)])
def test_answers_equal_generate_on_the_same_conversation(tiny: Path, temperature: float, top_p: float) -> None:
    """Three turns, an adapter each, then none; sampled, the k-th answer is that of seed + k."""
    chat = start(tiny, options=Sampling(8, temperature, top_p, seed=5), system="Be brief.")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}]
    for number, (adapter, question) in enumerate(zip(("sql", "poem", None), QUESTIONS, strict=True)):
        chat.command(f"/adapter {adapter or 'none'}")
        chat.ask(question)
        messages.append({"role": "user", "content": question})
        options: dict[str, Any] = dict(max_new_tokens=8, temperature=temperature, top_p=top_p)
        answer = reference(tiny, adapter, messages, seed=5 + number, **options).replace("\0", "")
        assert answer and chat.turns[-1].answer == answer
        messages.append({"role": "assistant", "content": answer})
    assert len({turn.answer for turn in chat.turns}) == 3


def test_the_base_answers_the_last_question_and_changes_nothing(tiny: Path) -> None:
    chat = start(tiny)
    for question in QUESTIONS[:2]:
        chat.ask(question)
    before = list(chat.turns)
    chat.command("/base")
    asked = [*from_turns("", before[:1]), {"role": "user", "content": QUESTIONS[1]}]
    lines = printed(chat).splitlines()[-2:]
    answers = [before[1].answer, reference(tiny, None, asked, 0, max_new_tokens=8)]
    assert lines == [f"{who}: {show_controls(a)}" for who, a in zip(("sql", "base"), answers, strict=True)]
    assert answers[0] != answers[1]
    assert chat.turns == before and chat.model.active_adapter == "sql"


def test_on_a_terminal_the_two_stand_side_by_side(tiny: Path) -> None:
    chat = start(tiny)
    chat.console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={})
    chat.ask("Hi")
    chat.command("/base")
    headings = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed(chat))
    assert re.search(r"sql +┃ base", headings)


@pytest.mark.parametrize("prompt_tokens", [1, 5])
def test_a_stream_shows_the_answer_in_pieces(prompt_tokens: int) -> None:
    """Characters of several tokens appear whole, and white space only before what follows it."""
    tokenizer = tiny_tokenizer()
    text = "  Über  die\n\n Brücke 🦊 \n"
    pieces: list[str] = []
    stream = AnswerStream(tokenizer, pieces.append)
    stream.put(torch.zeros(1, prompt_tokens, dtype=torch.long))
    ids = tokenizer(text)["input_ids"]
    for token in [*ids, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.shown == text.strip()
    assert len([piece for piece in pieces if piece]) > 8 and "\ufffd" not in stream.shown


def test_the_streamed_text_is_the_answer_and_obeyed_by_no_terminal(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An escape in an answer is written out; tabs and newlines stay."""
    answer = "a\tb\n\x1b[2Jc\x07"

    def answered(*arguments: Any, streamer: Any) -> list[str]:
        streamer.put(torch.zeros(1, 3))
        for token in [*tiny_tokenizer()(answer)["input_ids"], 2]:
            streamer.put(torch.tensor([token]))
        return [answer]

    monkeypatch.setattr(qlora.chat.session, "generate", answered)
    chat = start(tiny)
    chat.ask("Hi")
    assert printed(chat) == "a\tb\n\\x1b[2Jc\\x07\n" and chat.turns[0].answer == answer


def test_each_adapter_answers_with_its_own_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """One with new tokens brings a larger vocabulary; the base keeps its own."""
    from qlora.data.tokenizer_files import add_tokens

    tokenizer = load_tokenizer(str(tiny / "base"))
    add_tokens(tokenizer, ["<tool>"])
    config = LoRAConfig(rank=4, new_tokens="<tool>")
    model = LoRAModel(load(tiny / "base"), config, base_name=str(tiny / "base"), tokenizer=tokenizer)
    model.save(tmp_path / "tools")
    chat = start(tiny, ("sql",))
    chat.command(f"/adapter {tmp_path / 'tools'}")
    assert len(chat.tokenizers["tools"]) == len(chat.tokenizers["sql"]) + 1 == len(chat.tokenizers[None]) + 1
    chat.ask("<tool> please")
    assert chat.turns[-1].answered_by == "tools"
    chat.command("/base")
    assert chat.model.active_adapter == "tools"


def test_a_conversation_that_outgrows_the_model_loses_its_oldest_turns(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = start(tiny, system="Be brief.")
    chat.model.model.config.max_position_embeddings = 120
    for question in ["one", "two", "three", "four"]:
        chat.ask(question)
    tokenizer = chat.tokenizers[None]
    last = {"role": "user", "content": "four"}
    whole = [*from_turns("Be brief.", chat.turns[:3]), last]
    assert len(encode_prompt(whole, tokenizer)) + 8 > 120
    first = next(
        n for n in range(4)
        if len(encode_prompt([*from_turns("Be brief.", chat.turns[n:3]), last], tokenizer)) + 8 <= 120
    )  # fmt: skip
    seen = [*from_turns("Be brief.", chat.turns[first:3]), last]
    assert 0 < first < 3 and chat.turns[3].answer == reference(tiny, "sql", seen, 0, max_new_tokens=8)
    assert len(chat.turns) == 4  # all of it is kept
    assert f"the oldest {first} of " in capsys.readouterr().err
    with pytest.raises(InputError, match=r"tokens too long for this model's limit of 120; shorten it"):
        chat.ask("long " * 100)


def test_an_answer_gets_what_room_is_left(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = start(tiny, options=Sampling(max_new_tokens=200))
    num_tokens = len(encode_prompt([{"role": "user", "content": "Hi"}], chat.tokenizers[None]))
    chat.model.model.config.max_position_embeddings = num_tokens + 3
    chat.ask("Hi")
    assert "cut at 3 tokens" in capsys.readouterr().err and not chat.turns[0].is_whole


# ---- commands ---------------------------------------------------------------------------------------------


def test_undo_retry_reset_and_system(tiny: Path) -> None:
    chat = start(tiny)
    chat.ask("one")
    chat.ask("two")
    chat.command("/adapter poem")
    chat.command("/retry")
    first, second = chat.turns
    assert (second.question, second.answered_by, first.answered_by) == ("two", "poem", "sql")
    asked = [*from_turns("", [first]), {"role": "user", "content": "two"}]
    assert second.answer == reference(tiny, "poem", asked, 0, max_new_tokens=8)
    chat.command("/undo")
    assert chat.turns == [first]
    chat.command("/retry")  # the last question that is left
    assert [turn.question for turn in chat.turns] == ["one"]
    chat.command("/system Speak French.")
    assert (chat.system, chat.turns) == ("Speak French.", [])
    chat.ask("one")
    chat.command("/reset")
    assert (chat.system, chat.turns) == ("Speak French.", [])
    chat.command("/system")
    assert chat.system == ""
    assert chat.command("/quit") is False


def test_settings_are_checked_and_shown(tiny: Path) -> None:
    chat = start(tiny)
    chat.command("/settings temperature=0.7 top_p=0.9 max_new_tokens=3 seed=9")
    assert chat.options == Sampling(3, 0.7, 0.9, seed=9)
    assert "max_new_tokens=3  temperature=0.7  top_p=0.9  seed=9" in printed(chat)


def test_help_names_every_command_and_each_is_carried_out(tiny: Path) -> None:
    chat = start(tiny, ())
    chat.command("/help")
    listed = re.findall(r"^/(\w+)", printed(chat), flags=re.MULTILINE)
    assert listed == list(COMMANDS)
    assert all(hasattr(chat, f"do_{name}") for name in listed if name != "quit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/", "Unknown command /; /help lists them"),
        ("/foo bar", "Unknown command /foo; /help lists them"),
        ("/adpter sql", "Unknown command /adpter; did you mean /adapter?"),
        ("/adapter nowhere", "No adapter or directory is named 'nowhere'; loaded: sql, poem, none."),
        ("/adapter base", "The adapter directory base has no adapter_config.json"),
        ("/adapter other=sql/nowhere", "No adapter or directory is named 'other=sql/nowhere'"),
        ("/adapter poem=sql", "The name 'poem' is taken; choose another: NAME=sql."),
        ("/base", "No question to compare yet"),
        ("/retry", "No question to ask again yet"),
        ("/undo", "Nothing to undo"),
        ("/save", "/save needs the name of a .jsonl file"),
        ("/save chat.jsonl", "Nothing to save yet"),
        ("/settings color=3", "Unknown setting 'color'; write NAME=VALUE with one of max_new_tokens"),
        ("/settings temperature=hot", "temperature is 'hot'; give a number"),
        ("/settings top_p=2", "top_p is 2.0"),
        ("/settings seed=-1", "seed is -1"),
    ],
)
def test_wrong_commands_are_one_sentence_and_change_nothing(
    tiny: Path, line: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny)
    chat = start(tiny)
    before = (chat.turns, chat.options, chat.model.adapters, chat.model.active_adapter)
    with pytest.raises(InputError) as found:
        chat.command(line)
    assert message in str(found.value)
    assert before == (chat.turns, chat.options, chat.model.adapters, chat.model.active_adapter)


@pytest.mark.parametrize(
    ("text", "name"), [("sql", "sql"), ("sql/", "sql"), ("./sql", "sql"), ("mine=sql", "mine"), ("a=b", "a=b")]
)
def test_an_adapter_is_named_by_its_directory_or_by_hand(
    tmp_path: Path, text: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for directory in ("sql", "a=b"):
        (tmp_path / directory).mkdir()
    assert split_adapter(text) == (name, Path(text.removeprefix("mine=")))
    with pytest.raises(InputError, match="is taken"):
        split_adapter(text, [name])


def test_the_base_of_a_pissa_adapter_does_not_answer_alone(tiny: Path, tmp_path: Path) -> None:
    """It was changed for the adapter: said in one sentence, and the chat goes on with the adapter."""
    model = LoRAModel(load(tiny / "base"), LoRAConfig(rank=4, init="pissa"), base_name=str(tiny / "base"))
    for parameter in model.lora_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save(tmp_path / "pissa")
    chat = start(tiny, ())
    chat.command(f"/adapter {tmp_path / 'pissa'}")
    chat.ask("Hi")
    for command in ("/base", "/adapter none", f"/adapter {tiny / 'sql'}"):
        with pytest.raises(InputError):
            chat.command(command)
        assert chat.model.active_adapter == "pissa"
    chat.ask("Hi")
    assert len(chat.turns) == 2


# ---- stopping ---------------------------------------------------------------------------------------------


def test_a_stopped_answer_leaves_no_trace(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the third token: conversation, model and the next answers are as if nothing had been asked."""
    chat = start(tiny)
    chat.ask("one")
    before = list(chat.turns)
    put = AnswerStream.put

    def interrupted(stream: AnswerStream, value: Any) -> None:
        put(stream, value)
        if stream.ids and len(stream.ids) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerStream, "put", interrupted)
        for stopped in (lambda: chat.ask("two"), lambda: chat.command("/base"), lambda: chat.command("/retry")):
            with pytest.raises(KeyboardInterrupt):
                stopped()
            assert chat.turns == before and chat.model.active_adapter == "sql"
            assert all(m.decode is None for m in chat.model.modules() if isinstance(m, Linear4bit))
    chat.command("/retry")
    asked = [*from_turns("", before), {"role": "user", "content": "two"}]
    assert chat.turns[-1].answer == reference(tiny, "sql", asked, 0, max_new_tokens=8)


def test_the_first_ctrl_c_stops_at_the_next_token_and_the_second_at_once(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first alone raises nothing where it arrives."""
    chat = start(tiny)
    put, raised = AnswerStream.put, []

    def signalled(stream: AnswerStream, value: Any) -> None:
        if stream.ids is not None and len(stream.ids) == 2:
            for _ in range(presses):
                try:
                    signal.raise_signal(signal.SIGINT)
                except KeyboardInterrupt:
                    raised.append(True)
        put(stream, value)

    monkeypatch.setattr(AnswerStream, "put", signalled)
    before = signal.getsignal(signal.SIGINT)
    for presses in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            chat.ask("one")
        assert (len(raised), chat.turns) == (presses - 1, []) and signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_says_that_nothing_was_running(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twice, after an answer: it stays in the conversation, and the chat goes on to its end."""
    chat, lines = start(tiny), iter(["one", KeyboardInterrupt, KeyboardInterrupt])

    def read() -> str:
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(chat, "_start_reading", lambda: read)
    chat.run()
    said = capsys.readouterr().err
    assert said.count("nothing was running; /quit ends the chat") == 2 and "left out" not in said
    assert len(chat.turns) == 1


# ---- the history file -------------------------------------------------------------------------------------


def conversations(path: Path) -> list[list[dict[str, Any]]]:
    """What train.py reads in the file."""
    return [to_messages(record) for record in read_records(str(path))]


def test_the_history_is_training_data_after_each_turn(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chat = start(tiny, system="Be brief.", options=Sampling(max_new_tokens=4))
    chat.open_history(str(path))
    assert not path.exists()
    for number in (1, 2):
        chat.ask(f"question {number} ü")
        assert conversations(path) == [from_turns("Be brief.", chat.turns)]
        assert len(conversations(path)[0]) == 1 + 2 * number
    first = conversations(path)[0]
    chat.command("/reset")
    chat.ask("three")
    assert conversations(path) == [first, from_turns("Be brief.", chat.turns)]
    chat.command("/undo")
    assert conversations(path) == [first]
    chat.command("/system")
    chat.ask("four")
    assert conversations(path) == [first, from_turns("", chat.turns)]
    chat.command(f"/save {tmp_path / 'good.jsonl'}")
    chat.command(f"/save {tmp_path / 'good.jsonl'}")
    assert conversations(tmp_path / "good.jsonl") == [from_turns("", chat.turns)] * 2


def test_a_cut_answer_is_context_and_no_target(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training on it would teach to stop in the middle; a whole one is trained with its end-of-turn token."""
    chat = start(tiny, options=Sampling(max_new_tokens=3))
    chat.open_history(str(tmp_path / "chat.jsonl"))
    chat.ask("one")
    assert not chat.turns[0].is_whole

    def answered(*arguments: Any, streamer: Any) -> list[str]:
        for ids in ([[0]], [70], [2]):
            streamer.put(torch.tensor(ids))
        return ["c"]

    monkeypatch.setattr(qlora.chat.session, "generate", answered)
    chat.ask("two")
    tokenizer = tiny_tokenizer()
    example = encode_example(conversations(tmp_path / "chat.jsonl")[0], tokenizer, 512)
    targets = example.targets[example.targets != IGNORE_INDEX]
    assert targets.tolist() == [*tokenizer("c")["input_ids"], tokenizer.eos_token_id]


def test_a_history_is_resumed_where_it_ended(tiny: Path, tmp_path: Path) -> None:
    """Stopped after two turns and resumed, a chat ends with the file of one that went on; earlier lines stay."""
    earlier = json.dumps({"prompt": "2 + 2?", "completion": "4"}) + "\n\n"
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text(earlier)
    whole = start(tiny)
    whole.open_history(str(tmp_path / "one.jsonl"))
    whole.command("/reset")
    for question in QUESTIONS:
        whole.ask(question)
    first = start(tiny)
    first.open_history(str(tmp_path / "two.jsonl"))
    assert [turn.question for turn in first.turns] == ["2 + 2?"]
    first.command("/reset")
    for question in QUESTIONS[:2]:
        first.ask(question)
    second = start(tiny)
    second.open_history(str(tmp_path / "two.jsonl"))
    assert [(turn.question, turn.answer) for turn in second.turns] == [
        (turn.question, turn.answer) for turn in first.turns
    ]
    second.ask(QUESTIONS[2])
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert len(conversations(tmp_path / "two.jsonl")) == 2


def test_another_system_message_begins_a_new_conversation(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    chat = start(tiny, system="Be brief.")
    chat.open_history(str(path))
    chat.ask("one")
    other = start(tiny, system="Be long.")
    other.open_history(str(path))
    assert other.turns == []
    other.ask("two")
    assert conversations(path) == [from_turns(c.system, c.turns) for c in (chat, other)]
    silent = start(tiny)
    silent.open_history(str(path))
    assert silent.system == "Be long." and len(silent.turns) == 1


def test_two_chats_on_one_file_lose_nothing(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    one, two = start(tiny), start(tiny)
    one.open_history(str(path))
    two.open_history(str(path))
    for number in range(2):
        one.ask(f"one {number}")
        two.ask(f"two {number}")
    found = conversations(path)
    assert all(from_turns("", chat.turns) in found for chat in (one, two))


def test_a_private_file_stays_private_and_a_link_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.jsonl", tmp_path / "link.jsonl"
    real.touch(mode=0o600)
    link.symlink_to(real)
    History(link).save(from_turns("", [Turn("a", "b")]))
    assert link.is_symlink() and conversations(real) and real.stat().st_mode & 0o777 == 0o600


def test_a_full_disk_costs_no_turn(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays as it was, the chat goes on, and the next save has all of it."""
    path = tmp_path / "chat.jsonl"
    chat = start(tiny)
    chat.open_history(str(path))
    chat.ask("one")
    before = path.read_bytes()

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(
            InputError, match=r"cannot be written \(.*No space left.*\); choose another with /save FILE"
        ):
            chat.ask("two")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["chat.jsonl"]
    chat.ask("three")
    assert [m["content"] for m in conversations(path)[0][::2]] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat.jsonl", b'{"messages": [{"role": "user"', r"chat.jsonl:1: not valid JSON"),
        (
            "chat.jsonl",
            b'{"messages": [{"role": "user", "content": "Hi"}]}\n',
            "no assistant message to learn from",
        ),
        ("chat.jsonl", b'{"messages": [{"role": "robot", "content": "Hi"}]}\n', "has the role 'robot'"),
        ("chat.jsonl", b'{"text": "Once upon a time"}\n', "ends with plain text, not a conversation"),
        ("chat.jsonl", b"\xff\xfeH\x00", "it is UTF-16"),
        ("chat.txt", b"Hi\n", "does not end in .jsonl"),
        ("nowhere/chat.jsonl", None, "nowhere does not exist; create it first"),
    ],
)
def test_a_file_that_is_no_history_is_left_as_it_is(
    tiny: Path, tmp_path: Path, name: str, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    chat = start(tiny)
    chat.open_history(str(tmp_path / name))
    said = capsys.readouterr().err
    assert message in said and "Nothing will be saved." in said and said.count("\n") == 1
    chat.ask("Hi")
    assert len(chat.turns) == 1
    assert content is None or (tmp_path / name).read_bytes() == content


# ---- the command ------------------------------------------------------------------------------------------


def run_chat(*arguments: str, lines: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qlora", "chat", *arguments]
    return fork_server.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=300)


def test_a_script_gets_answers_and_nothing_else(tiny: Path) -> None:
    """The base is the one that the adapter names; a line may go on in the next; errors do not end the chat."""
    lines = "Hi\n/nonsense\n /a b\\\nc\n\n/quit\nnot read\n"
    result = run_chat(
        "--adapter", str(tiny / "sql"), "--max-new-tokens", "8", "--compute-dtype", "float32", lines=lines
    )
    assert result.returncode == 0, result.stderr
    asked: list[dict[str, Any]] = []
    expected = ""
    for question in ("Hi", "/a b\nc"):
        asked.append({"role": "user", "content": question})
        answer = reference(tiny, "sql", asked, 0, max_new_tokens=8)
        asked.append({"role": "assistant", "content": answer.replace("\0", "")})
        expected += show_controls(answer) + "\n"
    assert result.stdout == expected and len(expected) > 10
    assert "Unknown command /nonsense" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Nothing to chat with: pass --model, --adapter or both."),
        (["--adapter", "nowhere"], "No adapter or directory is named 'nowhere'"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "m", "--temperature", "-1"], "temperature is -1.0"),
        (["--model", "m", "--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--model", "m", "--seed", "-1"], "seed is -1"),
    ],
)
def test_a_wrong_start_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qlora.cli.exits import run
    from qlora.cli.main import main

    try:
        code: Any = run(main, ["chat", *arguments])
    except SystemExit as error:  # a value out of its range is the command line's own error
        code = error.code
    assert code == 2 and message in capsys.readouterr().err


class Terminal:
    """A process on a terminal of its own, and what it has shown so far."""

    def __init__(self, command: list[str]) -> None:
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored in what a shell starts with "&"
            os.execve(command[0], command, {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"})
        self.shown, self.position = "", 0

    def expect(self, pattern: str, again: str = "") -> str:
        """Read until the pattern appears after the last one found; returns what stood before it.

        Args:
            again: keys to press once more where nothing comes for five seconds. Ctrl-C wants it: one that falls
                between Python's printing of a prompt and its waiting for a key is seen at the next key.
        """
        waits = 0
        while (match := re.search(pattern, self.shown[self.position :])) is None:
            ready, _, _ = select.select([self.file], [], [], 5)
            if not ready:
                waits += 1
                assert waits < 60, f"{pattern!r} did not come; shown so far:\n{self.shown}"
                self.send(again)
                continue
            try:
                raw = os.read(self.file, 65536).decode("utf-8", "replace")
            except OSError:  # the other side has closed it
                raw = ""
            assert raw, f"it ended before {pattern!r}; shown so far:\n{self.shown}"
            self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", raw)
        before = self.shown[self.position : self.position + match.start()]
        self.position += match.end()
        return before

    def send(self, text: str) -> None:
        os.write(self.file, text.encode())

    def end(self) -> int:
        """The exit code, once it has ended."""
        try:
            while os.read(self.file, 65536):
                pass
        except OSError:
            pass
        os.close(self.file)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def test_a_conversation_at_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """Types, switches adapters, compares, interrupts, asks again, recalls a line, ends by Ctrl-D."""
    history = tmp_path / "chat.jsonl"
    arguments = ["--adapter", str(tiny / "sql"), f"verse={tiny / 'poem'}", "--history", str(history)]
    arguments += ["--compute-dtype", "float32", "--max-new-tokens", "6"]
    terminal = Terminal([sys.executable, "-m", "qlora", "chat", *arguments])
    terminal.expect(r"base, adapter sql; /help for help")
    terminal.expect("sql> ")
    terminal.send("Hi\n")
    first = terminal.expect("sql> ")
    answer = reference(tiny, "sql", [{"role": "user", "content": "Hi"}], 0, max_new_tokens=6)
    assert show_controls(answer) in first and "cut at 6 tokens" in first
    terminal.send("/adapter verse\n")
    assert "adapters: sql, [verse], none" in terminal.expect("verse> ")
    terminal.send("/base\n")
    terminal.expect(r"sql +┃ base")
    terminal.expect("verse> ")
    terminal.send("/settings max_new_tokens=3500\n")
    terminal.expect("verse> ")
    terminal.send("Count for ever.\n")
    terminal.expect(r"Count for ever\.\n[^\n]{4}")  # the answer has begun
    terminal.send("\x03")
    terminal.expect("stopped, and left out of the conversation")
    terminal.expect("verse> ")
    terminal.send("/settings max_new_tokens=6\n")
    terminal.expect("verse> ")
    terminal.send("\x1b[A\x1b[A")  # two lines up
    terminal.expect(r"Count for ever\.")
    terminal.send("\n")
    terminal.expect("verse> ")
    terminal.send("/oops\n")
    assert "Unknown command /oops" in terminal.expect("verse> ")
    terminal.send("\x03")
    terminal.expect("verse> ", again="\x03")
    terminal.send("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.shown
    assert [m["content"] for m in conversations(history)[0][::2]] == ["Hi", "Count for ever."]


@pytest.mark.slow
def test_the_real_model_remembers(smollm2: str) -> None:
    """The second answer needs the first question; both equal `generate`'s."""
    lines = "What is the capital of France?\nAnd of Italy?\n"
    result = run_chat("--model", smollm2, "--max-new-tokens", "16", lines=lines)
    assert result.returncode == 0 and "Rome" in result.stdout.splitlines()[-1], result
    model, tokenizer = load_base_model(smollm2), load_tokenizer(smollm2)
    messages: list[dict[str, Any]] = []
    expected = ""
    for question in lines.splitlines():
        messages.append({"role": "user", "content": question})
        answer = generate(model, tokenizer, [messages], Sampling(16))[0]
        messages.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert result.stdout == expected
