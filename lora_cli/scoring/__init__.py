"""What a model says, scored against what was expected: by numpy alone, without torch.

metrics         classes, sets of labels, numbers, tags, answers to questions
"""

from lora_cli.scoring.metrics import ClassScore, Scores
from lora_cli.scoring.predictions import Gathered

__all__ = ["ClassScore", "Gathered", "Scores", "losses", "metrics"]
