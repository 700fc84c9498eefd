"""loss.py: the chunked cross-entropy against the full logits, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.config import LoRAConfig
from qlora.errors import InputError
from qlora.lora import freeze_base, inject_lora, lora_parameters
from qlora.loss import causal_lm_loss, linear_cross_entropy
from qlora.model import load_base_model
from qlora.packing import collate_packed, collate_padded
from qlora.tokenize import IGNORE_INDEX, Example
from tests import reference
from tests.models import save_tiny_llama
from tests.reference import relative_error

POSITIONS, HIDDEN, VOCAB = 50, 32, 97
FP32_TOLERANCE = 2e-6  # sums of ~100 exponentials and products, each rounded to 2^-24
BF16_TOLERANCE = 2 * 2**-8  # logits near 1 and probabilities are rounded to 8 bits, and so is the result


def make_case(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (50, 32), head (97, 32) and targets (50,), about a third of them masked; logits near `scale`."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(dtype)
    weight = (scale * HIDDEN**-0.5 * torch.randn(VOCAB, HIDDEN, generator=generator)).to(dtype)
    targets = torch.randint(0, VOCAB, (POSITIONS,), generator=generator)
    targets[torch.rand(POSITIONS, generator=generator) < 0.3] = IGNORE_INDEX
    targets[-1] = IGNORE_INDEX
    targets[:2] = torch.tensor([0, VOCAB - 1])  # token 0 is a target like any other
    return hidden.requires_grad_(), weight, targets


def exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss sum, dhidden) of factor x loss, from the full logits in fp64."""
    leaf = hidden.detach().double().requires_grad_()
    logits = leaf @ weight.double().T
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    (loss * factor).backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


# ---- the function -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 7, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_equals_full_logits(dtype: torch.dtype, chunk_size: int) -> None:
    hidden, weight, targets = make_case(dtype)
    loss, count = linear_cross_entropy(hidden, weight, targets, chunk_size)
    (loss * 0.25).backward()
    expected, gradient = exact_loss(hidden, weight, targets, factor=0.25)
    supervised = targets != IGNORE_INDEX
    assert 0 < supervised.sum() < POSITIONS and count == int(supervised.sum())
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert hidden.grad is not None and hidden.grad.dtype == dtype
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE
    assert relative_error(loss, expected) < tolerance
    assert relative_error(hidden.grad, gradient) < tolerance
    assert not hidden.grad[~supervised].any(), "masked positions get exactly nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_on_full_logits_of_the_same_dtype(dtype: torch.dtype) -> None:
    """Against what a plain training loop would compute, rounded where it rounds."""
    hidden, weight, targets = make_case(dtype)
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=7)
    loss.backward()
    leaf = hidden.detach().requires_grad_()
    expected = reference.cross_entropy(leaf, weight, targets)
    expected.backward()
    assert hidden.grad is not None and leaf.grad is not None
    assert relative_error(loss, expected) < FP32_TOLERANCE
    assert relative_error(hidden.grad, leaf.grad) < (FP32_TOLERANCE if dtype == torch.float32 else BF16_TOLERANCE)


def test_bf16_head_under_fp32_activations() -> None:
    """The head is stored in bf16 and used in hidden's dtype: its values are exact in fp32."""
    hidden, weight, targets = make_case()
    weight = weight.to(torch.bfloat16)
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=7)
    loss.backward()
    expected, gradient = exact_loss(hidden, weight, targets)
    assert weight.dtype == torch.bfloat16
    assert relative_error(loss, expected) < FP32_TOLERANCE
    assert relative_error(hidden.grad, gradient) < FP32_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_masked_is_zero_and_connected(dtype: torch.dtype) -> None:
    hidden, weight, _ = make_case(dtype)
    loss, count = linear_cross_entropy(hidden, weight, torch.full((POSITIONS,), IGNORE_INDEX))
    assert loss.item() == 0 and count == 0 and loss.requires_grad
    loss.backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_large_logits_stay_finite() -> None:
    """exp(10,000) overflows; the loss is then a difference of logits, not of exponentials."""
    hidden, weight, targets = make_case(scale=5000.0)
    loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=7)
    loss.backward()
    expected, gradient = exact_loss(hidden, weight, targets)
    assert (hidden.detach() @ weight.T).abs().max() > 1e4
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
    assert relative_error(loss, expected) < FP32_TOLERANCE
    assert relative_error(hidden.grad, gradient) < 1e-4  # two near-equal logits of 1e4 differ by 1e-3 in fp32


def test_logits_of_one_chunk_exist_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the forward or backward pass is larger than (chunk, V) or what was given."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    hidden = torch.randn(400, 8, requires_grad=True)
    weight, targets = torch.randn(1000, 8), torch.arange(400)
    with Watch():
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=10)
        loss.backward()
    assert hidden.grad is not None and len(sizes) > 100
    assert max(sizes) <= 10 * 1000


def test_no_gradient_is_prepared_without_need() -> None:
    hidden, weight, targets = make_case()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(hidden, weight, targets, chunk_size=7)
    assert not loss.requires_grad
    assert relative_error(loss, exact_loss(hidden, weight, targets)[0]) < FP32_TOLERANCE


def test_misuse_is_refused() -> None:
    hidden, weight, targets = make_case()
    with pytest.raises(ValueError, match="50 positions but targets 49"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="freeze"):
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)


# ---- through a model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A 4-bit tiny LLaMA with adapters away from their start."""
    path = save_tiny_llama(tmp_path_factory.mktemp("loss") / "llama")
    network = load_base_model(str(path), compute_dtype="float32", cache=False)
    inject_lora(network, LoRAConfig(adapter_dtype="float32"))
    freeze_base(network)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(network):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.train()


def make_examples(masked: bool = False) -> list[Example]:
    ids = torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(2))
    targets = torch.full((3, 10), IGNORE_INDEX) if masked else ids[:, 1:].clone()
    targets[:, :4] = IGNORE_INDEX
    return [Example(row[:-1], target) for row, target in zip(ids, targets, strict=True)]


def test_model_loss_equals_transformers_logits(model: Any) -> None:
    """The sum over transformers' own logits, and the same adapter gradients."""
    batch = collate_padded(make_examples())
    loss, count = causal_lm_loss(model, batch, chunk_size=7)
    ours = torch.autograd.grad(loss, lora_parameters(model))
    logits = model(input_ids=batch.input_ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=IGNORE_INDEX
    )
    theirs = torch.autograd.grad(expected, lora_parameters(model))
    assert count == 18
    assert relative_error(loss.detach(), expected.detach()) < 1e-5
    assert len(ours) == 8
    for mine, other in zip(ours, theirs, strict=True):
        assert relative_error(mine, other) < 1e-5


@pytest.mark.parametrize("collate", [collate_packed, collate_padded])
def test_masked_batch_gives_adapters_zero_gradients(model: Any, collate: Any) -> None:
    """Not None: the all-reduce of several devices waits for every parameter."""
    model.zero_grad()
    loss, count = causal_lm_loss(model, collate(make_examples(masked=True)))
    loss.backward()
    assert loss.item() == 0 and count == 0
    gradients = [parameter.grad for parameter in lora_parameters(model)]
    assert len(gradients) == 8
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_packed_rows_need_packed_attention(model: Any) -> None:
    own = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        with pytest.raises(ValueError, match="block-diagonal attention, but the model uses 'sdpa'"):
            causal_lm_loss(model, collate_packed(make_examples()))
        causal_lm_loss(model, collate_padded(make_examples()))
    finally:
        model.set_attn_implementation(own)
    causal_lm_loss(model, collate_packed(make_examples()))


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_changed_logits_are_refused(model: Any, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.config, field, 30.0, raising=False)
    with pytest.raises(InputError, match=field):
        causal_lm_loss(model, collate_padded(make_examples()))


# ---- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_full_logits(dtype: torch.dtype) -> None:
    hidden, weight, targets = make_case(dtype)
    leaf = hidden.detach().cuda().requires_grad_()
    loss, _ = linear_cross_entropy(leaf, weight.cuda(), targets.cuda(), chunk_size=7)
    loss.backward()
    expected, gradient = exact_loss(hidden, weight, targets)
    assert leaf.grad is not None
    tolerance = 1e-5 if dtype == torch.float32 else BF16_TOLERANCE
    assert relative_error(loss.cpu(), expected) < tolerance
    assert relative_error(leaf.grad.cpu(), gradient) < tolerance
