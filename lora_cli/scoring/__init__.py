"""What a model of a task says, and how good that is.

Its doors, in the order a reader needs them:

    losses     what training makes small: the loss of each task, summed over its labels
    measures   which metrics there are, by task and labels
    Gathered   what is said of the rows of an evaluation, and its metrics
"""

from lora_cli.scoring.predictions import Gathered

__all__ = ["Gathered", "losses", "measures"]
