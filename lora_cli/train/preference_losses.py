"""What is made of two answers: the loss of each pair, and how well pairs are told apart.

All is over log-probabilities of whole answers, the sums of those of their tokens in nats, under the
model (`logps`) and, where an objective needs it, under the model as it was at the start
(`reference`). The difference of both, or the first alone, times β, is an answer's *reward*. The
formulas are those of the papers named below; where a trainer of TRL's has the same one, tests hold
them against each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_cli.recipe import PREFERENCE_METRICS, Preference
from lora_cli.speed import loss_head
from lora_cli.train.pair_batches import ANSWERS, BY_ANSWER, REFERENCE


class Pairs(NamedTuple):
    """Chosen and rejected answers, (pairs, 2) each."""

    logps: Tensor
    reference: Tensor | None
    """None where answers are compared with each other alone."""
    tokens: Tensor
    """How many tokens each answer has."""

    @property
    def ratios(self) -> Tensor:
        """How much likelier each answer has become, or is, in nats."""
        return self.logps if self.reference is None else self.logps - self.reference


BY_TOKEN = ("ipo", "sigmoid_norm", "simpo", "odds_ratio")
"""Losses that take the mean over an answer's tokens, in place of their sum."""
SURE = -1e-6
"""Log-probability, on average over its tokens, from which on an answer is as likely as can be: the
odds of a higher one have no gradient in float32."""


def compute_losses(pairs: Pairs, preference: Preference) -> Tensor:
    """Return the loss of each pair (pairs), as `preference.loss` says, with the chosen answer's own
    as `sft_weight` says."""
    losses = _compare(pairs, preference)
    if preference.sft_weight:  # Pang et al. 2024, "Iterative Reasoning Preference Optimization"
        own = -pairs.logps[:, 0] / pairs.tokens[:, 0]
        losses = losses + preference.sft_weight * own
    return losses


def _compare(pairs: Pairs, preference: Preference) -> Tensor:
    kind, beta, wrong = preference.loss, preference.beta, preference.label_smoothing
    ratios = pairs.ratios
    if kind in BY_TOKEN:
        ratios = ratios / pairs.tokens
    chosen, rejected = ratios.unbind(dim=1)
    gap = chosen - rejected
    if kind == "odds_ratio":  # Hong et al. 2024, eqs. 4 and 7, as far as it compares
        return -beta * logsigmoid(_find_log_odds(chosen) - _find_log_odds(rejected))
    if kind == "ipo":  # Azar et al. 2023, eq. 17; by mean over tokens, as its authors agreed
        return (gap - 1 / (2 * beta)).square()
    if kind == "hinge":  # Zhao et al. 2023, SLiC
        return torch.relu(1 - beta * gap)
    if kind == "apo_zero":  # D'Oosterlinck et al. 2024, eq. 7
        return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    if kind == "apo_down":  # … eq. 8
        return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * gap)
    apart = beta * gap - preference.gamma  # γ: Meng et al. 2024, SimPO, eq. 6
    right, flipped = -logsigmoid(apart), -logsigmoid(-apart)
    if kind == "robust":  # Chowdhury et al. 2024, eq. 3
        return ((1 - wrong) * right - wrong * flipped) / (1 - 2 * wrong)
    # Rafailov et al. 2023, eq. 7; Mitchell 2023; without a reference Xu et al. 2024, CPO, eq. 3
    return (1 - wrong) * right + wrong * flipped


def _find_log_odds(logps: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log-probabilities."""
    held = logps.clamp(max=SURE)
    return held - torch.log(-torch.expm1(held))


def describe_pairs(pairs: Pairs, losses: Tensor, preference: Preference) -> Tensor:
    """Return the sums over the pairs of the loss and of each of PREFERENCE_METRICS, and their
    number (float32); pairs that are told apart by nothing are none that are told apart right."""
    with torch.no_grad():
        rewards = preference.beta * pairs.ratios
        if pairs.reference is None and preference.loss in BY_TOKEN:
            rewards = rewards / pairs.tokens
        margin = rewards[:, 0] - rewards[:, 1]
        found = {
            "rewards_accuracy": (margin > 0).float(),
            "rewards_margin": margin,
            "rewards_chosen": rewards[:, 0],
            "rewards_rejected": rewards[:, 1],
            "logps_chosen": pairs.logps[:, 0],
            "logps_rejected": pairs.logps[:, 1],
        }
        each = [losses, *(found[name] for name in PREFERENCE_METRICS), torch.ones_like(losses)]
        return torch.stack(each).float().sum(dim=1)


NUMBERS = len(PREFERENCE_METRICS) + 2
"""How many numbers `describe_pairs` returns."""


def average(sums: list[float]) -> dict[str, float]:
    """Return each of PREFERENCE_METRICS by its sum as `describe_pairs` has it, as a mean."""
    *found, number = sums[1:]
    return {name: value / number for name, value in zip(PREFERENCE_METRICS, found)}


def score_answers(model: Any, part: dict[str, Any], has_loss_head: bool) -> Pairs:
    """Return how likely a model takes the pairs of answers in one sequence of a batch
    (`pair_batches`) to be; see `score_each`."""
    logps, tokens = score_each(model, part, has_loss_head)
    reference: Tensor | None = part.get(REFERENCE)
    known = None if reference is None else reference.view(-1, 2)
    return Pairs(logps.view(-1, 2), known, tokens.view(-1, 2))


def score_each(model: Any, part: dict[str, Any], has_loss_head: bool) -> tuple[Tensor, Tensor]:
    """Return how likely a model takes each answer in one sequence of a batch (`pair_batches`) to
    be, and how many tokens it has (answers).

    With `has_loss_head` the model computes it at the answers' tokens (`speed/loss_head.py`).
    """
    inputs = {name: value for name, value in part.items() if name not in (ANSWERS, *BY_ANSWER)}
    if has_loss_head:
        losses = model(**inputs, each=True).loss
    else:
        labels = inputs.pop("labels")
        losses = loss_head.list_losses(model(**inputs).logits, labels)
    sums = [-each.sum() for each in losses.split(part[ANSWERS])]
    # without an answer, as a process may be, nothing that the others' gradients wait for is lost
    logps = torch.stack(sums) if sums else losses[:0]
    return logps, logps.new_tensor(part[ANSWERS])
