"""What a downloaded file must not be able to do, and what must not leave the machine or be kept."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file

from qlora.adapters.load import load_adapter
from qlora.adapters.model import get_lora_model
from qlora.adapters.peft_files import read_adapter
from qlora.adapters.provenance import base_model_of
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.data.encode import encode_prompt
from qlora.export.merge import merge_adapter
from qlora.model.hf_config import load_config
from qlora.model.load import load_base_model
from qlora.model.resolve import resolve_model
from qlora.model.skeleton import empty_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.system.files import is_file_name
from qlora.system.redact import redact
from tests.models import save_tiny_llama
from tests.shortcuts import encode_example
from tests.tiny import tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
SOURCES = [
    REPOSITORY / "train.py",
    *(p for d in ("qlora", "eval", "examples") for p in (REPOSITORY / d).rglob("*.py")),
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "llama", tokenizer=tiny_tokenizer())


@pytest.fixture
def copied(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copied"))


@pytest.fixture
def saved(llama: Path, tmp_path: Path) -> Path:
    model = get_lora_model(load_base_model(str(llama), compute_dtype="float32", cache=False), base_name=str(llama))
    model.save(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_json(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


def assert_one_sentence(error: BaseException) -> None:
    assert isinstance(error, InputError) and "\n" not in str(error) and str(error).endswith(".")


# ---- no pickle, no code -----------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_the_bomb_works(tmp_path: Path) -> None:
    """Otherwise the tests below could not fail."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickled_model_is_not_loaded(copied: Path, tmp_path: Path, name: str) -> None:
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(
        InputError, match=rf"{re.escape(name)} is a pickle.*convert the model to safetensors"
    ) as raised:
        load_base_model(str(copied))
    assert_one_sentence(raised.value)
    assert not (tmp_path / "marker").exists()


def test_a_pickled_adapter_is_not_loaded(llama: Path, saved: Path, tmp_path: Path) -> None:
    (saved / WEIGHTS).unlink()
    (saved / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(InputError, match=r"only adapter_model\.bin, a pickle.*as safetensors") as raised:
        load_adapter(load_base_model(str(llama), cache=False), saved)
    assert_one_sentence(raised.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["model.safetensors", WEIGHTS])
def test_a_pickle_by_another_name(copied: Path, saved: Path, tmp_path: Path, file: str) -> None:
    directory = saved if file == WEIGHTS else copied
    (directory / file).write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(InputError, match=rf"{file} is not a complete safetensors file"):
        read_adapter(saved) if file == WEIGHTS else load_base_model(str(copied))
    assert not (tmp_path / "marker").exists()


UNPICKLERS = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
LOADERS = {
    ("torch", "load"),
    ("np", "load"),
    ("numpy", "load"),
    ("yaml", "load"),
    ("os", "system"),
    ("os", "popen"),
}


def find_dangers(source: str) -> list[str]:
    """Calls and imports in Python text that unpickle, run text as code or reach a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
        found += [name for name in names if name.partition(".")[0] in UNPICKLERS]
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in ("eval", "exec", "compile", "__import__"):
            found.append(called.id)
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
            found += [f"{a}.{b}" for a, b in LOADERS if (called.value.id, called.attr) == (a, b)]
        for keyword in node.keywords:
            is_true = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            if keyword.arg in ("shell", "allow_pickle", "trust_remote_code", "weights_only") and is_true:
                found.append(str(keyword.arg))
    return found


@pytest.mark.parametrize(
    "danger",
    [
        "import pickle", "from dill import loads", "import torch\ntorch.load(f)", "import joblib.numpy_pickle",
        "eval(x)", "exec(x)", "run(x, shell=True)", "np.load(f)", "fromfile(f, allow_pickle=flag)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)", "import os\nos.system('ls')", "yaml.load(f)",
    ],
)  # fmt: skip
def test_dangers_are_recognized(danger: str) -> None:
    assert find_dangers(danger)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_danger_in_the_source(source: Path) -> None:
    """A run may hand its own processes a pickle through a pipe, as multiprocessing does; a file it may not."""
    found = find_dangers(source.read_text())
    if source.name == "processes.py":
        assert "open(" not in source.read_text()
        found = [danger for danger in found if danger != "pickle"]
    assert found == []


def test_trust_remote_code_is_off_in_every_call() -> None:
    """Left out, transformers asks on the terminal, and a yes, or a script's input, runs the model's code."""
    calls = [
        (source.name, node)
        for source in SOURCES
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
    ]
    assert len(calls) >= 5
    for name, node in calls:
        assert "trust_remote_code" in {keyword.arg for keyword in node.keywords}, f"{name}:{node.lineno}"


@pytest.fixture
def with_code(copied: Path, tmp_path: Path) -> Path:
    """A model directory with modules of its own that make a file when they are imported."""
    code = f"from pathlib import Path\nPath({str(tmp_path / 'marker')!r}).touch()\nclass Mine: pass\n"
    for name in (
        "configuration_mine",
        "modeling_mine",
        "tokenization_mine",
        "__init__",
        "custom_generate/generate",
    ):
        file = copied / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(code)
    return copied


@pytest.mark.parametrize(
    ("file", "entries", "loader"),
    [
        ("config.json", {"auto_map": {"AutoConfig": "configuration_mine.Mine"}}, load_config),
        ("config.json", {"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}}, load_base_model),
        ("config.json", {"auto_map": {"AutoConfig": "other/repo--configuration_mine.Mine"}}, empty_model),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}},
            load_tokenizer,
        ),
        ("tokenizer_config.json", {"auto_map": ["tokenization_mine.Mine", None]}, load_tokenizer),
        ("tokenizer_config.json", {"auto_map": None}, load_tokenizer),
    ],
)
def test_code_of_a_model_is_refused_by_name(
    with_code: Path, tmp_path: Path, file: str, entries: dict[str, Any], loader: Any
) -> None:
    edit_json(with_code / file, **entries)
    with pytest.raises(InputError, match=rf"{file} brings code of its own.*trust_remote_code") as raised:
        loader(str(with_code))
    assert_one_sentence(raised.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_that_only_code_of_its_own_has(with_code: Path, tmp_path: Path, file: str) -> None:
    (with_code / "tokenizer.json").unlink()
    edit_json(with_code / file, tokenizer_class="ChatGLMTokenizer")
    with pytest.raises(
        InputError, match=rf"{file} wants the tokenizer_class 'ChatGLM.*trust_remote_code"
    ) as raised:
        load_tokenizer(str(with_code))
    assert_one_sentence(raised.value)
    assert not (tmp_path / "marker").exists()


def test_an_unknown_tokenizer_class_beside_a_whole_tokenizer(copied: Path) -> None:
    """tokenizer.json says everything; the name of a class that is gone today does not matter."""
    edit_json(copied / "tokenizer_config.json", tokenizer_class="YiTokenizer")
    assert load_tokenizer(str(copied)).encode("hello there") == tiny_tokenizer().encode("hello there")


@pytest.mark.parametrize(
    "name", ["AutoModelForCausalLM", "LlamaForCausalLM", "AutoTokenizer", "pipeline", "utils", "Trainer"]
)
def test_a_tokenizer_class_that_is_none(copied: Path, tmp_path: Path, name: str) -> None:
    """transformers takes any name it has: a model's class would load the weights, unpickling them if need be."""
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    edit_json(copied / "tokenizer_config.json", tokenizer_class=name)
    with pytest.raises(InputError, match=rf"tokenizer_config\.json has the tokenizer_class '{name}', which is no"):
        load_tokenizer(str(copied))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("value", [7, ["LlamaTokenizer"], {"a": 1}, "a\nb", "", ".", "../x"])
def test_odd_tokenizer_classes(copied: Path, value: Any) -> None:
    """Named, or without effect; never a traceback."""
    edit_json(copied / "tokenizer_config.json", tokenizer_class=value)
    try:
        load_tokenizer(str(copied))
    except InputError as error:
        assert_one_sentence(error)


def test_code_beside_a_model_is_not_run(with_code: Path, tmp_path: Path) -> None:
    """Python files that nothing names; also where the directory is the current one."""
    load_tokenizer(str(with_code))
    model = load_base_model(str(with_code), compute_dtype="float32", cache=False)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, pad_token_id=0)
    assert not (tmp_path / "marker").exists()


# ---- chat templates ---------------------------------------------------------------------------------------

ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "os by a global": "{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}",
    "os by a function": "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
    "os by a helper": "{{ raise_exception.__globals__['os'].system('touch MARKER') }}",
    "attr filter": "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "mapped attribute": "{{ messages|map(attribute='__class__.__init__.__globals__')|list }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch MARKER') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "append": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "write": "{{ messages[0].update(content='x') }}",
    "underscored name": "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "code object": "{{ cycler.next.__code__.co_code }}",
    "frame": "{{ (messages for _ in []).gi_frame.f_globals }}",
    "huge range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "syntax": "{% for",
    "huge text": "{{ 'a' * 10 ** 18 }}",
    "no text": "{{ messages[0].content.nothing.at_all }}",
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_by_a_chat_template(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """Refused in training and at generation, nothing run, nothing changed."""
    monkeypatch.chdir(tmp_path)
    text = ATTACKS[attack].replace("MARKER", str(tmp_path / "marker"))
    (copied / "chat_template.jinja").write_text(text)
    tokenizer = load_tokenizer(str(copied))
    assert tokenizer.chat_template == text
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    before = json.dumps(messages)
    for encode in (
        lambda: encode_prompt(messages[:1], tokenizer),
        lambda: encode_example(messages, tokenizer, max_length=64),
    ):
        with pytest.raises(InputError) as raised:
            encode()
        assert_one_sentence(raised.value)
    assert json.dumps(messages) == before
    assert not (tmp_path / "marker").exists()


def test_several_chat_templates(copied: Path) -> None:
    """Named templates without a default: refused; with one: that one is used."""
    messages = [{"role": "user", "content": "Hi"}]
    (copied / "chat_template.jinja").unlink()
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    with pytest.raises(InputError):
        encode_prompt(messages, load_tokenizer(str(copied)))
    (copied / "chat_template.jinja").write_text(tiny_tokenizer().chat_template)
    assert encode_prompt(messages, load_tokenizer(str(copied))) == encode_prompt(messages, tiny_tokenizer())


# ---- no path out of a directory ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "a b", ".x", "ä.json"])
def test_file_names(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", "/", "/etc/passwd", "../a", "a/b", "a/../b", "a/", "./a", "..\\a", "a\\b", "C:a", "C:\\a",
        "\\\\host\\share", "a\0", "a\nb", "\x1b[31m", "a" * 256, None, 7, ["a"],
    ],
)  # fmt: skip
def test_names_that_lead_elsewhere(name: Any) -> None:
    assert not is_file_name(name)


@pytest.mark.parametrize(
    "shard", ["/etc/passwd", "../copied2/model.safetensors", "..\\x", "", "..", "a\0b", 3, None]
)
def test_an_index_may_not_lead_elsewhere(copied: Path, shard: Any) -> None:
    shutil.copytree(copied, copied.with_name("copied2"))
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(InputError, match=r"index\.json names a shard outside its directory") as raised:
        load_base_model(str(copied))
    assert_one_sentence(raised.value)


@pytest.fixture
def elsewhere(copied: Path, tmp_path: Path) -> Path:
    """Another model's files, with a word of its own in the vocabulary, that `copied` should never reach."""
    directory = Path(shutil.copytree(copied, tmp_path / "elsewhere"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["secret"])
    tokenizer.save_pretrained(directory)
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps({**model["vocab"], "secret": 269}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    shutil.copy(directory / "tokenizer.json", directory / "tokenizer.4.0.0.json")
    edit_json(directory / "config.json", max_position_embeddings=77)
    shutil.copy(directory / "config.json", directory / "config.4.0.0.json")
    return directory


TOKENIZER_PATHS = {
    "tokenizer_file": ("tokenizer_config.json", {"tokenizer_file": "ELSEWHERE/tokenizer.json"}),
    "vocab_file": (
        "tokenizer_config.json",
        {"vocab_file": "ELSEWHERE/vocab.json", "merges_file": "ELSEWHERE/merges.txt"},
    ),
    "vocab": ("tokenizer_config.json", {"vocab": "ELSEWHERE/vocab.json", "merges": "ELSEWHERE/merges.txt"}),
    "init_inputs": ("tokenizer_config.json", {"init_inputs": ["ELSEWHERE/vocab.json", "ELSEWHERE/merges.txt"]}),
    "fast_tokenizer_files": (
        "tokenizer_config.json",
        {"fast_tokenizer_files": ["ELSEWHERE/tokenizer.4.0.0.json"]},
    ),
    "relative": ("tokenizer_config.json", {"fast_tokenizer_files": ["../elsewhere/tokenizer.4.0.0.json"]}),
    "map, tokenizer_file": ("special_tokens_map.json", {"tokenizer_file": "ELSEWHERE/tokenizer.json"}),
    "map, vocab_file": (
        "special_tokens_map.json",
        {"vocab_file": "ELSEWHERE/vocab.json", "merges_file": "ELSEWHERE/merges.txt"},
    ),
    "map, name": ("special_tokens_map.json", {"name_or_path": "owner/name", "is_local": False}),
}


@pytest.mark.parametrize("own", [True, False], ids=["own files", "no own files"])
@pytest.mark.parametrize("kind", ["TokenizersBackend", "GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("way", TOKENIZER_PATHS)
def test_a_tokenizer_may_not_read_elsewhere(copied: Path, elsewhere: Path, way: str, kind: str, own: bool) -> None:
    """Refused, or ignored; several of these ways lead out in plain transformers 5.23."""
    file, entries = TOKENIZER_PATHS[way]
    edit_json(copied / "tokenizer_config.json", tokenizer_class=kind)
    edit_json(copied / file, **json.loads(json.dumps(entries).replace("ELSEWHERE", str(elsewhere))))
    if not own:
        (copied / "tokenizer.json").unlink()
    try:
        vocabulary = load_tokenizer(str(copied)).get_vocab()
    except InputError as error:
        assert_one_sentence(error)
    else:
        assert "secret" not in vocabulary


def test_those_ways_lead_out_of_plain_transformers(copied: Path, elsewhere: Path) -> None:
    """A guard of the test above: "secret" is what a reader of the wrong file has."""
    from transformers import AutoTokenizer

    edit_json(copied / "special_tokens_map.json", tokenizer_file=str(elsewhere / "tokenizer.json"))
    assert "secret" in AutoTokenizer.from_pretrained(copied, trust_remote_code=False).get_vocab()


def test_paths_of_the_authors_machine_do_no_harm(copied: Path) -> None:
    """Files of earlier days carry such; they must still load."""
    edit_json(
        copied / "tokenizer_config.json",
        tokenizer_file="/home/someone/.cache/huggingface/abc",
        special_tokens_map_file="/home/author/special_tokens_map.json",
        name_or_path="/home/author/model",
        init_inputs=[],
    )
    edit_json(copied / "special_tokens_map.json", bos_token="<s>", additional_special_tokens=["<|im_end|>"])
    assert load_tokenizer(str(copied)).encode("hello there") == tiny_tokenizer().encode("hello there")


def test_a_config_may_not_name_another(copied: Path, elsewhere: Path) -> None:
    for names in (["config.4.0.0.json"], ["../elsewhere/config.4.0.0.json"]):
        edit_json(copied / "config.json", configuration_files=names)
        with pytest.raises(InputError, match=r"config\.json names other configuration_files"):
            load_config(str(copied))


def name_base(adapter: Path, name: Any) -> None:
    edit_json(adapter / CONFIG, base_model_name_or_path=name)


def test_the_base_that_an_adapter_names_is_said(llama: Path, saved: Path) -> None:
    said: list[str] = []
    assert base_model_of(str(saved), said.append) == str(llama)
    assert said == [f"base model: {llama}, as {saved / CONFIG} names it"]


@pytest.mark.parametrize(
    "name",
    [
        "owner/model", "../no/such", "/no/such/base", "~nobody/model", "\\\\host\\share", "//host/share",
        "https://user:password@host/model", "a\nb", "a\0b", "x" * 5000, "not an id", "hf_" + "Ab3" * 12,
    ],
)  # fmt: skip
def test_a_base_that_is_not_here_is_not_fetched(
    saved: Path, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file's word downloads nothing: the user has to give the name."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("downloaded"))
    name_base(saved, name)
    with pytest.raises(InputError, match=rf"{CONFIG} names .*not on this machine; pass --model") as raised:
        base_model_of(str(saved), lambda line: pytest.fail(line))
    assert_one_sentence(raised.value)
    assert "password" not in str(raised.value) and "Ab3Ab3" not in str(raised.value)


@pytest.mark.parametrize("name", ["", None, 7, ["a"], {"a": 1}])
def test_an_adapter_without_a_base(saved: Path, name: Any) -> None:
    name_base(saved, name)
    with pytest.raises(InputError, match="names no base; pass --model"):
        base_model_of(str(saved))


def test_a_base_downloaded_before_may_be_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The user has asked for it once: training records the hub id it was given."""
    hub = tmp_path / "hub" / "models--owner--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (hub / "snapshots" / ("0" * 40) / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    name_base(saved, "owner/model")
    assert base_model_of(str(saved), lambda line: None) == "owner/model"


# ---- no network, no secrets, ordinary permissions ---------------------------------------------------------

RUN = """
import json, os, socket, stat, sys
from pathlib import Path

attempts = []

def record(*args, **options):
    attempts.append(repr(args[-1]))
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = record
os.umask(0o027)
import train
from qlora.system.errors import InputError
from qlora.adapters.provenance import base_model_of; from qlora.export.merge import merge_adapter
from qlora.model.resolve import resolve_model

model, work = sys.argv[1], Path(sys.argv[2])
data, out = work / "rows.jsonl", work / "out"
data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\\n" for i in range(4)))
options = ["--data", str(data), "--output-dir", str(out), "--max-steps", "1", "--max-length", "64"]
train.main(["--model", model, *options])
train.main(["--model", model, "--adapter", str(out), "--prompt", "hi", "--max-new-tokens", "3"])
merge_adapter(base_model_of(str(out)), str(out), str(work / "merged"))
during = list(attempts)
try:
    resolve_model("owner/name")
    refused = None
except InputError as error:
    refused = str(error)
print(json.dumps({"during": during, "after": len(attempts) - len(during), "refused": refused}))
"""
TOKEN = "hf_" + "aB3dE6gH9k" * 4


@pytest.fixture(scope="module")
def whole_run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run, an answer and a merge in a process of their own: (its directory, its report, its whole output)."""
    work = tmp_path_factory.mktemp("run")
    hidden = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"QLORA_CACHE": str(work / "cache"), "HF_HOME": str(work / "hub"), "HF_TOKEN": TOKEN}
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(llama), str(work)],
        cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return work, json.loads(result.stdout.splitlines()[-1]), result.stdout + result.stderr


def test_no_network_without_a_hub_id(whole_run: tuple[Path, dict[str, Any], str]) -> None:
    """Not one connection or look-up; a hub id afterwards makes some, so that the recorder works."""
    _, report, _ = whole_run
    assert report["during"] == []
    assert report["after"] > 0
    assert "--model owner/name is neither a local path nor" in report["refused"] and "\n" not in report["refused"]


@pytest.mark.parametrize("module", ["bitsandbytes", "qlora.quant.weight"])
def test_no_code_is_fetched_at_import(tmp_path: Path, module: str) -> None:
    """Where the package `kernels` is installed, bitsandbytes by itself fetches some for a CPU with AVX512-BF16."""
    (tmp_path / "kernels.py").write_text(
        "from pathlib import Path\ndef get_kernel(*_, **__):\n    Path(__file__).with_name('marker').touch()\n"
    )
    code = f"import {module}, kernels; from bitsandbytes.functional import has_avx512bf16 as f; print(bool(f()))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    would_fetch = module == "bitsandbytes" and result.stdout.split()[-1] == "True"
    assert (tmp_path / "marker").exists() == would_fetch


def test_outputs_have_ordinary_permissions(whole_run: tuple[Path, dict[str, Any], str]) -> None:
    """Everything a run, a merge and the cache leave behind, under umask 027."""
    work, _, _ = whole_run
    written = [p for name in ("out", "merged", "cache") for p in (work / name, *(work / name).rglob("*"))]
    names = {path.name for path in written}
    assert {WEIGHTS, CONFIG, "metrics.jsonl", "loss.png", "run.json", "model.safetensors", "README.md"} <= names
    for path in written:
        wanted, hidden = 0o777 if path.is_dir() else 0o666, 0o077 if path.is_relative_to(work / "cache") else 0o027
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~hidden, path


def test_no_token_is_kept_or_shown(whole_run: tuple[Path, dict[str, Any], str]) -> None:
    work, _, output = whole_run
    files = [path for path in work.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert TOKEN not in output and not [path for path in files if TOKEN.encode() in path.read_bytes()]


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_permissions_follow_the_umask(
    llama: Path, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, merged model and cache; safetensors and tempfile would make them private, or the umask be lost."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "new" / "cache"))
    model = get_lora_model(load_base_model(str(llama), compute_dtype="float32"), LoRAConfig(rank=2))
    model.save(tmp_path / "deep" / "adapter")
    merge_adapter(
        str(llama), str(tmp_path / "deep" / "adapter"), str(tmp_path / "merged"), MergeOptions(drift=False)
    )
    written = list(tmp_path.rglob("*"))
    assert {"new", "deep", "adapter", "merged", WEIGHTS, "config.json"} <= {path.name for path in written}
    for path in written:
        wanted, is_private = 0o777 if path.is_dir() else 0o666, path.is_relative_to(tmp_path / "new" / "cache")
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~(0o077 if is_private else umask), path
    assert os.umask(umask) == umask


SECRETS = {
    "Hugging Face token": ("token hf_" + "aB3dE6gH9k" * 3 + "Xyz1 in text", "token [redacted] in text"),
    "organisation token": ("api_org_" + "aB3dE6gH9k" * 3, "[redacted]"),
    "OpenAI key": ("key=sk-proj-" + "aB3dE6gH9k" * 3 + "-xyz_1", "key=[redacted]"),
    "Anthropic key": ("sk-ant-api03-" + "aB3dE6gH9k" * 3, "[redacted]"),
    "URL": ("https://me:pa%40ss@host.org/x?y=1", "https://[redacted]@host.org/x?y=1"),
    "token in a URL": ("git+https://abc123@github.com/a/b", "git+https://[redacted]@github.com/a/b"),
    "bearer": ("Authorization: Bearer abc.DEF-123_x/y+z=0123", "Authorization: Bearer [redacted]"),
    "twice": ("hf_" + "a1" * 17 + " hf_" + "b2" * 17, "[redacted] [redacted]"),
    "GitHub": ("ghp_" + "aB3d" * 9 + " github_pat_" + "11AB_cd" * 6, "[redacted] [redacted]"),
    "GitLab": ("glpat-" + "aB3d" * 5, "[redacted]"),
    "AWS": ("id AKIA" + "ABCD2345" * 2 + ".", "id [redacted]."),
    "Google": ("AIza" + "Sy3_-" * 7, "[redacted]"),
    "npm": ("npm_" + "aB3d" * 9, "[redacted]"),
    "Slack": ("xoxb-123456789012-abcDEF", "[redacted]"),
    "Slack's hook": ("https://hooks.slack.com/services/T0/B1/x2", "https://hooks.slack.com/services/[redacted]"),
    "wandb": ("/runs/wandb_v1_" + "aB3d" * 9 + "_x9/out", "/runs/[redacted]/out"),
    "PyPI": ("pypi-AgEI" + "aB3d" * 12, "[redacted]"),
    "web token": ("eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.abc_-DEF", "[redacted]"),
    "private key": ("-----BEGIN RSA PRIVATE KEY-----\nab\n-----END RSA PRIVATE KEY-----\nx", "[redacted]\nx"),
    "query": ("https://host/x?api_key=aB3dE6gH9kaB3dE6&y=1", "https://host/x?api_key=[redacted]&y=1"),
    "in quotes": ("'hf_" + "a1" * 17 + "'", "'[redacted]'"),
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_redacted(kind: str) -> None:
    text, expected = SECRETS[kind]
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "/home/me/models/llama-7b", "HuggingFaceTB/SmolLM2-135M-Instruct", "C:\\models\\sk-learn", "task-sk-1",
        "hf_cache/models--owner--name", "/data/hf_finetuned_checkpoint_of_today", "hf_transfer", "me@host.org",
        "https://huggingface.co/owner/model?x=a@b", "scp me@host:/path", "the bearer of a ring", "lr 2e-4\nloss 1",
        "ghp_short", "AKIA in a word", "npm_config_cache", "gsk_", "xoxb-", "eos_token=<|im_end|>", "pad_token=0",
        "wandb_v1_", "--new-tokens=<call_2026>", "num_tokens=1234", "glued-together-words", "SG.1.2", "r8_1",
        "model-00001-of-00002.safetensors", "bearer certificates", "q_proj,v_proj", "ratio 1:2@3", "http://host:8/a",
    ],
)  # fmt: skip
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "MLFLOW_TRACKING_PASSWORD",
        "CLEARML_API_SECRET_KEY", "SWANLAB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "my_token",
        "DB_PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "AZURE_CLIENT_SECRET", "AWS_ACCESS_KEY_ID",
    ],
)  # fmt: skip
def test_values_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever they look like; a value too short to be a secret could be part of any word."""
    monkeypatch.setenv(name, " correct.horse \n")
    assert redact("x correct.horse/y") == "x [redacted]/y"
    monkeypatch.setenv(name, "model")
    assert redact("the model") == "the model"


def test_forms_of_a_value_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """In JSON, as run.json holds it, and in a URL; and of two values, one part of the other."""
    monkeypatch.setenv("MY_SECRET", 'ho"rse\\ ü/x')
    monkeypatch.setenv("MY_KEY", 'ho"rse\\ ü')
    assert redact(json.dumps({"a": os.environ["MY_SECRET"]})) == '{"a": "[redacted]"}'
    assert redact(f"http://host/{quote(os.environ['MY_SECRET'], safe='')}") == "http://host/[redacted]"


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "SSH_KEY_PATH", "TOKEN_FILE", "HOME"])
def test_other_values_of_the_environment_stay(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "correct.horse")
    assert redact("x correct.horse/y") == "x correct.horse/y"


def test_no_secret_in_adapter_and_card(llama: Path, tmp_path: Path) -> None:
    secret = "hf_" + "a1B2" * 9
    base = shutil.copytree(llama, tmp_path / secret)
    model = get_lora_model(load_base_model(str(base), cache=False), base_name=f"https://me:{secret}@host/model")
    model.save(tmp_path / "adapter")
    assert (
        read_adapter(tmp_path / "adapter").description["base_model_name_or_path"]
        == "https://[redacted]@host/model"
    )
    merge_adapter(str(base), str(tmp_path / "adapter"), str(tmp_path / "merged"), MergeOptions(drift=False))
    assert "`[redacted]`" in (tmp_path / "merged" / "README.md").read_text()
    for file in [*(tmp_path / "adapter").iterdir(), *(tmp_path / "merged").iterdir()]:
        assert secret.encode() not in file.read_bytes(), file.name


# ---- pinned requirements ----------------------------------------------------------------------------------

PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def read_requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def applies(requirement: Requirement, python: str) -> bool:
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def pins(python: str) -> dict[str, str]:
    """Package -> its one version for a Python."""
    found: dict[str, str] = {}
    for requirement in read_requirements("requirements.txt"):
        if applies(requirement, python):
            name = canonicalize_name(requirement.name)
            assert name not in found, f"{name} is pinned twice for Python {python}"
            found[name] = next(iter(requirement.specifier)).version
    return found


def ranges() -> dict[str, Requirement]:
    text = (REPOSITORY / "pyproject.toml").read_text()
    listed = text.partition("\ndependencies = [")[2].partition("]")[0]
    requirements = [Requirement(text) for text in re.findall(r'"([^"]+)"', listed)]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def optional_packages() -> set[str]:
    """What an extra other than dev installs; code that imports it says so where it is missing."""
    extras = (REPOSITORY / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    lines = [line for line in extras.partition("\n\n")[0].splitlines() if not line.startswith("dev ")]
    return {canonicalize_name(Requirement(text).name) for line in lines for text in re.findall(r'"([^"]+)"', line)}


def imported_packages() -> set[str]:
    """Distributions that the code imports, also inside functions."""
    own, names = {"qlora", "eval", "examples", "train"}, set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(str(node.module).partition(".")[0])
    distributions = packages_distributions()
    return {canonicalize_name(distributions[n][0]) for n in names - own if n not in sys.stdlib_module_names}


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_exact(file: str) -> None:
    requirements = read_requirements(file)
    assert len(requirements) > 5
    for requirement in requirements:
        operators = [(s.operator, s.version.endswith("*")) for s in requirement.specifier]
        assert operators == [("==", False)] and requirement.url is None, str(requirement)


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_imported_is_pinned_and_within_its_range(python: str) -> None:
    imported, pinned, allowed = imported_packages(), pins(python), ranges()
    assert {"torch", "numpy", "pyyaml", "huggingface-hub"} <= imported
    assert imported - pinned.keys() - optional_packages() == set()
    assert pinned.keys() == allowed.keys()
    for name, pin in pinned.items():
        specifier = allowed[name].specifier
        assert len(specifier) > 0 and specifier.contains(pin), f"{name} {pin} is outside {specifier}"


def test_the_pins_are_what_is_installed() -> None:
    """The figures and the tests speak of one set of versions."""
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    differing = {name: version(name) for name, pin in pinned.items() if version(name).partition("+")[0] != pin}
    assert pinned and not differing


def test_a_merged_model_holds_no_code(llama: Path, saved: Path, tmp_path: Path) -> None:
    """Whoever loads it needs no trust: no Python file, no pickle, no auto_map."""
    merge_adapter(str(llama), str(saved), str(tmp_path / "merged"), MergeOptions(drift=False))
    suffixes = {path.suffix for path in (tmp_path / "merged").rglob("*")}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md", ".txt", ".model"} and ".safetensors" in suffixes
    assert "auto_map" not in (tmp_path / "merged" / "config.json").read_text()
    assert load_file(tmp_path / "merged" / "model.safetensors")


def test_a_model_that_is_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(InputError, match=r"is a file but no \.gguf"):
        resolve_model(str(tmp_path / "model.bin"))
    assert not (tmp_path / "marker").exists()
