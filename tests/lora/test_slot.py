"""The adapter slot of a model, and the variants that an adapter's config names."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from qlora.config.lora import VARIANTS as NAMES
from qlora.config.lora import WHOLE_LAYERS, LoRAConfig
from qlora.lora.adapter import activate, active_adapter, inject_lora, lora_layers, wrapped_layers
from qlora.lora.layer import LoRALinear
from qlora.lora.slot import slot_of
from qlora.lora.variants import VARIANTS, variant_of
from qlora.model.load import load_base_model
from tests.models import save_tiny_llama


def test_a_copy_of_a_model_has_its_own_slot(tmp_path: Path) -> None:
    model = load_base_model(str(save_tiny_llama(tmp_path / "llama")), compute_dtype="float32", cache=False)
    inject_lora(model, LoRAConfig(rank=2, use_dora=True))
    twin = copy.deepcopy(model)
    assert slot_of(twin) is not slot_of(model)
    assert all(layer is twin.get_submodule(name) for name, layer in wrapped_layers(twin).items())
    adapter = active_adapter(twin)
    assert adapter is not None
    assert all(weights is lora_layers(twin)[name].weights for name, weights in adapter.layers.items())
    activate(twin, None)
    assert not lora_layers(twin) and len(lora_layers(model)) == 4


def test_layers_wrapped_by_hand_are_found() -> None:
    model = nn.Sequential(LoRALinear(nn.Linear(4, 4), rank=2), nn.Linear(4, 4))
    assert list(lora_layers(model)) == ["0"] and active_adapter(model) is None and slot_of(model).wrapped is None


def test_every_flag_of_a_variant_is_known() -> None:
    """Those of LoRAConfig, of `variants.py` and what tensor parallel refuses; rsLoRA is only another scaling."""
    assert {variant.flag for variant in VARIANTS} == NAMES.keys() - {"use_rslora"} == set(WHOLE_LAYERS)
    for variant in VARIANTS:
        config = LoRAConfig(**{variant.flag: True})
        assert variant_of(config) is variant and config.variant_name == variant.name == NAMES[variant.flag]
    assert variant_of(LoRAConfig(use_rslora=True)) is None and LoRAConfig().variant_name == "LoRA"
    assert not any(variant.shapes(6, 2).keys() ^ variant.extras.keys() for variant in VARIANTS)


def test_a_variant_adds_what_it_names(tmp_path: Path) -> None:
    path = str(save_tiny_llama(tmp_path / "llama"))
    for variant in VARIANTS:
        model = load_base_model(path, compute_dtype="float32", cache=False)
        inject_lora(model, LoRAConfig(rank=2, **{variant.flag: True}))
        for layer in lora_layers(model).values():
            found = {name: tuple(value.shape) for name, value in layer.weights.extras.items()}
            assert found == variant.shapes(layer.out_features, 2)
            assert all(value.dtype == torch.float32 for value in layer.weights.extras.values())
