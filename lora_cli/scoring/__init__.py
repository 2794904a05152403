"""What a model of a task says, and how good that is.

Its doors, in the order a reader needs them:

    make_scorer, Scorer    the loss of a task, what is gathered in an evaluation, its metrics
    find_scorer            … of a whole model, whatever it was trained by
    answers                what it says of a row, in words: labels, values, entities
    spans                  the part of a text that answers a question
    losses                 over what a loss is counted
    measures               which metrics there are, by task and labels
    answer_metrics         how well a written answer fits the expected one
    bootstrap              how far a metric may lie from that of all such rows
    regexes                a user's regular expression, within limits
    text_metrics           ROUGE, BLEU, chrF
"""

from lora_cli.scoring.metrics import ClassScore
from lora_cli.scoring.scorer import Scorer, find_scorer, make_scorer

__all__ = [
    "ClassScore",
    "Scorer",
    "answer_metrics",
    "answers",
    "bootstrap",
    "find_scorer",
    "losses",
    "make_scorer",
    "measures",
    "regexes",
    "spans",
    "text_metrics",
]
