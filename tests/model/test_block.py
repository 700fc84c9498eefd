"""The fused block against transformers' own; whole models of each family are in test_families.py."""

from typing import Any

import pytest
import torch

from qlora.model.attention import ATTENTION_NAME, packed_arguments, register_attention
from qlora.model.block import fuse_blocks, is_fused
from tests.models import tiny_llama_config
from tests.reference import relative_error

LENGTHS = (5, 60, 1, 100)


def make_model(kind: str = "Llama", **settings: Any) -> Any:
    import transformers

    register_attention()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**tiny_llama_config().to_dict(), **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")._from_config(config, attn_implementation=ATTENTION_NAME)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.15)
    return model.train()


def outputs(model: Any, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradient of every parameter, norms included."""
    count = sum(LENGTHS)
    ids = torch.randint(0, 300, (1, count), generator=torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    extra = packed_arguments(bounds, max(LENGTHS)) if packed else {}
    model.zero_grad()
    hidden = model.model(input_ids=ids, position_ids=position, use_cache=False, **extra).last_hidden_state
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return hidden.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_same_as_transformers_block(kind: str, packed: bool) -> None:
    """fp32: two layers of sums in another order, some of them of exponentials."""
    settings = {"Mistral": {"sliding_window": 30}, "Qwen3": {"head_dim": 32}}.get(kind, {})
    plain, fused = make_model(kind, **settings), make_model(kind, **settings)
    fuse_blocks(fused)
    kinds = [type(layer) for layer in fused.model.layers]
    fuse_blocks(fused)  # once more: nothing is left to do
    assert [type(layer) for layer in fused.model.layers] == kinds and all(map(is_fused, fused.model.layers))
    assert not any(map(is_fused, plain.model.layers))
    (hidden, gradients), (expected, others) = outputs(fused, packed), outputs(plain, packed)
    assert relative_error(hidden, expected) < 1e-5
    assert gradients.keys() == others.keys() and any("layernorm" in name for name in gradients)
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 5e-5, name


def test_without_the_library_the_plain_versions_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    fuse_blocks(model)
    expected, others = outputs(model, packed=True)
    monkeypatch.setattr("qlora.kernels.fused.library", lambda dtype: None)
    hidden, gradients = outputs(model, packed=True)
    assert relative_error(hidden, expected) < 1e-5
    for name, gradient in gradients.items():
        assert relative_error(gradient, others[name]) < 5e-5, name


def test_other_blocks_stay_as_they_are() -> None:
    for model in (
        make_model("Gemma"),
        make_model(hidden_act="gelu"),
        make_model(attention_dropout=0.1),
    ):
        kinds = [type(layer) for layer in model.model.layers]
        fuse_blocks(model)
        assert [type(layer) for layer in model.model.layers] == kinds


def test_heads_of_odd_width_take_the_plain_attention() -> None:
    """The kernel's vectors are 16 wide; 24 is not a whole number of them."""
    plain, fused = make_model("Qwen3", head_dim=24), make_model("Qwen3", head_dim=24)
    fuse_blocks(fused)
    assert relative_error(outputs(fused, True)[0], outputs(plain, True)[0]) < 1e-5
