"""adapters/load.py: training that goes on from an adapter uses its settings, and refuses others by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import qlora
from qlora.adapters.load import continued_config
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.adapters.provenance import base_model_of
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import active_adapter
from qlora.system.errors import InputError
from tests.lora.test_full_parameters import adapted
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(base, adapter of rank 2 and alpha 6 on q_proj and o_proj)."""
    folder = tmp_path_factory.mktemp("old")
    base = save_tiny_llama(folder / "base", tokenizer=tiny_tokenizer(), intermediate_size=128, eos_token_id=2)
    model = adapted(base, target_modules="q_proj,o_proj", alpha=6.0, modules_to_save="norm")
    save_adapter(model, folder / "adapter", active_adapter(model).config, str(base))  # type: ignore[union-attr]
    return base, folder / "adapter"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rank": 4}, r"--rank 4 would change nothing: --adapter \S+ goes on with its own rank 2; leave it out"),
        ({"use_dora": True, "alpha": 3.0}, r"--alpha 3.0, --use-dora True would change nothing.* own alpha 6"),
        (
            {"target_modules": "all-linear"},
            r"--target-modules all-linear names 14 layers, but .* own 4",
        ),
        ({"layers": "1"}, "within --layers names 2 layers, but"),
        ({"target_modules": "wq"}, "match no linear layer"),
        ({"modules_to_save": "lm_head"}, "--modules-to-save lm_head would change nothing"),
        ({"init": "pissa"}, "--init pissa would change nothing"),
        ({"dropout": 0.1}, "--dropout 0.1 would change nothing"),
    ],
    ids=str,
)
def test_other_settings_are_refused(old: tuple[Path, Path], asked: dict[str, Any], message: str) -> None:
    """`--adapter OLD --rank 4` trained OLD's rank, and run.json said 4."""
    base, adapter = old
    with pytest.raises(InputError, match=message):
        continued_config(LoRAConfig(**asked), read_adapter(adapter), str(base))


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"rank": 2, "alpha": 6.0, "target_modules": "o_proj,q_proj", "modules_to_save": "norm"},
        {"lora_plus_ratio": 16.0, "adapter_dtype": "float32"},
    ],
    ids=str,
)
def test_its_own_settings_and_the_optimizer_s(old: tuple[Path, Path], asked: dict[str, Any]) -> None:
    base, adapter = old
    config = continued_config(LoRAConfig(**asked), read_adapter(adapter), str(base))
    assert (config.rank, config.alpha, config.target_modules) == (2, 6.0, ["q_proj", "o_proj"])
    assert config.lora_plus_ratio == asked.get("lora_plus_ratio", 1.0)


def test_run_json_tells_what_trained(
    old: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = old
    rows = [{"prompt": f"{n}?", "completion": f"{n}!"} for n in range(4)]
    options: dict[str, Any] = dict(data=rows, adapter=str(adapter), max_steps=1, batch_size=2, sample_every=0)
    run = qlora.train(model=str(base), output_dir=str(tmp_path / "out"), lora_plus_ratio=4.0, **options)
    # A setting given at its default value (--rank 8) looks like one left out.
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"continuing adapter {adapter}: rank 2, alpha 6, q_proj,o_proj" in printed
    told = json.loads((tmp_path / "out" / "run.json").read_text())["lora"]
    assert (told["rank"], told["alpha"], told["target_modules"], told["lora_plus_ratio"]) == (
        2, 6.0, "q_proj,o_proj", 4.0,
    )  # fmt: skip
    assert read_adapter(run.adapter_dir).config.rank == 2
    with pytest.raises(InputError, match="--rank 4 would change nothing"):
        qlora.train(model=str(base), output_dir=str(tmp_path / "other"), rank=4, **options)
    assert not (tmp_path / "other").exists()


def test_a_relative_base_is_found_from_another_directory(
    old: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json keeps the absolute path; merge named "base", which was not there."""
    base, _ = old
    monkeypatch.chdir(base.parent)
    rows = [{"prompt": "a", "completion": "b"}] * 2
    out = tmp_path / "out"
    qlora.train(model=base.name, data=rows, output_dir=str(out), max_steps=1, batch_size=2, sample_every=0)
    said: list[str] = []
    assert base_model_of(str(out), said.append) == base.name
    monkeypatch.chdir(tmp_path)
    assert base_model_of(str(out), said.append) == str(base)
    assert said[1] == f"base model: {base}, as {out / 'run.json'} names it"
    (out / "run.json").write_text('{"facts": {"base_path": "/nowhere/else"}}')
    with pytest.raises(InputError, match="names base as its base, which is not on this machine"):
        base_model_of(str(out), said.append)
