"""Tell rows apart by what they say: a number for each, made of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_cli.data.classify import Labelled
from lora_cli.data.encode import Encoded
from lora_cli.data.formats import Preference, Unpaired
from lora_cli.data.offsets import NDArray
from lora_cli.data.tag import Tagged

DIGEST = "digest"
"""The column that holds it, where rows are to be held out."""
LARGEST = 2**63


def add_digest(row: Any, found: Sequence[Encoded]) -> list[Encoded]:
    """Return what a row became with the row's digest beside it, int64 of shape (1,).

    `row` is what an encoder takes: neither where it was read nor what its columns were called is
    part of it, nor what the chat template does not read, as an id of each turn. Labels are those
    that the row became, whether it gives their names or their numbers; of a picture, it is the
    file's bytes and these.
    """
    return [
        each._replace(others={**each.others, DIGEST: _make_digest(row, each)}) for each in found
    ]


def _make_digest(row: Any, encoded: Encoded) -> NDArray:
    if "image" in encoded.others:
        content = encoded.others["image"].tobytes() + encoded.labels.tobytes()
    else:
        read = _take_said(row, encoded)
        content = json.dumps(read, sort_keys=True, default=repr).encode()
    number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return np.array([number % LARGEST], np.int64)


def _take_said(row: Any, encoded: Encoded) -> Any:
    """Return what a row says: its texts, and the labels that it became; of conversations, without
    what the template does not read."""
    if isinstance(row, Labelled):
        return row._replace(label=encoded.labels.tolist())
    if isinstance(row, Tagged):
        return row._replace(tags=encoded.labels.tolist())
    return _leave_out_unread(row, encoded.unread)


def _leave_out_unread(row: Any, unread: Sequence[str]) -> Any:
    """Return a row without what `unread` names: keys of a conversation's turns, and tools."""
    if isinstance(row, Preference):
        return [_leave_out_unread(each, unread) for each in row]
    if isinstance(row, Unpaired):
        return [_leave_out_unread(row.answer, unread), row.desirable]
    if not unread:
        return row
    messages = [
        {key: value for key, value in message.items() if key not in unread}
        for message in row.messages
    ]
    return row._replace(messages=messages, tools=None if "tools" in unread else row.tools)
