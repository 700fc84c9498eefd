"""Checkpoints: whole or refused, which ones are kept, and what a resumed run must share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.adapters.peft_files import snapshot_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora
from qlora.lora.optimizer import MasterOptimizer, build_optimizer
from qlora.lora.state import lora_state_dict
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.system.errors import InputError
from qlora.training.checkpoint import (
    best_checkpoint,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from qlora.training.progress import Progress
from tests.models import save_tiny_llama

PROGRESS = Progress(
    5, 1, eval_loss=2.5, best_loss=2.25, score=0.5, best_score=0.75, reference=0.75, stale=2, sampled=4
)
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


def write(path: Path, model: Any, optimizer: MasterOptimizer, progress: Progress) -> None:
    adapter = snapshot_adapter(model, LoRAConfig(rank=4), "base")
    save_checkpoint(path, progress, adapter, optimizer.state_tensors(), SETTINGS, {"rank": 4})


@pytest.fixture
def saved(tiny: str, tmp_path: Path) -> tuple[Path, Any, MasterOptimizer]:
    model = adapted(tiny)
    optimizer = stepped(model)
    path = checkpoint_path(tmp_path, 5)
    write(path, model, optimizer, PROGRESS)
    return path, model, optimizer


def test_round_trip_is_bit_for_bit(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    path, model, optimizer = saved
    other = adapted(tiny, seed=77)
    progress, restored = load_checkpoint(
        path, other, lambda: build_optimizer(lora_parameters(other), "adamw"), SETTINGS
    )
    assert progress == PROGRESS
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


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "1", '{"step": 1}', '{"format": 2, "step": 1}', "[" * 100_000, "\x00", '{"a": 1'],
    ids=range(9),
)  # fmt: skip
def test_an_unreadable_state_is_an_input_error(saved: tuple[Path, Any, MasterOptimizer], content: str) -> None:
    (saved[0] / "state.json").write_text(content)
    with pytest.raises(InputError, match="not readable"):
        read_state(saved[0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", -1), ("step", "5"), ("step", True), ("skipped", 1.5), ("eval_loss", "low"), ("settings", 3),
        ("eval_loss", float("nan")), ("best_loss", float("inf")), ("versions", None), ("sha256", ["a"]),
        ("stale", -1), ("stale", 0.5), ("sampled", -2), ("score", "all"), ("reference", float("nan")),
    ],
)  # fmt: skip
def test_a_wrong_value_in_the_state_is_named(
    saved: tuple[Path, Any, MasterOptimizer], field: str, value: Any
) -> None:
    state = json.loads((saved[0] / "state.json").read_text())
    (saved[0] / "state.json").write_text(json.dumps(state | {field: value}))
    with pytest.raises(InputError, match="not readable"):
        read_state(saved[0])


def test_a_checkpoint_from_before_scores_and_samples_is_read(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    state = json.loads((saved[0] / "state.json").read_text())
    old = {k: v for k, v in state.items() if k not in ("score", "best_score", "reference", "stale", "sampled")}
    assert len(old) == len(state) - 5
    (saved[0] / "state.json").write_text(json.dumps(old))
    assert read_state(saved[0])["progress"] == Progress(5, 1, eval_loss=2.5, best_loss=2.25)


def test_another_format_is_named(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    state = json.loads((saved[0] / "state.json").read_text())
    (saved[0] / "state.json").write_text(json.dumps(state | {"format": 1}))
    with pytest.raises(InputError, match="has format 1, this version reads 2"):
        read_state(saved[0])


def test_a_state_can_name_no_file_elsewhere(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    """Checksums are looked up for the three files that belong to a checkpoint, whatever the file lists."""
    state = json.loads((saved[0] / "state.json").read_text())
    state["sha256"]["../../../secret"] = "0" * 64
    (saved[0] / "state.json").write_text(json.dumps(state))
    assert read_state(saved[0])["progress"] == PROGRESS


@pytest.mark.parametrize("name", ["adamw", "paged_adamw_32bit"])
def test_a_state_from_before_the_first_update_resumes(tiny: str, tmp_path: Path, name: str) -> None:
    """A first step that was skipped leaves an optimizer without moments."""
    model = adapted(tiny)
    optimizer = build_optimizer(lora_parameters(model), name)
    write(tmp_path / "step-1", model, optimizer, Progress(1, skipped=1))
    other = adapted(tiny, seed=77)
    make = lambda: build_optimizer(lora_parameters(other), name)  # noqa: E731
    progress, restored = load_checkpoint(tmp_path / "step-1", other, make, SETTINGS)
    assert progress == Progress(1, skipped=1)
    for own, parameters in ((optimizer, lora_parameters(model)), (restored, lora_parameters(other))):
        for parameter in parameters:
            parameter.grad = torch.full(parameter.shape, 0.5)
        own.step(1e-2)
    assert all(torch.equal(v, lora_state_dict(other)[k]) for k, v in lora_state_dict(model).items())
    assert all(torch.equal(v, restored.state_tensors()[k]) for k, v in optimizer.state_tensors().items())


def test_the_state_describes_itself(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    state = json.loads((saved[0] / "state.json").read_text())
    assert state["settings"] == SETTINGS and state["run"] == {"rank": 4} and state["format"] == 2
    assert set(state["versions"]) == {"torch", "transformers", "bitsandbytes", "accelerate"}
    assert state["versions"]["torch"] == torch.__version__
    assert len(state["sha256"]) == 3


def test_a_missing_file_is_found(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    (saved[0] / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="not readable"):
        read_state(saved[0])


def test_all_differing_settings_are_listed(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    model = adapted(tiny, seed=77)
    before = {k: v.clone() for k, v in lora_state_dict(model).items()}
    with pytest.raises(InputError, match=r"the training data \(its rows, .*\) differs; window was 8, is 4"):
        load_checkpoint(
            saved[0],
            model,
            lambda: build_optimizer(lora_parameters(model), "adamw"),
            {**SETTINGS, "data": "xyz", "window": 4},
        )
    assert all(torch.equal(before[k], v) for k, v in lora_state_dict(model).items())


def test_forcing_names_what_it_overrides(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    model, said = adapted(tiny, seed=77), []
    progress, _ = load_checkpoint(
        saved[0], model, lambda: build_optimizer(lora_parameters(model), "adamw"), {**SETTINGS, "window": 4},
        force=True, say=said.append,
    )  # fmt: skip
    assert progress == PROGRESS
    assert said == ["--force-resume overrides: window was 8, is 4"]
    assert all(torch.equal(v, lora_state_dict(model)[k]) for k, v in lora_state_dict(saved[1]).items())


def test_other_library_versions_and_plans_are_said(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    state = json.loads((saved[0] / "state.json").read_text())
    state["versions"]["torch"] = "1.0"
    state["settings"]["total_steps"] = 10
    (saved[0] / "state.json").write_text(json.dumps(state))
    model, said = adapted(tiny), []
    make = lambda: build_optimizer(lora_parameters(model), "adamw")  # noqa: E731
    load_checkpoint(saved[0], model, make, {**SETTINGS, "total_steps": 20}, say=said.append)
    assert said[0].startswith("the run was planned for 10 steps, now for 20")
    assert f"torch 1.0 -> {torch.__version__}" in said[1] and len(said) == 2


def test_the_adapter_in_a_checkpoint_loads_by_itself(saved: tuple[Path, Any, MasterOptimizer], tiny: str) -> None:
    from qlora.adapters.load import load_adapter

    fresh = load_base_model(tiny, compute_dtype="float32", cache=False)
    load_adapter(fresh, saved[0])
    for key, tensor in lora_state_dict(saved[1]).items():
        assert torch.equal(tensor, lora_state_dict(fresh)[key])


def test_saving_again_replaces(saved: tuple[Path, Any, MasterOptimizer]) -> None:
    path, model, optimizer = saved
    write(path, model, optimizer, Progress(6))
    assert read_state(path)["progress"] == Progress(6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.fixture
def several(tiny: str, tmp_path: Path) -> Path:
    """Checkpoints of steps 9, 10, 100 and 2,000,000, of which 10 has the lowest loss."""
    model = adapted(tiny)
    optimizer = stepped(model)
    for step, loss in ((9, 3.0), (10, 1.5), (100, 2.0), (2_000_000, None)):
        write(checkpoint_path(tmp_path, step), model, optimizer, Progress(step, eval_loss=loss))
    return tmp_path


def steps(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(directory)]


def test_auto_finds_the_newest(several: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert find_checkpoint("auto", tmp_path_factory.mktemp("empty")) is None
    (several / "checkpoints" / "step-x").mkdir()
    (several / "checkpoints" / ".step-3000000.17.tmp").mkdir()
    assert steps(several) == [9, 10, 100, 2_000_000]
    assert find_checkpoint("auto", several) == checkpoint_path(several, 2_000_000)


def test_auto_falls_back_to_the_newest_whole_one_and_says_so(several: Path) -> None:
    (checkpoint_path(several, 2_000_000) / "state.json").unlink()
    weights = checkpoint_path(several, 100) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    said: list[str] = []
    assert find_checkpoint("auto", several, said.append) == checkpoint_path(several, 10)
    assert len(said) == 2 and "step-2000000 is not readable" in said[0] and "damaged in adapter_model" in said[1]


def test_auto_does_not_start_afresh_over_damaged_checkpoints(several: Path) -> None:
    for path in list_checkpoints(several):
        (path / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"No checkpoint in .* is whole, and starting afresh would replace them"):
        find_checkpoint("auto", several)


def test_a_damaged_checkpoint_given_by_path_is_refused(several: Path) -> None:
    path = checkpoint_path(several, 100)
    (path / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"damaged in optimizer\.safetensors; pass --resume with an older one"):
        find_checkpoint(str(path), several)


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, [9, 10, 100, 2_000_000]), (1, [10, 2_000_000]), (2, [10, 100, 2_000_000]), (3, [10, 100, 2_000_000])],
)
def test_the_newest_and_the_best_are_kept(several: Path, keep: int, left: list[int]) -> None:
    prune_checkpoints(several, keep)
    assert steps(several) == left
    assert best_checkpoint(several) == checkpoint_path(several, 10)
    assert len(list((several / "checkpoints").iterdir())) == len(left)


def test_without_evaluations_only_the_newest_are_kept(several: Path) -> None:
    for path in list_checkpoints(several):
        state = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps(state | {"eval_loss": None}))
    prune_checkpoints(several, 2)
    assert steps(several) == [100, 2_000_000] and best_checkpoint(several) is None


def test_a_path_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no checkpoint \(it has no state\.json\)"):
        find_checkpoint(str(tmp_path), tmp_path)


# ---- what is best -----------------------------------------------------------------------------------------


def test_evaluations_are_judged_by_score_then_loss() -> None:
    """Against max over all so far."""
    evaluations = [(3.0, 0.25), (2.0, 0.25), (1.0, 0.0), (9.0, 0.5), (9.0, 0.5), (8.0, 0.5), (0.5, 0.25)]
    progress, seen = Progress(), []
    for loss, score in evaluations:
        is_best = progress.record_evaluation(loss, score)
        assert is_best == all((score, -loss) > other for other in seen)
        seen.append((score, -loss))
        assert (progress.best_score, -(progress.best_loss or 0)) == max(seen)
        assert (progress.eval_loss, progress.score) == (loss, score)


@pytest.mark.parametrize(("score", "worse"), [(None, None), (0.5, 0.25)])
def test_patience_begins_anew_at_what_is_better_by_more_than_the_margin(
    score: float | None, worse: float | None
) -> None:
    """Small gains add up: 0.125 twice is more than the margin of 0.1875 from where counting began."""
    progress, stale = Progress(), []
    for step, gain in enumerate((0.0, 0.125, 0.25, 0.25, 0.375, 0.5)):
        progress.record_evaluation(
            2.0 - (gain if score is None else step), None if score is None else score + gain, 0.1875
        )
        stale.append(progress.stale)
    assert stale == [0, 1, 0, 1, 2, 0]
    progress.record_evaluation(5.0, worse, 0.1875)
    assert progress.stale == 1 and progress.best_loss == 1.5 if score is None else progress.best_score == 1.0


def test_another_metric_on_resuming_begins_to_judge_anew() -> None:
    progress = Progress(best_loss=1.0, reference=-1.0, stale=3)
    assert progress.record_evaluation(9.0, 0.0) and progress.stale == 0
    assert not progress.record_evaluation(9.5, 0.0) and progress.stale == 1
    assert progress.record_evaluation(7.0) and (progress.best_loss, progress.best_score, progress.stale) == (
        7.0,
        None,
        0,
    )


@pytest.mark.parametrize(
    ("states", "best"),
    [
        ([(3.0, 0.5), (9.0, 0.75), (8.0, 0.75), (1.0, 0.25)], 3),
        ([(3.0, 0.5), (3.0, 0.5)], 1),
        ([(0.1, None), (3.0, 0.5), (None, None)], 2),  # the metric changed on the way, to scores
        ([(3.0, 0.5), (2.0, None)], 2),  # and back
    ],
)
def test_the_best_checkpoint_by_score(tiny: str, tmp_path: Path, states: list[tuple[Any, Any]], best: int) -> None:
    model = adapted(tiny)
    optimizer = stepped(model)
    for step, (loss, score) in enumerate(states, start=1):
        write(checkpoint_path(tmp_path, step), model, optimizer, Progress(step, eval_loss=loss, score=score))
    assert best_checkpoint(tmp_path) == checkpoint_path(tmp_path, best)
    prune_checkpoints(tmp_path, 1)
    assert steps(tmp_path) == sorted({best, len(states)})
