"""What a model of a task says, and how good that is.

Its doors, in the order a reader needs them:

    make_scorer, Scorer    the loss of a task, what is gathered in an evaluation, its metrics
    find_scorer            … of a whole model, whatever it was trained by
    answers                what it says of a row, in words: labels, values, entities
    spans                  the part of a text that answers a question
    losses                 over what a loss is counted
    measures               which metrics there are, by task and labels
"""

from lora_cli.scoring.metrics import ClassScore
from lora_cli.scoring.scorer import Scorer, find_scorer, make_scorer

__all__ = [
    "ClassScore",
    "Scorer",
    "answers",
    "find_scorer",
    "losses",
    "make_scorer",
    "measures",
    "spans",
]
