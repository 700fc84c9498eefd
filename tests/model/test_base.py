"""`BaseInfo`: a loader that forgets it fails; a plain model is a case of its own."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from qlora.model.base import BaseInfo, base_info, find_base_info, ranks_of
from qlora.model.load import load_base_model
from qlora.quant.layers import Linear16bit
from qlora.quant.weight import QuantConfig
from qlora.system.errors import InputError
from qlora.system.ranks import Ranks
from tests.models import save_tiny_llama


def test_a_loaded_base_describes_itself(tmp_path: Path) -> None:
    path = str(save_tiny_llama(tmp_path / "llama"))
    model = load_base_model(path, compute_dtype="bfloat16", cache=False)
    assert base_info(model) == BaseInfo(path, QuantConfig(), torch.bfloat16)
    assert base_info(copy.deepcopy(model)) == base_info(model)
    del model.base_info
    with pytest.raises(RuntimeError, match="no base_info"):  # not taken for a plain model
        find_base_info(model)


def test_a_plain_model_has_none() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    assert find_base_info(plain) is None and ranks_of(plain, None) == Ranks()
    with pytest.raises(InputError, match="load_base_model"):
        base_info(plain)
    with pytest.raises(RuntimeError, match="no base_info"):
        find_base_info(nn.Sequential(Linear16bit(torch.zeros(4, 4), None)))


@pytest.mark.parametrize(("ranks", "samples"), [(Ranks(0, 2, 2), None), (None, {"a": b""})])
def test_a_split_base_has_ranks_and_samples(ranks: Ranks | None, samples: dict[str, bytes] | None) -> None:
    with pytest.raises(AssertionError):
        BaseInfo("base", None, torch.float32, ranks, samples)
