"""adapters/files.py: an adapter in one .safetensors file is the adapter in a directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.adapters.inspect import inspect_adapter
from qlora.adapters.load import load_adapter
from qlora.adapters.mix import mix_adapters
from qlora.adapters.model import LoRAModel, get_lora_model
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.adapters.provenance import TrainedBase, base_model_of, trained_base
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.export.merge import merge_adapter
from qlora.model.load import load_base_model
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.file_names import CONFIG, WEIGHTS
from tests.adapters.test_peft_files import logits, randomize
from tests.models import save_tiny_llama
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_tiny_llama(folder, tokenizer=tiny_tokenizer(), eos_token_id=2)


def base(directory: Path) -> Any:
    return load_base_model(str(directory), compute_dtype="float32", cache=False)


@pytest.fixture(scope="module")
def saved(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, torch.Tensor]:
    """(directory, file, logits) of one adapter."""
    folder = tmp_path_factory.mktemp("saved")
    config = LoRAConfig(rank=4, alpha=7.0, rank_pattern={"v_proj": 2}, use_rslora=True, dropout=0.1)
    model = get_lora_model(base(llama), config, base_name=str(llama)).eval()
    randomize(model)
    model.save(folder / "directory")
    model.save(folder / "sub" / "lora.safetensors")
    return folder / "directory", folder / "sub" / "lora.safetensors", logits(model)


def test_one_file_is_the_directory(llama: Path, saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    directory, file, expected = saved
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    whole, one = read_adapter(directory), read_adapter(file)
    assert one.config == whole.config and one.description == whole.description
    assert trained_base(str(file)) == trained_base(str(directory)) == TrainedBase(QuantConfig(), True)
    assert base_model_of(str(file), lambda line: None) == str(llama)
    model = base(llama)
    load_adapter(model, file)
    assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path / "again.safetensors", one.config, str(llama))
    save_adapter(model, tmp_path / "twice.safetensors", one.config, str(llama))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "twice.safetensors").read_bytes()
    found, other = inspect_adapter(file), inspect_adapter(directory)
    assert found.updates == other.updates and found.quantization == other.quantization


def test_a_lora_model_loads_and_saves_files(llama: Path, saved: tuple[Path, Path, torch.Tensor]) -> None:
    _, file, expected = saved
    model = get_lora_model(base(llama), LoRAConfig(rank=4, rank_pattern={"v_proj": 2})).eval()
    model.load(file)
    assert torch.equal(logits(model), expected)
    several = LoRAModel(base(llama)).eval()
    several.load_adapter(file, "one")
    several.set_adapter("one")
    assert torch.equal(logits(several), expected)


def test_files_are_mixed_and_merged(llama: Path, saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    directory, file, _ = saved
    mix_adapters([str(file), str(directory)], [0.5, 0.5], tmp_path / "mixed")
    merge_adapter(str(llama), str(file), str(tmp_path / "a"), MergeOptions(drift=False))
    merge_adapter(str(llama), str(directory), str(tmp_path / "b"), MergeOptions(drift=False))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


def test_a_file_without_settings(saved: tuple[Path, Path, torch.Tensor], tmp_path: Path) -> None:
    """PEFT's own tensor file by its name: the settings lie next to it, or it is refused."""
    directory, _, _ = saved
    shutil.copytree(directory, tmp_path / "copy")
    file = tmp_path / "copy" / WEIGHTS
    assert read_adapter(file).config == read_adapter(directory).config
    (file.parent / CONFIG).unlink()
    with pytest.raises(InputError, match=f"carries no settings; put its {CONFIG} next to it"):
        read_adapter(file)
    with pytest.raises(InputError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")
    for settings in ("{", "[]", '{"r": 4, "lora_alpha": 8}'):
        save_file(load_file(file), file, {"adapter_config": settings})
        with pytest.raises(InputError, match=r"save|a None adapter"):
            read_adapter(file)


def test_what_needs_a_directory(llama: Path, tmp_path: Path) -> None:
    model = LoRAModel(base(llama), LoRAConfig(rank=4, init="pissa"))
    with pytest.raises(InputError, match=r"a changed base \(PiSSA, LoftQ\) needs several files"):
        model.save(tmp_path / "pissa.safetensors")
    assert not any(tmp_path.iterdir())
