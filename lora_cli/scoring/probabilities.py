"""Probabilities of what a model says, in double precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


def normalise(logits: NDArray[Any]) -> Numbers:
    """Return the probabilities of classes of which each row (…, classes) has one: softmax."""
    values = np.asarray(logits, np.float64)
    powers = np.exp(values - values.max(-1, keepdims=True))
    probabilities: Numbers = powers / powers.sum(-1, keepdims=True)
    return probabilities


def squash(logits: Numbers) -> Numbers:
    """Return the probability of each label by itself: the logistic function, in a form that neither
    overflows nor loses what is near 0."""
    probabilities: Numbers = np.exp(-np.logaddexp(0, -logits))
    return probabilities
