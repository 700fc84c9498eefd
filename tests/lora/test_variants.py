"""The grid of variants and stages that docs/adapters.md shows (variants.py), and the same on the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.adapters.load import build_adapter
from qlora.adapters.peft_files import read_adapter, save_adapter
from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import activate, create_adapter, wrap_layers
from qlora.lora.dora import DoRA
from qlora.model.load import load_base_model
from tests.adapters.test_peft_files import dense_twin
from tests.reference import relative_error
from tools.variants import STAGES, VARIANTS, Bench, has_stage


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("variants"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", VARIANTS)
def test_stage(bench: Bench, name: str, stage: str) -> None:
    if not has_stage(name, stage):
        pytest.skip("PEFT has no such variant")
    if "PEFT" in stage:
        pytest.importorskip("peft")
    assert STAGES[stage](bench, name)


# ---- on a real model --------------------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "rank": 16},
    "DoRA": {"use_dora": True},
    "patterns": {
        "target_modules": "q_proj,v_proj,down_proj",
        "rank_pattern": {r"layers\.(0|1)\..*": 2, "v_proj": 4},
        "alpha_pattern": {"down_proj": 4.0},
        "layers": "0-9,29",
    },
}


@pytest.fixture(scope="module")
def real(smollm2: str) -> Any:
    """SmolLM2 in 4 bits; loaded once, for every test leaves it without an adapter."""
    return load_base_model(smollm2, compute_dtype="float32").eval()


@pytest.fixture(scope="module")
def real_twin(real: Any) -> Any:
    """transformers' own model with the dequantized weights."""
    return dense_twin(real)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
def test_the_real_model(real: Any, real_twin: Any, kind: str, tmp_path: Path) -> None:
    """Saved and loaded: the same logits to the last bit on the 4-bit base; PEFT's on the dense one to rounding."""
    from peft import PeftModel

    ids = torch.arange(100, 124)[None]

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    plain = logits(real)
    config = LoRAConfig(**REAL[kind])
    adapter = create_adapter(real, config)
    generator = torch.Generator().manual_seed(0)
    for weights in adapter.layers.values():
        torch.nn.init.normal_(weights.lora_B, std=0.02, generator=generator)
        if isinstance(weights.variant, DoRA):
            weights.magnitude.data *= 1 + 0.1 * torch.randn(weights.magnitude.shape, generator=generator)
    wrap_layers(real, adapter.layers)
    activate(real, adapter)
    expected = logits(real)
    save_adapter(real, tmp_path, config)
    activate(real, None)
    assert torch.equal(logits(real), plain) and relative_error(expected, plain) > 0.01
    activate(real, build_adapter(read_adapter(tmp_path), real))
    assert torch.equal(logits(real), expected)
    activate(real, None)
    theirs = PeftModel.from_pretrained(real_twin, tmp_path).eval()
    error = relative_error(logits(theirs), expected)
    theirs.unload()
    assert error < 1e-4  # thirty layers in fp32, each a few 1e-6 off
