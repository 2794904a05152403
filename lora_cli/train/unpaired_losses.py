"""What is made of an answer that is wanted or not: KTO's loss, and how well both kinds are told
apart.

All is over log-probabilities of whole answers, in nats, under the model less those under the model
as it was at the start; times β, they are an answer's *reward*. z says how much likelier the model
has made answers whatever they answer: the mean of the same difference over answers to other
prompts, and at least 0. It is of a whole step's rows, and no gradient passes through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_cli.data import unpaired
from lora_cli.recipe import UNPAIRED_METRICS, Preference
from lora_cli.train import preference_losses
from lora_cli.train.pair_batches import REFERENCE


class Answers(NamedTuple):
    """Answers, (answers) each."""

    logps: Tensor
    reference: Tensor
    tokens: Tensor
    """How many tokens each has."""
    desirable: Tensor
    """1 of one that is wanted, else 0; empty where nobody asks."""

    @property
    def ratios(self) -> Tensor:
        """How much likelier each answer has become, in nats."""
        return self.logps - self.reference


def score_answers(model: Any, part: dict[str, Any], has_loss_head: bool) -> Answers:
    """Return how likely a model takes the answers in one sequence of a batch to be, or those that
    they are held against."""
    logps, tokens = preference_losses.score_each(model, part, has_loss_head)
    desirable = part.get(unpaired.DESIRABLE, logps.detach()[:0])
    return Answers(logps, part[REFERENCE], tokens, desirable)


def estimate_divergence(total: Tensor, number: Tensor) -> Tensor:
    """Return z by the sum of how much likelier so many answers to other prompts have become."""
    return (total / number.clamp(min=1)).clamp(min=0)


def compute_losses(answers: Answers, divergence: Tensor, preference: Preference) -> Tensor:
    """Return the loss of each answer (answers): Ethayarajh et al. 2024, eq. 7, with its λ as
    `desirable_weight` and `undesirable_weight`."""
    wanted = answers.desirable.bool()
    ahead = answers.ratios - divergence
    value = torch.sigmoid(preference.beta * torch.where(wanted, ahead, -ahead))
    weights = torch.where(wanted, preference.desirable_weight, preference.undesirable_weight)
    return weights.to(value.dtype) * (1 - value)


NAMES = ("loss", "kl", "rows", "desirable", "rewards", "logps", "rewards_wanted", "logps_wanted")
"""What `describe_answers` returns, as sums over the answers."""
NUMBERS = len(NAMES)


def describe_answers(
    answers: Answers, losses: Tensor, divergence: Tensor, preference: Preference
) -> Tensor:
    """Return the sums over the answers of NAMES (float32)."""
    with torch.no_grad():
        wanted, rewards = answers.desirable, preference.beta * answers.ratios
        each = [
            *(losses, divergence.expand_as(losses), torch.ones_like(losses), wanted),
            *(rewards, answers.logps, rewards * wanted, answers.logps * wanted),
        ]
        return torch.stack([every.float() for every in each]).sum(dim=1)


def average(sums: Sequence[float]) -> dict[str, float]:
    """Return UNPAIRED_METRICS by the sums of NAMES, each as a mean over its kind of answers;
    without those of a kind that none of the answers is of."""
    found = dict(zip(NAMES, sums))
    desirable = round(found["desirable"])
    kinds = {
        "desirable": (desirable, found["rewards_wanted"], found["logps_wanted"]),
        "undesirable": (
            round(found["rows"]) - desirable,
            found["rewards"] - found["rewards_wanted"],
            found["logps"] - found["logps_wanted"],
        ),
    }
    made = {"kl": found["kl"] / found["rows"]}
    for kind, (number, rewards, logps) in kinds.items():
        if number:
            made |= {f"rewards_{kind}": rewards / number, f"logps_{kind}": logps / number}
    if all(number for number, *_ in kinds.values()):
        made["rewards_margin"] = made["rewards_desirable"] - made["rewards_undesirable"]
    return {name: made[name] for name in UNPAIRED_METRICS if name in made}
