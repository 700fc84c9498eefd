"""Settings are checked whenever they are set; lists and maps keep their text on disk."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from qlora.config.data import DataConfig
from qlora.config.loop import LoopConfig
from qlora.config.lora import LoRAConfig, canonical
from qlora.config.run import RunConfig
from qlora.config.saving import SavingConfig
from qlora.system.errors import InputError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 0, "rank is 0; give --rank a whole number of 1 or more."),
        ("rank", "8", "rank is '8'; give --rank a whole number of 1 or more."),
        ("rank", True, "rank is True; give --rank a whole number of 1 or more."),
        ("alpha", float("nan"), "alpha is nan; give --alpha a number above 0."),
        ("init", "zeros", "init is 'zeros'; choose one of kaiming, gaussian, pissa, loftq."),
        ("use_dora", 1, "use_dora is 1; give --use-dora True or False."),
        ("target_modules", 5, "target_modules is 5; give --target-modules names separated by commas."),
        (
            "adalora_target_rank", 9,
            "adalora_target_rank is 9; give --adalora-target-rank a number from 0 to --rank, 8.",
        ),
    ],
)  # fmt: skip
def test_a_value_is_checked_whenever_it_is_set(name: str, value: Any, message: str) -> None:
    config = LoRAConfig()
    with pytest.raises(InputError) as later:
        setattr(config, name, value)
    with pytest.raises(InputError) as first:
        LoRAConfig(**{name: value})
    assert str(later.value) == str(first.value) == message
    assert config == LoRAConfig()  # as it was before


def test_settings_that_do_not_go_together_are_refused_later_too() -> None:
    config = SavingConfig(resume="auto", force_resume=True)
    with pytest.raises(InputError, match="force_resume is given without resume"):
        config.resume = None
    assert config.resume == "auto"


def test_numpy_s_numbers_and_paths_are_taken(tmp_path: Any) -> None:
    config: Any = LoRAConfig(rank=np.int64(4), alpha=np.float32(2))  # type: ignore[arg-type]
    assert (type(config.rank), type(config.alpha)) == (int, float) and LoRAConfig(alpha=3).alpha == 3.0
    assert SavingConfig(output_dir=tmp_path).output_dir == str(tmp_path)
    assert DataConfig(data=tmp_path).data == [str(tmp_path)]


def test_copies_are_whole() -> None:
    config = LoRAConfig(rank_pattern={"q_proj": 4})
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config


def test_on_disk_lists_and_maps_are_text() -> None:
    texts = {
        "layers": "0,2,4-7", "rank_pattern": "q_proj=4,v_proj=2", "alpha_pattern": "q_proj=2.5,v_proj=8",
        "modules_to_save": "norm", "new_tokens": "<a>,<b>",
    }  # fmt: skip
    config: Any = LoRAConfig(**texts)  # type: ignore[arg-type]
    assert config.variant() == {"rank": 8, "alpha": 16.0, "dropout": 0.0, **texts}
    saved = RunConfig(lora=config, data=DataConfig(data_weights=[1, 0.3]), loop=LoopConfig(seed=3)).saved()
    assert saved["lora"]["target_modules"] == "q_proj,v_proj" and saved["data"]["data_weights"] == "1,0.3"
    assert saved["train"]["seed"] == 3 and saved["train"]["learning_rate"] == 2e-4
    assert list(saved) == ["model", "lora", "data", "train", "parallel", "generate", "calibration", "debug"]


def test_how_a_checkpoint_spelled_its_lists_does_not_matter() -> None:
    saved = {"layers": "0,1,2", "rank_pattern": " q=4 , v=2", "alpha_pattern": "q=16.0", "seed": 1}
    expected = {"layers": "0-2", "rank_pattern": "q=4,v=2", "alpha_pattern": "q=16", "seed": 1}
    assert canonical(saved) == expected
