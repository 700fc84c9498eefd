"""Checkpoints and the output directory: whole or refused, and what a resumed run must share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from qlora.checkpoint import checkpoint_path, find_checkpoint, load_checkpoint, read_state, save_checkpoint
from qlora.config import LoRAConfig
from qlora.errors import InputError, TrainingStopped
from qlora.lora import freeze_base, inject_lora, lora_parameters, lora_state_dict
from qlora.model import load_base_model
from qlora.optim import MasterOptimizer, build_optimizer
from qlora.output import RunOutput, data_fingerprint
from tests.models import save_tiny_llama
from tests.test_trainer import make_examples

SETTINGS = {"data": "abc", "window": 8, "compute_dtype": "float32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))


def adapted(tiny: str, seed: int = 1) -> Any:
    model = load_base_model(tiny, compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(rank=4), seed)
    freeze_base(model)
    return model


def stepped(model: Any) -> MasterOptimizer:
    """An optimizer that has made one step, so that it has moments to store."""
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    for number, parameter in enumerate(lora_parameters(model), start=1):
        parameter.grad = torch.full(parameter.shape, 0.1 * number)
    optimizer.step(1e-2)
    return optimizer


@pytest.fixture
def saved(tiny: str, tmp_path: Path) -> tuple[Path, Any, MasterOptimizer]:
    model = adapted(tiny)
    optimizer = stepped(model)
    path = checkpoint_path(tmp_path, 5)
    save_checkpoint(path, 5, model, optimizer, LoRAConfig(rank=4), SETTINGS, "base")
    return path, model, optimizer


def test_round_trip_is_bit_for_bit(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    path, model, optimizer = saved
    other = adapted(tiny, seed=77)
    step, restored = load_checkpoint(
        path, other, lambda: build_optimizer(lora_parameters(other), "adamw"), SETTINGS
    )
    assert step == 5
    assert len(lora_state_dict(model)) == 8
    for key, tensor in lora_state_dict(model).items():
        assert torch.equal(tensor, lora_state_dict(other)[key])
    for key, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, restored.state_tensors()[key]), key
    assert any(key.endswith("exp_avg") for key in restored.state_tensors())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "adapter_config.json"])
def test_a_flipped_byte_is_found(saved: tuple[Path, Any, MasterOptimizer], tiny: str, name: str) -> None:
    path = saved[0]
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"damaged in {name}"):
        read_state(path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1}', '{"step": "x", "sha256": {}, "settings": {}}'])
def test_an_unreadable_state_is_an_input_error(saved: tuple[Path, Any, MasterOptimizer], content: str) -> None:
    (saved[0] / "state.json").write_text(content)
    with pytest.raises(InputError, match="not readable"):
        read_state(saved[0])


def test_a_missing_file_is_found(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    (saved[0] / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="not readable"):
        read_state(saved[0])


def test_all_differing_settings_are_listed(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    model = adapted(tiny, seed=77)
    before = {k: v.clone() for k, v in lora_state_dict(model).items()}
    with pytest.raises(InputError, match=r"data was 'abc', is 'xyz'; window was 8, is 4"):
        load_checkpoint(
            saved[0],
            model,
            lambda: build_optimizer(lora_parameters(model), "adamw"),
            {**SETTINGS, "data": "xyz", "window": 4},
        )
    assert all(torch.equal(before[k], v) for k, v in lora_state_dict(model).items())


def test_the_adapter_in_a_checkpoint_loads_by_itself(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    from qlora.adapter import load_adapter

    fresh = load_base_model(tiny, compute_dtype="float32", cache=False)
    load_adapter(fresh, saved[0])
    for key, tensor in lora_state_dict(saved[1]).items():
        assert torch.equal(tensor, lora_state_dict(fresh)[key])


def test_saving_again_replaces(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    path, model, optimizer = saved
    save_checkpoint(path, 6, model, optimizer, LoRAConfig(rank=4), SETTINGS, "base")
    assert read_state(path)["step"] == 6
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_auto_finds_the_newest(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path) is None
    for step in (9, 10, 100):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    assert find_checkpoint("auto", tmp_path) == checkpoint_path(tmp_path, 100)


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint \(it has no state\.json\)"):
        find_checkpoint(str(tmp_path), tmp_path)


# ---- the output directory ---------------------------------------------------------------------------------


def test_a_directory_of_another_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="holds another run; pass --resume auto"):
        RunOutput(str(tmp_path), "base", None, Accelerator(), {})


def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunOutput(str(tmp_path / "file" / "out"), "base", None, Accelerator(), {})


def test_metrics_of_steps_done_again_are_dropped(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    """A run killed after step 7, with half a line written, resumes from step 5."""
    path, _, _ = saved
    directory = path.parent.parent
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 8)]
    (directory / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8, "lo')
    model = adapted(tiny)
    output = RunOutput(str(directory), "base", "auto", Accelerator(), {"rank": 4})
    assert output.compute_dtype("auto") == "float32" and output.compute_dtype("bfloat16") == "bfloat16"
    output.begin(
        model,
        LoRAConfig(rank=4),
        lambda: build_optimizer(lora_parameters(model), "adamw"),
        SETTINGS,
        total_steps=9,
    )
    assert output.start_step == 5
    output.log({"step": 6, "loss": 2.0, "tokens_per_second": 1.0, "peak_memory_gib": 1.0})
    kept = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in kept] == [1, 2, 3, 4, 5, 6] and kept[-1]["loss"] == 2.0
    output.close()
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((directory / "run.json").read_text()) == {"rank": 4}


def test_an_adapter_that_learned_nothing_is_not_saved(tiny: str, tmp_path: Path) -> None:
    model = adapted(tiny)
    output = RunOutput(str(tmp_path / "out"), "base", None, Accelerator(), {})
    make = lambda: build_optimizer(lora_parameters(model), "adamw")  # noqa: E731
    output.begin(model, LoRAConfig(rank=4), make, SETTINGS, total_steps=3)
    with pytest.raises(TrainingStopped, match="After 3 steps every lora_B is still zero"):
        output.save(3)
    assert not (tmp_path / "out" / "checkpoints").exists()
    output.save(0)  # the state before the first step is worth keeping: a run may stop there
    assert read_state(checkpoint_path(tmp_path / "out", 0))["step"] == 0


def test_the_fingerprint_sees_content_masks_and_order() -> None:
    examples = make_examples(4)
    same, reordered = data_fingerprint(make_examples(4)), data_fingerprint(examples[::-1])
    masked = make_examples(4)
    masked[0].targets[-1] = -100
    assert data_fingerprint(examples) == same
    assert len({same, reordered, data_fingerprint(masked)}) == 3
