"""Losses of preferences against formulas on full logits: values, gradients and what a run shows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qlora.data.batches import collate_packed, collate_padded
from qlora.data.example import IGNORE_INDEX, Example
from qlora.data.preferences import join_pair
from qlora.model.load import load_base_model
from qlora.model.loss import CHUNK_SIZE, OutputHead, sequence_log_likelihoods, token_cross_entropy
from qlora.model.preference_loss import Answers, PreferenceLoss, averages
from tests.models import save_tiny_llama

LOSSES = {
    "dpo": PreferenceLoss("dpo", 0.3, label_smoothing=0.1),
    "ipo": PreferenceLoss("ipo", 0.2),
    "orpo": PreferenceLoss("orpo", 0.7),
    "simpo": PreferenceLoss("simpo", 2.0, simpo_gamma=0.5),
    "kto": PreferenceLoss("kto", 0.4, desirable_weight=1.3, undesirable_weight=0.6),
}
KL = 0.4


def make_pairs(count: int = 5) -> list[Example]:
    """Random pairs that share their masked prompt."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(count):
        prompt = torch.randint(5, 300, (4 + number,), generator=generator)
        parts = []
        for _ in range(2):
            length = int(torch.randint(2, 9, (), generator=generator))
            ids = torch.cat([prompt, torch.randint(5, 300, (length,), generator=generator)])
            targets = ids[1:].clone()
            targets[: len(prompt) - 1] = IGNORE_INDEX
            parts.append(Example(ids[:-1], targets))
        pairs.append(join_pair(parts[0], parts[1], is_wanted=number % 2 == 0))
    return pairs


def answers(pairs: list[Example], log_p: torch.Tensor, reference: torch.Tensor) -> Answers:
    counts = torch.tensor([[float(part.num_targets) for part in pair.sequences] for pair in pairs])
    return Answers(log_p, counts, reference, torch.tensor([pair.is_wanted for pair in pairs]))


def slow_loss(method: str, model: Any, pairs: list[Example], reference: torch.Tensor) -> torch.Tensor:
    """The mean loss of the rows from full logits, a sequence at a time, by the papers' formulas."""
    maths, total = LOSSES[method], torch.zeros((), dtype=torch.float64)
    tokens = sum(pair.sequences[0].num_targets for pair in pairs)
    for pair, known in zip(pairs, reference.double(), strict=True):
        log_p, counts = [], []
        for part in pair.sequences:
            logits = model(part.input_ids[None]).logits[0].double()
            kept = part.targets != IGNORE_INDEX
            log_p.append(logits.log_softmax(-1)[kept].gather(1, part.targets[kept, None]).sum())
            counts.append(int(kept.sum()))
        (c, r), (n, m), b = log_p, counts, maths.beta
        if method == "dpo":
            p = 1 / (1 + torch.exp(-b * ((c - known[0]) - (r - known[1]))))
            total = total - (1 - maths.label_smoothing) * p.log() - maths.label_smoothing * (1 - p).log()
        elif method == "ipo":
            total = total + ((c - known[0]) / n - (r - known[1]) / m - 1 / (2 * b)) ** 2
        elif method == "orpo":
            p, q = (c / n).exp(), (r / m).exp()
            ratio = p / (1 - p) / (q / (1 - q))
            total = total - b * torch.log(ratio / (1 + ratio)) - len(pairs) / tokens * c
        elif method == "simpo":
            total = total + torch.log(1 + torch.exp(maths.simpo_gamma - b * (c / n - r / m)))
        else:
            sign, weight = (1, maths.desirable_weight) if pair.is_wanted else (-1, maths.undesirable_weight)
            total = total + weight * (1 - 1 / (1 + torch.exp(-b * sign * (c - known[0] - KL))))
    return total / len(pairs)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = str(save_tiny_llama(tmp_path_factory.mktemp("tiny")))
    return load_base_model(path, use_4bit=False, compute_dtype="float32", cache=False).float()


def gradients(model: Any) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("method", LOSSES)
def test_gradient_equals_that_of_full_logits(model: Any, method: str, packing: bool) -> None:
    """Through every layer, and the head, which trains too: within 1e-5 in fp32."""
    model.requires_grad_(False)
    trained = [model.lm_head.weight, *model.model.layers[0].mlp.parameters(), model.model.embed_tokens.weight]
    for parameter in trained:
        parameter.requires_grad_(parameter.is_floating_point())
    pairs = make_pairs()
    reference = torch.randn(len(pairs), 2, generator=torch.Generator().manual_seed(1)) * 3 - 40
    expected = slow_loss(method, model, pairs, reference)
    expected.backward()
    wanted = gradients(model)
    assert len(wanted) >= 2 and all(gradient.abs().max() > 1e-4 for gradient in wanted)

    batch = collate_packed(pairs) if packing else collate_padded(pairs)
    log_p, balance = sequence_log_likelihoods(model, batch, chunk_size=7)
    tokens = sum(pair.sequences[0].num_targets for pair in pairs)
    losses = LOSSES[method].losses(answers(pairs, log_p.view(-1, 2), reference), len(pairs) / tokens, KL)
    assert balance == 0.0 and losses.shape == (len(pairs),)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    for found, other in zip(gradients(model), wanted, strict=True):
        assert (found - other).abs().max() < 1e-5 * max(1, other.abs().max())


@pytest.mark.parametrize("method", LOSSES)
def test_gradient_of_an_answer_is_the_formula_of_the_docstring(method: str) -> None:
    maths, s = LOSSES[method], torch.sigmoid
    log_p = torch.tensor([[-3.0, -9.0], [-6.0, -2.0]], requires_grad=True)
    counts, known = torch.tensor([[4.0, 7.0], [9.0, 2.0]]), torch.tensor([[-4.0, -5.0], [-5.0, -5.0]])
    rows = Answers(log_p, counts, known, torch.tensor([True, False]))
    maths.losses(rows, 2 / 13, KL).sum().backward()
    (n, m), b = counts.T, maths.beta
    ratio, mean = log_p.detach() - known, log_p.detach() / counts
    if method == "dpo":
        chosen = -b * (1 - maths.label_smoothing - s(b * (ratio[:, 0] - ratio[:, 1])))
        rejected = -chosen
    elif method == "ipo":
        d = ratio[:, 0] / n - ratio[:, 1] / m
        chosen, rejected = 2 * (d - 1 / (2 * b)) / n, -2 * (d - 1 / (2 * b)) / m
    elif method == "orpo":
        odds = mean - torch.log(1 - mean.exp())
        u = odds[:, 0] - odds[:, 1]
        chosen = -b * s(-u) / (n * (1 - mean[:, 0].exp())) - 2 / 13
        rejected = b * s(-u) / (m * (1 - mean[:, 1].exp()))
    elif method == "simpo":
        u = b * (mean[:, 0] - mean[:, 1]) - maths.simpo_gamma
        chosen, rejected = -b * s(-u) / n, b * s(-u) / m
    else:
        sign = torch.tensor([1.0, -1.0])
        weight = torch.tensor([maths.desirable_weight, maths.undesirable_weight])
        v = b * sign * (ratio[:, 0] - KL)
        chosen, rejected = -sign * weight * b * s(v) * s(-v), torch.zeros(2)
    assert log_p.grad is not None
    assert torch.allclose(log_p.grad, torch.stack([chosen, rejected], dim=1), rtol=1e-5, atol=1e-7)


def test_certain_answers_have_finite_odds() -> None:
    log_p = torch.tensor([[0.0, -1e-9], [-1e-4, -80.0]], requires_grad=True)
    rows = Answers(log_p, torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, dtype=torch.bool))
    losses = LOSSES["orpo"].losses(rows, 1.0, 0.0)
    losses.sum().backward()
    assert log_p.grad is not None and losses.isfinite().all() and log_p.grad.isfinite().all()


@pytest.mark.parametrize("is_adapted", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 3.0)])
def test_each_token_has_its_own_factor(is_adapted: bool, scale: float, softcap: float | None) -> None:
    """Losses and gradients of hidden states and a head that trains, with a random factor per position."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=generator, requires_grad=True)
    layer = torch.nn.Linear(16, 40, bias=False)
    targets = torch.randint(0, 40, (11,), generator=generator)
    targets[[2, 7]] = IGNORE_INDEX
    factors = torch.randn(9, generator=generator)
    head = OutputHead(layer.weight, scale, softcap, layer, is_adapted)
    logits = layer(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = targets != IGNORE_INDEX
    expected = F.cross_entropy(logits[kept], targets[kept], reduction="none")
    wanted = torch.autograd.grad((expected * factors).sum(), [hidden, layer.weight])
    found = token_cross_entropy(hidden, head, targets, chunk_size=4)
    assert torch.allclose(found, expected, atol=1e-6)
    for gradient, other in zip(
        torch.autograd.grad((found * factors).sum(), [hidden, layer.weight]), wanted, strict=True
    ):
        assert torch.allclose(gradient, other, atol=1e-6)
    masked = token_cross_entropy(hidden, head, torch.full_like(targets, IGNORE_INDEX), CHUNK_SIZE)
    assert masked.shape == (0,) and torch.autograd.grad(masked.sum(), hidden)[0].abs().max() == 0


def test_measures_of_pairs_and_of_labelled_answers() -> None:
    log_p = torch.tensor([[-3.0, -4.0], [-8.0, -2.0], [-1.0, -6.0]])
    known = torch.tensor([[-4.0, -4.0], [-4.0, -4.0], [-4.0, -4.0]])
    rows = Answers(log_p, torch.tensor([[2.0, 4.0]] * 3), known, torch.tensor([True, False, False]))
    maths = PreferenceLoss("dpo", 0.5)
    shown = averages(maths.names, maths.measure(rows, 0.0))
    assert shown == pytest.approx(
        {
            "accuracy": 2 / 3,
            "reward_chosen": 0.0,
            "reward_rejected": 0.0,
            "logp_chosen": -4.0,
            "logp_rejected": -4.0,
            "kl": 0.0,
            "margin": 0.0,
        }
    )
    simpo = averages((m := PreferenceLoss("simpo", 2.0)).names, m.measure(rows, 0.0))
    assert "kl" not in simpo and simpo["reward_chosen"] == pytest.approx(-4.0)
    assert simpo["margin"] == pytest.approx(-4.0 + 2.0)
    kto = PreferenceLoss("kto", 0.5)
    shown = averages(kto.names, kto.measure(rows, 0.25))  # 1 > 0.25: right; -4 for a bad one: right; 3: wrong
    assert shown["accuracy"] == pytest.approx(2 / 3) and shown["kl"] == 0.25
    assert (shown["reward_chosen"], shown["reward_rejected"]) == pytest.approx((0.5, -0.25))
    one = Answers(log_p[:1], rows.counts[:1], known[:1], rows.is_wanted[:1])
    assert "reward_rejected" not in averages(kto.names, kto.measure(one, 0.0))
    assert not math.isnan(sum(averages(kto.names, kto.measure(one, 0.0)).values()))
