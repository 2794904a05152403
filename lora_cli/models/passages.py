"""Answers of a few hundred tokens in all, on which two forms of a model are compared at every
position, and their perplexity is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lora_cli.models import chat_template

PASSAGES = (
    (
        "Write a short story about a lighthouse keeper who finds a letter.",
        "Every evening Mara climbed the hundred and twelve steps to light the lamp. One autumn "
        "night, after a storm had thrown seaweed against the door, she found a bottle between the "
        "rocks. Inside lay a letter, folded twice, its ink brown with age. It was addressed to the "
        'keeper of the light, whoever that might be. "Thank you," it said. "We saw you when we had '
        'given up hope." She read it again by the turning beam, put it into the logbook, and went '
        "up to trim the wick.",
    ),
    (
        "What is 17 times 23? Explain each step.",
        "Split 23 into 20 and 3. First, 17 times 20 is 340, because 17 times 2 is 34, and ten "
        "times that is 340. Second, 17 times 3 is 51. Add the two parts: 340 + 51 = 391. So 17 "
        "times 23 is 391.",
    ),
    (
        "Translate to French: the cat sleeps on the warm windowsill. She does not hear the rain.",
        "Le chat dort sur le rebord de la fenêtre, où il fait chaud. Il n'entend pas la pluie.",
    ),
    (
        "Write a Python function that returns the largest number in a list, or None.",
        "```python\ndef largest(numbers):\n    best = None\n    for number in numbers:\n"
        "        if best is None or number > best:\n            best = number\n"
        "    return best\n```\n\nAn empty list gives None, since the loop never runs.",
    ),
    (
        "Give me three facts about the ocean as a list.",
        "1. The ocean covers about 71 percent of the surface of the Earth.\n2. Its deepest known "
        "place is the Challenger Deep, almost 11 kilometres down.\n3. It holds about 97 percent of "
        "the water on the planet; most of the rest is ice.",
    ),
)


class Passage(NamedTuple):
    """The token ids of a question and its answer, which begins at `start`."""

    ids: list[int]
    start: int


def make_passages(tokenizer: PreTrainedTokenizerBase, longest: int) -> list[Passage]:
    """Render the passages by the tokenizer's template, or as plain text without one, or where it
    shows nothing of an answer; `longest`: tokens that the model can read."""
    templated = chat_template.find_template(tokenizer) is not None
    made = _render_passages(tokenizer, longest, plain=False) if templated else []
    return made or _render_passages(tokenizer, longest, plain=True)


def _render_passages(
    tokenizer: PreTrainedTokenizerBase, longest: int, plain: bool
) -> list[Passage]:
    """Return the passages of which something is left to answer."""
    made = []
    for question, answer in PASSAGES:
        asked = [{"role": "user", "content": question}]
        if plain:
            prompt, whole = f"{question}\n\n", f"{question}\n\n{answer}"
        else:
            prompt = chat_template.render(tokenizer, asked, add_generation_prompt=True)
            answered = [*asked, {"role": "assistant", "content": answer}]
            whole = chat_template.render(tokenizer, answered)
        short, ids = (
            tokenizer(text, add_special_tokens=plain)["input_ids"] for text in (prompt, whole)
        )
        # a template may put more before an answer that is to be given than before one that was
        same = next(
            (at for at, pair in enumerate(zip(short, ids)) if pair[0] != pair[1]), len(short)
        )
        made.append(Passage(ids[:longest], max(1, same)))
    return [passage for passage in made if passage.start < len(passage.ids)]


class Likeness(NamedTuple):
    """How near `other` comes to a model over all positions of the passages: the mean KL in nats,
    the share of positions whose likeliest token is the same, the perplexities of the answers under
    the model and under `other`, and the number of positions."""

    mean_kl: float
    top1: float
    perplexity: float
    other_perplexity: float
    num_positions: int

    def __str__(self) -> str:
        lost = f"mean KL {self.mean_kl:.1e}, top-1 {self.top1:.1%}"
        perplexities = f"perplexity {self.other_perplexity:.2f} (before: {self.perplexity:.2f})"
        return f"{lost}, {perplexities}, {self.num_positions} tokens"


def compare_passages(
    passages: Sequence[Passage], model: Sequence[torch.Tensor], other: Sequence[torch.Tensor]
) -> Likeness:
    """Compare logits of two forms of a model, (length, vocabulary) for each passage, of the same
    vocabulary."""
    kl, same, losses = [], [], []
    for passage, first, second in zip(passages, model, other, strict=True):
        p, q = (logits.double().log_softmax(-1) for logits in (first, second))
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((first.argmax(-1) == second.argmax(-1)).double())
        answer = torch.tensor(passage.ids[passage.start :])[:, None]
        rows = slice(passage.start - 1, len(passage.ids) - 1)
        losses.append(torch.stack([-each[rows].gather(1, answer)[:, 0] for each in (p, q)]))
    before, after = torch.cat(losses, dim=1).mean(1).exp().tolist()
    return Likeness(
        max(torch.cat(kl).mean().item(), 0.0),
        torch.cat(same).mean().item(),
        before,
        after,
        sum(len(passage.ids) for passage in passages),
    )
