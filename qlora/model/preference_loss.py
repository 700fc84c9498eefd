"""Losses of preferences: DPO, IPO, ORPO, SimPO and KTO.

A row has two answers. For one of n target tokens with log-probabilities l_1 .. l_n, under the model and under
the reference (the base, or an SFT adapter on it),

    p_a = sum of l_i    q_a = the same under the reference    m_a = p_a / n_a    s(x) = 1 / (1 + e^-x)

In all but KTO the two are c, chosen, and r, rejected, of one prompt. L is a row's loss; its gradient with respect
to every l_i of an answer is one number, so a token's gradient is that number times that of its log-probability:

    dpo    u = b ((p_c - q_c) - (p_r - q_r))              L = -(1 - e) log s(u) - e log s(-u)
           dL/dl_c = -b (1 - e - s(u))                    dL/dl_r = -dL/dl_c                     arXiv 2305.18290
    ipo    d = (p_c - q_c) / n_c - (p_r - q_r) / n_r      L = (d - 1 / 2b)^2
           dL/dl_c = 2 (d - 1 / 2b) / n_c                 dL/dl_r = -2 (d - 1 / 2b) / n_r        arXiv 2310.12036
    orpo   o_a = m_a - log(1 - e^m_a), u = o_c - o_r      L = -b log s(u) - R / N p_c
           dL/dl_c = -b s(-u) / (n_c (1 - e^m_c)) - R / N
                                                          dL/dl_r = b s(-u) / (n_r (1 - e^m_r))  arXiv 2403.07691
    simpo  u = b (m_c - m_r) - g                          L = -log s(u)
           dL/dl_c = -b s(-u) / n_c                       dL/dl_r = b s(-u) / n_r                arXiv 2405.14734
    kto    v = b (p_1 - q_1 - z), -v for a bad answer     L = w (1 - s(v))
           dL/dl_1 = -w b s(v) s(-v), + for a bad answer                                         arXiv 2402.01306

with b = --beta, e = --label-smoothing, g = --simpo-gamma, w = --desirable-weight or --undesirable-weight. A step's
loss is the mean of L over its R rows; N counts its chosen target tokens, so ORPO's second term is the mean
cross-entropy of the chosen answers per token. IPO's division by n is not in the paper; its authors confirmed it to
TRL, which these definitions follow.

KTO's z estimates the KL divergence from the reference, without a gradient, on answers that belong to other prompts
(the row's second sequence): z = max(0, mean over the step's rows of p_2 - q_2).

Letters: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NEEDS_REFERENCE = ("dpo", "ipo", "kto")
CERTAIN = -1e-7  # the largest mean log-probability whose odds fp32 can tell apart


@dataclass(frozen=True)
class Answers:
    """The answers of R rows; all (R, 2) fp32, but `is_wanted` (R,) bool.

    Attributes:
        log_p: log-probability of each answer's targets.
        counts: how many targets each has.
        reference: `log_p` under the reference; zeros where there is none.
        is_wanted: KTO: whether the first answer is a good one.
    """

    log_p: Tensor
    counts: Tensor
    reference: Tensor
    is_wanted: Tensor


@dataclass(frozen=True)
class PreferenceLoss:
    """One method and its constants, as in the module docstring."""

    method: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.0
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    @property
    def needs_reference(self) -> bool:
        return self.method in NEEDS_REFERENCE

    def losses(self, answers: Answers, rows_per_token: float, kl: float) -> Tensor:
        """(R,) fp32: L of each row.

        Args:
            rows_per_token: R / N of the whole step, for ORPO.
            kl: z of the whole step, for KTO.
        """
        log_p, counts, beta = answers.log_p, answers.counts, self.beta
        ratio = log_p - answers.reference
        if self.method == "dpo":
            u = beta * (ratio[:, 0] - ratio[:, 1])
            return -(1 - self.label_smoothing) * logsigmoid(u) - self.label_smoothing * logsigmoid(-u)
        if self.method == "ipo":
            mean = ratio / counts
            return (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)) ** 2
        if self.method == "kto":
            sign = answers.is_wanted.float() * 2 - 1
            weight = torch.where(answers.is_wanted, self.desirable_weight, self.undesirable_weight)
            return weight * torch.sigmoid(-beta * sign * (ratio[:, 0] - kl))
        mean = log_p / counts
        if self.method == "simpo":
            return -logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - self.simpo_gamma)
        mean = mean.clamp(max=CERTAIN)
        odds = mean - torch.log(-torch.expm1(mean))
        return -beta * logsigmoid(odds[:, 0] - odds[:, 1]) - rows_per_token * log_p[:, 0]

    @property
    def names(self) -> tuple[str, ...]:
        """What `measure` finds."""
        found = ("accuracy", "reward_chosen", "reward_rejected", "logp_chosen", "logp_rejected")
        return (*found, "kl") if self.needs_reference else found

    def measure(self, answers: Answers, kl: float) -> Tensor:
        """(names, 2) fp64: sum and count of each number that a run shows; `averages` makes means of them.

        reward_...    of the chosen and the rejected answers: b (p - q); without a reference b m
        logp_...      p, of both too
        accuracy      share of rows whose chosen answer has the higher reward; in KTO of rows whose answer is on
                      the right side of z
        kl            mean of p - q over both answers, in nats: an estimate of the divergence from the reference on
                      the data's answers, not on the model's; in KTO z
        """
        log_p, wanted = answers.log_p, answers.is_wanted
        ratio = log_p - answers.reference
        rewards = self.beta * (ratio if self.needs_reference else log_p / answers.counts)
        if self.method == "kto":
            is_right = (ratio[:, 0] > kl) == wanted
            sides = [(rewards[which, 0], log_p[which, 0]) for which in (wanted, ~wanted)]
            drift = ratio.new_full((len(ratio),), kl)
        else:
            is_right = rewards[:, 0] > rewards[:, 1]
            sides = [(rewards[:, side], log_p[:, side]) for side in (0, 1)]
            drift = ratio.flatten()
        found = [is_right, *(reward for reward, _ in sides), *(logp for _, logp in sides), drift]
        sums = torch.stack([values.double().sum() for values in found])
        counts = torch.tensor([len(values) for values in found], dtype=torch.float64, device=sums.device)
        return torch.stack([sums, counts], dim=1)[: len(self.names)]


def averages(names: Sequence[str], sums: Tensor) -> dict[str, float]:
    """The means of what `measure` summed, and margin: how much higher the chosen answers' mean reward is."""
    means = {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
    if {"reward_chosen", "reward_rejected"} <= means.keys():
        means["margin"] = means["reward_chosen"] - means["reward_rejected"]
    return means
