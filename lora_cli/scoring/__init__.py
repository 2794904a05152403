"""What a model of a task says, and how good that is.

Its doors, in the order a reader needs them:

    make_scorer, Scorer    the loss of a task, what is gathered in an evaluation, its metrics
    losses                 over what a loss is counted
    measures               which metrics there are, by task and labels
"""

from lora_cli.scoring.scorer import Scorer, make_scorer

__all__ = ["Scorer", "losses", "make_scorer", "measures"]
