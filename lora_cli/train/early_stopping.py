"""Stop a run whose evaluations get no better: transformers' callback, for runs that are resumed."""

from __future__ import annotations

from typing import Any

from transformers import (
    EarlyStoppingCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)


class EarlyStopping(EarlyStoppingCallback):
    """Counts evaluations in a row that were no better than the best before them.

    Trainer writes the count into checkpoints, under this class's name, and does not read it.
    """

    def __init__(self, patience: int | None, least_gain: float) -> None:
        super().__init__(patience or 0, least_gain)

    @property
    def is_over(self) -> bool:
        """Whether no more is to be trained."""
        counter, patience = self.early_stopping_patience_counter, self.early_stopping_patience
        return bool(patience) and counter >= patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on counting where the checkpoint has come to; one of a run without patience has
        not begun to."""
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name) or {"attributes": {}}
        self.early_stopping_patience_counter = saved["attributes"].get(
            "early_stopping_patience_counter", 0
        )
        state.stateful_callbacks[name] = self.state()
