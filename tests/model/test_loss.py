"""model/loss.py: the chunked cross-entropy against the full logits, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.config.lora import LoRAConfig
from qlora.data.batches import collate_packed, collate_padded
from qlora.data.example import IGNORE_INDEX, Example
from qlora.lora.adapter import inject_lora
from qlora.lora.trainable import freeze_base, lora_parameters
from qlora.model.load import load_base_model
from qlora.model.loss import causal_lm_loss, linear_cross_entropy, load_balancing_loss
from qlora.system.errors import InputError
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


def exact_loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    factor: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss sum, dhidden, dweight) of factor x loss, from the full logits in fp64."""
    leaf, head = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = leaf @ head.T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    (loss * factor).backward()
    assert leaf.grad is not None and head.grad is not None
    return loss.detach(), leaf.grad, head.grad


def exact_loss(hidden: Tensor, weight: Tensor, targets: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss sum, dhidden)."""
    return exact_loss_and_gradients(hidden, weight, targets, factor)[:2]


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


# ---- heads that train, scaled and capped logits -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 1.5), (2.5, 1.5)])
def test_scaled_and_capped_logits(scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    """z = c tanh(m W h / c), with all its gradients, in chunks; logits near 1, so that a cap of 1.5 bites."""
    hidden, weight, targets = make_case(dtype)
    head = weight.float().requires_grad_()
    loss, _ = linear_cross_entropy(hidden, head, targets, 7, scale, softcap)
    (loss * 0.25).backward()
    options = {"factor": 0.25, "scale": scale, "softcap": softcap}
    expected, dhidden, dhead = exact_loss_and_gradients(hidden, weight, targets, **options)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 2 * BF16_TOLERANCE  # capping rounds twice more
    assert relative_error(loss, expected) < tolerance
    assert hidden.grad is not None and relative_error(hidden.grad, dhidden) < tolerance
    assert head.grad is not None and relative_error(head.grad, dhead) < tolerance
    if softcap is not None:
        plain, _, _ = exact_loss_and_gradients(hidden, weight, targets, 0.25, scale)
        assert relative_error(plain, expected) > 0.01


@pytest.mark.parametrize("frozen", ["hidden", "head", "neither"])
def test_gradient_of_the_head(frozen: str) -> None:
    """Accumulated over chunks in fp32, also under bf16 activations; what is frozen gets none."""
    hidden, weight, targets = make_case(torch.bfloat16)
    head = weight.float().requires_grad_(frozen != "head")
    hidden.requires_grad_(frozen != "hidden")
    loss, _ = linear_cross_entropy(hidden, head, targets, chunk_size=7)
    loss.backward()
    _, dhidden, dhead = exact_loss_and_gradients(hidden, weight, targets)
    assert (hidden.grad is None) == (frozen == "hidden") and (head.grad is None) == (frozen == "head")
    if hidden.grad is not None:
        assert relative_error(hidden.grad, dhidden) < BF16_TOLERANCE
    if head.grad is not None:
        assert head.grad.dtype == torch.float32
        assert relative_error(head.grad, dhead) < BF16_TOLERANCE


def test_gradient_of_a_bf16_head_loses_nothing_between_chunks() -> None:
    """One rounding at the end, however many chunks: single-row chunks in bf16 would add up to 50 of them."""
    hidden, weight, targets = make_case()
    head = weight.to(torch.bfloat16).requires_grad_()
    head.grad_dtype = torch.float32
    linear_cross_entropy(hidden, head, targets, chunk_size=1)[0].backward()
    _, _, dhead = exact_loss_and_gradients(hidden, weight.to(torch.bfloat16), targets)
    assert head.grad is not None and head.grad.dtype == torch.float32
    assert relative_error(head.grad, dhead) < FP32_TOLERANCE


def test_gradient_of_a_tied_embedding() -> None:
    """Head and embedding in one parameter: both uses add up, as autograd through full logits has it."""
    _, weight, targets = make_case()
    ids = torch.randint(0, VOCAB, (POSITIONS,), generator=torch.Generator().manual_seed(3))
    gradients = []
    for chunked in (True, False):
        shared = weight.clone().requires_grad_()
        hidden = torch.tanh(3 * shared[ids])
        if chunked:
            loss, _ = linear_cross_entropy(hidden, shared, targets, chunk_size=7)
        else:
            loss = reference.cross_entropy(hidden, shared, targets)
        gradients += torch.autograd.grad(loss, shared)
    assert relative_error(*gradients) < FP32_TOLERANCE


def test_masked_batch_gives_the_head_zero_gradient() -> None:
    hidden, weight, _ = make_case()
    head = weight.requires_grad_()
    linear_cross_entropy(hidden, head, torch.full((POSITIONS,), IGNORE_INDEX))[0].backward()
    assert head.grad is not None and not head.grad.any()


# ---- mixtures of experts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_load_balancing_equals_transformers(top_k: int) -> None:
    """Value and gradient, with padding left out; 4 where all 4 chosen experts of 4 are used alike."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(12, 4, generator=generator).requires_grad_() for _ in range(3)]
    real = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    for mask in (real, torch.ones_like(real)):
        ours = load_balancing_loss(layers, top_k, mask.flatten().nonzero()[:, 0])
        theirs = load_balancing_loss_func(tuple(layers), 4, top_k, mask)
        assert relative_error(ours.detach(), theirs.detach()) < FP32_TOLERANCE
        if top_k < 4:  # else every expert is chosen by every token, and no router can do better or worse
            for mine, other in zip(
                torch.autograd.grad(ours, layers), torch.autograd.grad(theirs, layers), strict=True
            ):
                assert relative_error(mine, other) < FP32_TOLERANCE
                assert not mine[~mask.flatten()].any()
        else:
            assert ours.item() == pytest.approx(4.0)


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


@pytest.mark.parametrize(
    ("field", "value"), [("final_logit_softcapping", 3.0), ("logit_scale", 0.3), ("logits_scaling", 3.0)]
)
def test_changed_logits_reach_the_loss(
    model: Any, field: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a config says about the logits; against whole models in tests/parity/test_families.py."""
    batch = collate_padded(make_examples())
    with torch.no_grad():
        plain, _ = causal_lm_loss(model, batch)
        hidden = model.base_model(batch.input_ids).last_hidden_state.flatten(0, 1)
        monkeypatch.setattr(model.config, field, value, raising=False)
        loss, _ = causal_lm_loss(model, batch)
    scale = {"logit_scale": value, "logits_scaling": 1 / value}.get(field, 1.0)
    softcap = value if field == "final_logit_softcapping" else None
    expected, _, _ = exact_loss_and_gradients(
        hidden, model.lm_head.weight, batch.targets.flatten(), scale=scale, softcap=softcap
    )
    assert relative_error(loss, expected) < 1e-5
    assert relative_error(plain, expected) > 0.01


def test_head_with_a_bias_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi 2 has one; leaving it out would be another model."""
    monkeypatch.setattr(model.lm_head, "bias", torch.nn.Parameter(torch.ones(300), requires_grad=False))
    with pytest.raises(InputError, match="llama model's output head has a bias"):
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
