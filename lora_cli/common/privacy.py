"""Keep secrets and the path of the home folder out of files and messages. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MASK = "***"
SHORTEST = 8
"""The fewest characters of a secret: shorter values are words that occur elsewhere too."""
# Matched as whole parts of a name, so that TOKENIZERS_PARALLELISM does not count
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKEN|API_?KEY|ACCESS_?KEY|SECRET|SECRET_?KEY|PASSWORD|PASSWD|CREDENTIALS?)(?:$|[_-])",
    re.IGNORECASE,
)
# Names of special tokens, which look like names of secrets
NO_SECRETS = re.compile(r"(?:^|[._-])(?:eos|bos|pad|unk|stop)[_-]?token", re.IGNORECASE)
# Tokens of Hugging Face, OpenAI and Anthropic, GitHub, Weights & Biases and AWS, and the name and
# password in an address
SHAPES = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|wandb_v\d_\w{16,}|AKIA[A-Z0-9]{12,})"
    r"|(?<=://)[^/\s@]+@"
)


def find_secrets(
    environment: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Yield (where it was given, value) of every value that the environment or command line names
    as a secret.

    Arguments count as `--token VALUE`, `--token=VALUE` and `--set section.some_token=VALUE`.
    """
    for name, value in (os.environ if environment is None else environment).items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST:
            yield f"${name}", value
    given = sys.argv[1:] if arguments is None else arguments
    for argument, following in zip(given, [*given[1:], ""]):
        name, equals, value = argument.partition("=")
        last = name.rpartition(".")[2].lstrip("-")
        value = value if equals else following if name.startswith("--") else ""
        if SECRET_NAME.search(last) and not NO_SECRETS.search(name) and len(value) >= SHORTEST:
            yield name, value


def mask_secrets(text: str) -> str:
    """Return the text with *** in place of every known secret, and of all that has the shape of
    one."""
    for _, value in find_secrets():
        text = text.replace(value, MASK)
    return SHAPES.sub(lambda match: f"{MASK}@" if match[0].endswith("@") else MASK, text)


def find_held_secret(data: Any) -> str | None:
    """Return where the first secret was given that occurs in a text of `data` (dicts, lists,
    scalars), or None."""
    known = list(find_secrets(arguments=[]))
    texts = list(_walk_texts(data))
    return next((name for name, value in known for text in texts if value in text), None)


def _walk_texts(data: Any) -> Iterator[str]:
    """Yield every text in `data`, at any depth."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list, tuple)):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from _walk_texts(inner)


def make_portable(data: Any) -> Any:
    """Return `data` (dicts, lists, scalars) with ~ for the user's home folder in every text that is
    a path in it."""
    if isinstance(data, dict):
        return {key: make_portable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [make_portable(value) for value in data]
    if not isinstance(data, str) or not (home := _find_home()):
        return data
    return "~" + data[len(home) :] if data == home or data.startswith(f"{home}{os.sep}") else data


def replace_home(text: str) -> str:
    """Return prose with ~ for the user's home folder, wherever it occurs."""
    return text.replace(f"{home}{os.sep}", f"~{os.sep}") if (home := _find_home()) else text


def expand_home(path: str) -> str:
    """Return a path that begins with ~/ as the shell would expand it, and any other unchanged."""
    return str(Path(path).expanduser()) if path.startswith(f"~{os.sep}") else path


def _find_home() -> str | None:
    """Return the user's home folder, or None where the user does not have one of their own."""
    home = os.path.expanduser("~").rstrip(os.sep)  # noqa: PTH111 – Path.home() raises where there is none
    return home if home.startswith(os.sep) or ":" in home else None
