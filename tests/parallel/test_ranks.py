"""Where processes stand, and what is refused before any of them loads a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import train
from qlora.config.lora import LoRAConfig
from qlora.config.model import ModelConfig
from qlora.config.parallel import ParallelConfig
from qlora.config.run import RunConfig
from qlora.config.watching import WatchingConfig
from qlora.data.example import IGNORE_INDEX
from qlora.model.base import BaseInfo, ranks_of
from qlora.model.fingerprint import sample_weight
from qlora.parallel.launch import arrange_ranks
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks
from qlora.training.step import in_lockstep

CPU = torch.device("cpu")


def processes(rank: int, size: int) -> Any:
    """As much of an Accelerator as is asked for."""
    return SimpleNamespace(process_index=rank, num_processes=size, device=CPU)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel is 0; give --tensor-parallel 1 or more"),
        ({"shard_size": -1}, "shard_size is -1"),
        ({"shard_size": 2}, "shard_size is 2 without hsdp"),
        ({"shard": "fsdp", "shard_size": 2}, "shard_size is 2 without hsdp"),
        ({"cpu_offload": True}, "--cpu-offload is for a base that is split"),
        ({"tensor_parallel": 2, "shard": "fsdp"}, "--tensor-parallel 2 and --shard fsdp are not combined"),
        ({"sequence_parallel": True}, "--sequence-parallel goes with tensor parallel"),
    ],
)
def test_flags_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ParallelConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"shard": "fsdp"}, 1, "--shard fsdp splits the base over several processes, but this is one"),
        ({"tensor_parallel": 2}, 1, "--tensor-parallel 2 splits the base over several processes"),
        ({"tensor_parallel": 3}, 4, "--tensor-parallel 3 does not divide 4 processes"),
        ({"shard": "hsdp", "shard_size": 3}, 4, "--shard-size 3 does not divide 4 processes"),
        ({"shard": "fsdp", "cpu_offload": True}, 2, "--cpu-offload moves shares out of a GPU's memory"),
    ],
)
def test_processes_that_do_not_divide(settings: dict[str, Any], size: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        arrange_ranks(ParallelConfig(**settings), processes(0, size))


@pytest.mark.parametrize(
    ("part", "parallel", "words"),
    [
        (LoRAConfig(modules_to_save="norm"), {"shard": "fsdp"}, "--modules-to-save needs the whole base"),
        (LoRAConfig(new_tokens="<x>"), {"shard": "fsdp"}, "--new-tokens needs the whole base"),
        (LoRAConfig(bias="all"), {"shard": "hsdp"}, "--bias all needs the whole base .* or --shard hsdp"),
        (LoRAConfig(init="loftq"), {"tensor_parallel": 2}, "--init loftq needs the whole base"),
        (LoRAConfig(use_dora=True), {"tensor_parallel": 2}, "--use-dora needs the whole base"),
        (LoRAConfig(use_adalora=True), {"tensor_parallel": 2}, "--use-adalora needs the whole base"),
        (ModelConfig(use_4bit=False), {"tensor_parallel": 4}, "--no-4bit needs the whole base"),
        (
            WatchingConfig(best_metric="exact_match", eval_every=1),
            {"shard": "fsdp"},
            "--best-metric exact_match needs",
        ),
    ],
)
def test_what_a_split_base_cannot_do(part: Any, parallel: dict[str, Any], words: str) -> None:
    section = {LoRAConfig: "lora", ModelConfig: "model", WatchingConfig: "watching"}[type(part)]
    config = RunConfig(**{section: part}, parallel=ParallelConfig(**parallel))
    config.data.eval_split = 0.1
    with pytest.raises(InputError, match=words):
        config.check_training()
    RunConfig(**{section: part}).check_split()  # whole, it can


def test_a_prompt_is_not_answered_by_a_split_base() -> None:
    with pytest.raises(InputError, match="--shard fsdp is for training"):
        train.main(["--model", "M", "--prompt", "hi", "--shard", "fsdp"])


def test_neighbours_compute_together() -> None:
    """6 processes in pairs: pairs have different micro-batches, both of a pair the same."""
    ranks = [Ranks(rank, 6, tensor_size=2) for rank in range(6)]
    assert [r.data_rank for r in ranks] == [0, 0, 1, 1, 2, 2] and [r.tensor_rank for r in ranks] == [0, 1] * 3
    assert {r.data_size for r in ranks} == {3} and all(r.is_split for r in ranks)
    alone = Ranks(3, 4)
    assert (alone.data_rank, alone.data_size, alone.is_split) == (3, 4, False)
    model, plain = nn.Module(), nn.Module()
    model.base_info = BaseInfo("base", None, torch.float32, ranks[3], {})
    assert ranks_of(model, processes(0, 1)) is ranks[3]
    assert ranks_of(plain, processes(1, 2)) == Ranks(1, 2)


def test_who_has_fewer_micro_batches_adds_empty_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "max", lambda self, value, device: 3)  # another process' number
    assert list(in_lockstep([], Ranks(0, 2), CPU)) == []  # not split: no need
    batches = in_lockstep([], Ranks(0, 2, tensor_size=2), CPU)
    assert len(batches) == 3 and all(batch.num_targets == 0 for batch in batches)
    assert all((batch.targets == IGNORE_INDEX).all() for batch in batches)


def test_a_sample_tells_weights_apart() -> None:
    weight = torch.arange(10_000, dtype=torch.float32).view(100, 100)
    other = weight.clone()
    other[0, 0] = -1
    same = sample_weight("w", weight)
    assert sample_weight("w", weight.clone()) == same
    different = [sample_weight("v", weight), sample_weight("w", other), sample_weight("w", weight.view(50, 200))]
    assert same not in different and sample_weight("w", weight.bfloat16()) != same
