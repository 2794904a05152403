"""The repository on the hub: looked at, made, written to in one commit, compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from lora_cli.card import CARD, parse_license
from lora_cli.common import LoraError, RejectedError, UsageError, library_errors, plain_files, ui
from lora_cli.models import hub, names
from lora_cli.publish.outgoing import Outgoing

LOGIN = "hf auth login, with a token that may write"
AGAIN = "run it again: what the hub has already is not sent again"
REFUSALS = {
    401: ("the hub does not know this token", LOGIN),
    403: ("the token may not write to {name}", LOGIN + " to that namespace"),
    404: ("the hub has no place for {name}", "is the owner spelt right? hf auth whoami"),
    409: ("{name} is being changed by somebody else", AGAIN),
    412: ("{name} has changed meanwhile", AGAIN),
    413: ("the hub takes no file of this size", "lora export-gguf -q Q4_K_M makes smaller ones"),
    422: ("the hub refuses what was sent to {name}", "mend what it names, and run it again"),
    429: ("the hub has had too many requests", f"wait some minutes, and {AGAIN}"),
}
"""What answers mean to somebody who uploads."""
NONSENSE = (AttributeError, KeyError, TypeError, json.JSONDecodeError)
"""What becomes of an answer that is a page, a list, or an object without what belongs in it."""


class Repository(NamedTuple):
    """A repository as it is before the upload. `head`: the branch's commit, None where it has none;
    `card`: its README.md, empty where it has none."""

    name: str
    branch: str
    exists: bool = False
    is_private: bool = False
    head: str | None = None
    card: str = ""


def refuse_name(name: str) -> None:
    """Raise UsageError for what is no OWNER/NAME."""
    if name.count("/") != 1 or not names.is_hub_name(name):
        raise UsageError(f"{name} is no name on the hub", "give OWNER/NAME")


def find_account() -> str:
    """Return whose token it is. LoraError where there is none, or it only reads."""
    if constants.HF_HUB_OFFLINE:
        raise LoraError("HF_HUB_OFFLINE is set: nothing can be uploaded", "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise LoraError("there is no token to upload with", LOGIN)
    with _explained("the hub"):
        found = HfApi().whoami()
        access = found.get("auth", {}).get("accessToken", {})
    if isinstance(access, dict) and access.get("role") == "read":
        raise LoraError("the token only reads", LOGIN)
    return str(found.get("name"))


def find_address() -> str:
    """Return the hub's address."""
    return str(HfApi().endpoint)


def look(name: str, branch: str) -> Repository:
    """Return what the hub says of a repository."""
    api = HfApi()
    with _explained(name):
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            return Repository(name, branch)
        seen = Repository(name, branch, exists=True, is_private=bool(info.private))
        try:
            head = str(api.model_info(name, revision=branch).sha)
        except RevisionNotFoundError:
            return seen
        return seen._replace(head=head, card=_read_card(api, name, head))


def _read_card(api: HfApi, name: str, commit: str) -> str:
    try:
        file = api.hf_hub_download(name, CARD, revision=hub.check_commit(name, commit))
    except EntryNotFoundError:
        return ""
    return plain_files.read_small(Path(file))


def find_license(base: str, commit: str | None) -> dict[str, str]:
    """Return the license that a base's card on the hub names; empty where it names none, and, which
    is said, where it cannot be asked."""
    try:
        file = HfApi().hf_hub_download(base, CARD, revision=commit)
    except EntryNotFoundError:
        return {}
    except HfHubHTTPError as error:
        ui.say(f"  the license of {base} is not known: {error.response.status_code} from the hub")
        return {}
    return parse_license(plain_files.read_small(Path(file)), f"the README.md of {base}")


def has_weights(name: str, commit: str | None, folder: Path) -> bool:
    """Return whether a repository has the weights of a folder, file by file."""
    with _explained(name):
        tree = list(HfApi().list_repo_tree(name, revision=commit))
    there = {each.path: each for each in tree if isinstance(each, RepoFile)}
    files = [Outgoing(file.name, file) for file in folder.glob("*.safetensors")]
    return bool(files) and all(_is_same(each, there.get(each.name)) for each in files)


def upload(repository: Repository, files: Sequence[Outgoing], private: bool, message: str) -> str:
    """Make the repository and its branch where they are missing, and commit exactly these files;
    return the commit. LoraError for what the hub refuses."""
    api, name, branch = HfApi(), repository.name, repository.branch
    with _explained(name):
        head = repository.head
        if not repository.exists:
            api.create_repo(name, private=private, exist_ok=True)
        if head is None and branch != constants.DEFAULT_REVISION:
            api.create_branch(name, branch=branch, exist_ok=True)
        added = [
            CommitOperationAdd(
                each.name, each.content if isinstance(each.content, bytes) else str(each.content)
            )
            for each in files
        ]
        made = api.create_commit(
            name, added, commit_message=message, revision=branch, parent_commit=head
        )
    return hub.check_commit(name, str(made.oid))


def compare(repository: Repository, commit: str, files: Sequence[Outgoing]) -> None:
    """Raise RejectedError where a commit does not hold these files as they are here."""
    with _explained(repository.name):
        tree = HfApi().list_repo_tree(repository.name, recursive=True, revision=commit)
        there = {each.path: each for each in tree if isinstance(each, RepoFile)}
    wrong = [each.name for each in files if not _is_same(each, there.get(each.name))]
    if wrong:
        raise RejectedError(
            f"{repository.name} at {commit} does not hold {', '.join(wrong)} as sent", AGAIN
        )


def _is_same(each: Outgoing, there: RepoFile | None) -> bool:
    if there is None:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == each.digest("sha256")
    return there.blob_id == each.digest("git")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what the hub, or the way to it, answers into a LoraError about the upload to `name`."""
    try:
        yield
    except KeyboardInterrupt:
        ui.say(f"interrupted; {AGAIN}")
        raise
    except LoraError:
        raise
    except Exception as error:
        raised = _find_answer(error)
        if raised is not None and raised.response.status_code in REFUSALS:
            said, hint = REFUSALS[raised.response.status_code]
            why = _find_reason(raised)
            raise LoraError(f"{said.format(name=name)}{why}", hint) from error
        if isinstance(error, NONSENSE):  # huggingface_hub takes what it is told for a hub's
            said = f"{find_address()} does not answer as a hub does ({type(error).__name__})"
            raise LoraError(
                said, "is HF_ENDPOINT a hub? a proxy or a login page answers too"
            ) from error
        known = library_errors.translate(error)
        if known is not None:
            fix = AGAIN if known.hint == library_errors.CONNECTION else known.hint
            raise LoraError(f"{name} cannot be reached: {known.message}", fix) from error
        if type(error) is ValueError:  # what huggingface_hub makes of the hub's answers
            raise LoraError(f"the hub refuses it: {' '.join(str(error).split())}", AGAIN) from error
        raise


def _find_answer(error: BaseException | None) -> HfHubHTTPError | None:
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _find_reason(error: HfHubHTTPError) -> str:
    said = error.server_message or error.response.headers.get("X-Error-Message") or ""
    return f": {' '.join(said.split())}" if said else f" ({error.response.status_code})"
