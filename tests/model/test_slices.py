"""The MLP of a recomputed block in slices, against the whole one."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from qlora.config.lora import LoRAConfig
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import freeze_base
from qlora.model import slices
from qlora.model.block import decoder_layers, fuse_blocks
from tests.model.test_block import make_model, outputs
from tests.reference import relative_error


def recomputed(model: Any) -> Any:
    fuse_blocks(model)
    for layer in decoder_layers(model):
        layer._gradient_checkpointing_func = lambda function, *inputs: checkpoint(
            function, *inputs, use_reentrant=False
        )
        layer.gradient_checkpointing = True
    return model


def adapted(**settings: Any) -> Any:
    model = make_model()
    inject_lora(model, LoRAConfig(**settings))
    freeze_base(model)
    for name, parameter in model.named_parameters():
        if "lora" in name:  # in bf16 its gradients would be rounded to 3 digits
            parameter.data = parameter.data.float()
        if name.endswith(("lora_B", "lora_E")):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(3))
    return recomputed(model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["down_proj"], "use_adalora": True, "rank": 4},
        {"target_modules": ["gate_proj"]},
    ],
)
def test_values_and_gradients_are_those_of_the_whole(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """166 tokens in slices of 50: the last one is shorter. fp32, sums over tokens in another order."""
    model = adapted(**settings)
    expected, others = outputs(model, packed=True)
    monkeypatch.setattr(slices, "SLICE_TOKENS", 50)
    calls: list[int] = []
    plain = slices.SlicedMLP.backward
    monkeypatch.setattr(slices.SlicedMLP, "backward", lambda ctx, dy: (calls.append(len(dy)), plain(ctx, dy))[1])
    hidden, gradients = outputs(model, packed=True)
    assert calls == [166, 166]  # both layers
    assert relative_error(hidden, expected) < 1e-6
    assert gradients.keys() == others.keys() and gradients
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 1e-5, name


def test_every_weight_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an adapter: weights of the MLP and of the norms."""
    model = recomputed(make_model())
    _, others = outputs(model, packed=True)
    monkeypatch.setattr(slices, "SLICE_TOKENS", 64)
    _, gradients = outputs(model, packed=True)
    assert gradients.keys() == others.keys() and any("mlp" in name for name in gradients)
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 1e-5, name


def test_dropout_masks_are_the_same_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the sliced model is that of a finite difference with the same masks."""
    monkeypatch.setattr(slices, "SLICE_TOKENS", 50)
    model = adapted(target_modules=["down_proj", "gate_proj"], dropout=0.5)
    B = next(p for name, p in model.named_parameters() if name.endswith("down_proj.lora.lora_B"))
    direction = torch.randn(B.shape, generator=torch.Generator().manual_seed(5))

    def value() -> torch.Tensor:
        torch.manual_seed(7)
        hidden, gradients = outputs(model, packed=True)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
        value.gradients = gradients  # type: ignore[attr-defined]
        return (hidden.double() * weights.double()).sum()

    value()
    name = next(n for n, p in model.named_parameters() if p is B)
    expected = (value.gradients[name].double() * direction.double()).sum()  # type: ignore[attr-defined]
    start, step = B.detach().clone(), 1e-2
    sides = []
    for sign in (1, -1):
        B.data = start + sign * step * direction
        sides.append(value())
    assert abs((sides[0] - sides[1]) / (2 * step) - expected) < 0.02 * abs(expected)


def test_each_slice_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once in each pass: the recomputation of the layer ends before its MLP."""
    from qlora.model import block

    monkeypatch.setattr(slices, "SLICE_TOKENS", 50)
    model, calls, plain = adapted(), [], block.mlp_forward

    def counted(mlp: Any, z: torch.Tensor) -> torch.Tensor:
        calls.append(len(z))
        return plain(mlp, z)

    monkeypatch.setattr(block, "mlp_forward", counted)
    outputs(model, packed=True)
    assert calls == [50, 50, 50, 16] * 4  # two layers, two passes


def test_a_kept_layer_and_an_evaluation_are_not_sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE_TOKENS", 50)
    monkeypatch.setattr(slices.SlicedMLP, "apply", lambda *arguments: pytest.fail("sliced"))
    model = adapted()
    with torch.no_grad():
        model(torch.zeros(1, 120, dtype=torch.long))
    for layer in decoder_layers(model):
        layer.gradient_checkpointing = False
    outputs(model, packed=True)
