"""A base of which every process holds a share. More modes, models and steps: `python -m tests.proof`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.adapter import load_adapter
from qlora.errors import TrainingStopped
from qlora.injection import freeze_base
from qlora.model import find_source, load_base_model, load_first_block
from qlora.packing import make_batches
from qlora.quantize import QuantConfig
from qlora.split import check_block, sample_block
from qlora.trainer import causal_lm_loss
from tests.proof import EXAMPLES_PER_STEP, Case, check_case, make_examples, reference, run_cases, save_models

EVERYTHING = {"target_modules": "all-linear"}
FSDP = {"shard": "fsdp"}


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Case], dict[str, list[dict[str, Tensor]]], Path]:
    """Cases, their results on two processes of one launch, and the folder with their adapters."""
    folder = tmp_path_factory.mktemp("proof")
    tiny, tied = save_models(folder)
    cases = [
        Case("ddp", tiny, 2, {}, EVERYTHING),
        Case("fsdp", tiny, 2, FSDP, EVERYTHING, checkpointing="on", cache=False),
        Case("fsdp tied", tied, 2, FSDP, {"use_dora": True}, packing=False, batch_size=1),
        Case("hsdp", tiny, 2, {"shard": "hsdp", "shard_size": 1}),
    ]
    for case in cases:
        if case.cache:  # as a run on one process has left it
            load_base_model(case.model)
    return cases, run_cases(cases, folder), folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp tied", "hsdp"])
def test_two_processes_train_as_one(proof: Any, name: str) -> None:
    """Losses, gradients, evaluation, base and counts; one process has no held-out row."""
    cases, results, _ = proof
    case = next(case for case in cases if case.name == name)
    check_case(case, results[name], reference(case))


@pytest.mark.parametrize(("name", "layers"), [("fsdp", 3), ("fsdp tied", 2)])
def test_each_process_holds_its_share(proof: Any, name: str, layers: int) -> None:
    cases, results, _ = proof
    case = next(case for case in cases if case.name == name)
    whole = reference(Case(name, case.model, steps=1))["bytes"].item()
    tables = 7 * layers * 4 * (16 + 256)  # whole on every process: 0.2 % of a model of 135 M
    for result in results[name]:
        assert result["bytes"].item() - tables == pytest.approx((whole - tables) / 2, rel=0.03)


def test_an_adapter_of_a_sharded_run_is_any_other(proof: Any) -> None:
    """Loaded in one process it gives the loss that two had at the end."""
    cases, results, folder = proof
    case = cases[1]
    model = load_base_model(case.model, compute_dtype="float32")
    load_adapter(model, folder / case.name, case.model)
    freeze_base(model)
    rows = make_examples(case.steps * EXAMPLES_PER_STEP, case.longest, model.config.vocab_size)[:1]
    [batch] = make_batches(rows, 1, case.longest, True, "cpu")
    with torch.no_grad():
        loss, count = causal_lm_loss(model, batch)
    assert loss.item() / count == pytest.approx(results[case.name][0]["held_out"].item(), rel=1e-5)


def test_a_split_base_that_computes_other_numbers_is_found(tmp_path: Path) -> None:
    tiny, _ = save_models(tmp_path)
    model = load_base_model(tiny, compute_dtype="float32")
    quant = QuantConfig()
    whole = load_first_block(tiny, find_source(tiny, quant), quant, torch.float32, torch.device("cpu"))
    assert check_block(model, sample_block(whole)) == 0
    whole.model.layers[0].self_attn.v_proj.weight.data[7] ^= 16  # one of 32,768 codes, by one level
    with pytest.raises(TrainingStopped, match="computes other numbers than the whole one"):
        check_block(model, sample_block(whole))
