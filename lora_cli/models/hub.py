"""Look at what a hub answers before huggingface_hub names files by it.

The hub is whoever HF_ENDPOINT or a proxy says it is.
"""

from __future__ import annotations

import re
from typing import Any

from huggingface_hub import resolve_revision, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from lora_cli.common import LoraError, files, library_errors, plain_files
from lora_cli.models import reach

COMMIT = re.compile("[0-9a-f]{40}")
ETAG = re.compile(r'(W/)?"?[0-9A-Za-z][\w.+=-]{0,255}"?', re.ASCII)
NAMING = {"x-repo-commit": COMMIT, "etag": ETAG, "x-linked-etag": ETAG}
"""Headers that files of the hub's cache are named by."""
MOST = plain_files.SMALL
"""Bytes that are read of an answer of the hub's API."""
HINT = "is HF_ENDPOINT the hub, or a proxy in between? HF_HUB_OFFLINE=1 uses only what is cached"


def resolve_commit(name: str, revision: str | None, kind: str = "model") -> str:
    """Return the commit that a revision of a repository stands for now. Raise LoraError where the
    hub's answer is none; the hub's errors where it does not know the name or revision."""
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        with library_errors.translate_file_errors(f"the hub's answer about {name} is none", HINT):
            found = str(resolve_revision(name, revision=revision, repo_type=kind).resolved)
    except LoraError:
        reach.refuse_unreachable(name)  # if that is why, it says so
        raise
    return check_commit(name, found)


def check_commit(name: str, commit: str) -> str:
    """Return the commit; LoraError where it cannot be one, and must not name a folder."""
    if not COMMIT.fullmatch(commit):
        raise LoraError(f"the hub says that {name} is at {commit[:60]!r}, which is no commit", HINT)
    return commit


def check_answer(response: Any) -> None:
    """Look at an httpx2 response. Raise LoraError where files would be named by what is no name,
    where it is compressed although that was not asked for, and where the hub's API does not answer
    with JSON within limits."""
    for header, pattern in NAMING.items():
        value = response.headers.get(header)
        if value is not None and not pattern.fullmatch(value):
            raise _refuse(response, f"the {header} {value[:60]!r}")
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _refuse(response, "a compressed answer, which was not asked for")
    speaks = response.url.path.startswith("/api/")
    if speaks or response.is_error:
        response._content = _read_body(response)  # as response.read() would, which has no limit
    if speaks and response.is_success and response.request.method != "HEAD":
        try:
            files.parse_json(response.content, f"the hub's answer to {response.url}")
        except LoraError as error:  # whose hint is to look into a file
            raise LoraError(error.message, HINT) from None


def _read_body(response: Any) -> bytes:
    body = bytearray()
    for block in response.iter_raw():
        body += block
        if len(body) > MOST:
            raise _refuse(response, f"more than {MOST} bytes")
    return bytes(body)


def _refuse(response: Any, what: str) -> LoraError:
    return LoraError(f"the hub answered {response.url} with {what}", HINT)


def _make_client() -> Any:
    client = default_client_factory()
    client.headers["accept-encoding"] = "identity"
    hooks = client.event_hooks
    client.event_hooks = hooks | {"response": [*hooks["response"], check_answer]}
    return client


set_client_factory(_make_client)
