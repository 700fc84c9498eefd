"""A base of which every process holds a share. More modes, models and steps: `python -m tools.proof`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from qlora.model.cache import find_source
from qlora.model.load import load_base_model, load_first_block
from qlora.parallel.check import check_block, sample_block
from qlora.quant.weight import QuantConfig
from qlora.system.errors import TrainingStopped
from tools.proof import ROOT, Proof, run_processes, save_model


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp tied", "hsdp"])
def test_two_processes_train_as_one(proof: Proof, name: str) -> None:
    """Losses, gradients, evaluation, base and counts; one process has no held-out row."""
    proof.check(name)


@pytest.mark.parametrize(("name", "layers"), [("fsdp", 3), ("fsdp tied", 2)])
def test_each_process_holds_its_share(proof: Proof, name: str, layers: int) -> None:
    whole = proof.expected(name)["bytes"].item()
    tables = 7 * layers * 4 * (16 + 256)  # whole on every process: 0.2 % of a model of 135 M
    for result in proof.found(name):
        assert result["bytes"].item() - tables == pytest.approx((whole - tables) / 2, rel=0.03)


def test_an_adapter_of_any_mode_is_one_of_all(proof: Proof) -> None:
    """Sharded, tensor parallel and on one process: each loads what all saved and finds the losses they had."""
    found = proof.check_exchange()
    assert set(found) == {"fsdp", "fsdp, alone", "TP", "TP, alone"}
    assert all(count == 4 for count, _ in found.values())


def test_a_process_that_fails_ends_the_others() -> None:
    """Of forked ones; what it said is the error's."""

    def fail_or_wait() -> None:
        if os.environ["RANK"] == "1":
            raise ValueError("no such luck")
        time.sleep(3600)

    with pytest.raises(ProcessRaisedException, match="ValueError: no such luck"):
        run_processes(2, fail_or_wait)


def test_a_split_base_that_computes_other_numbers_is_found(tmp_path: Path) -> None:
    tiny = save_model(tmp_path / "tiny")
    model = load_base_model(tiny, compute_dtype="float32")
    quant = QuantConfig()
    whole = load_first_block(tiny, find_source(tiny, quant), quant, torch.float32, torch.device("cpu"))
    assert check_block(model, sample_block(whole)) == 0
    whole.model.layers[0].self_attn.v_proj.weight.data[7] ^= 16  # one of 32,768 codes, by one level
    with pytest.raises(TrainingStopped, match="computes other numbers than the whole one"):
        check_block(model, sample_block(whole))


@pytest.mark.full
def test_the_whole_table() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.proof"], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0 and "the largest" in done.stdout, done.stderr[-6000:]
