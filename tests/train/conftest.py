"""Fixtures of the tests of train."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Trainer collects garbage when it begins; it need not look at all that the libraries have
    made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
