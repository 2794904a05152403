"""What is neither written nor printed: secrets, and where the user's home folder lies. Standard
library only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MASK = "***"
SHORTEST = 8
"""Characters that a secret has at least: shorter values are words that stand elsewhere too."""
# As parts of names, so that TOKENIZERS_PARALLELISM is none of them
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:TOKEN|API_?KEY|ACCESS_?KEY|SECRET|SECRET_?KEY|PASSWORD|PASSWD|CREDENTIALS?)(?:$|[_-])",
    re.IGNORECASE,
)
# Words of the language models' own trade that are named as secrets are
NO_SECRETS = re.compile(r"(?:^|[._-])(?:eos|bos|pad|unk|stop)[_-]?token", re.IGNORECASE)
# Hugging Face, OpenAI and Anthropic, GitHub, Weights & Biases, AWS; a name and password in an
# address
SHAPES = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|wandb_v\d_\w{16,}|AKIA[A-Z0-9]{12,})"
    r"|(?<=://)[^/\s@]+@"
)


def find_secrets(
    environment: Mapping[str, str] | None = None, arguments: Sequence[str] | None = None
) -> Iterator[tuple[str, str]]:
    """(where it was given, value) of what the environment and the command line name as secrets.

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
    """The text with every secret that is known here, and all that has the shape of one, as ***."""
    for _, value in find_secrets():
        text = text.replace(value, MASK)
    return SHAPES.sub(lambda match: f"{MASK}@" if match[0].endswith("@") else MASK, text)


def find_held_secret(data: Any) -> str | None:
    """Where the first secret was given that stands in a text of `data` (dicts, lists, scalars);
    None if none does."""
    known, texts = list(find_secrets(arguments=[])), list(_walk_texts(data))
    return next((name for name, value in known for text in texts if value in text), None)


def _walk_texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, (dict, list, tuple)):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from _walk_texts(inner)


def make_portable(data: Any) -> Any:
    """`data` (dicts, lists, scalars) with the user's home folder as ~ wherever a text is a path in
    it."""
    if isinstance(data, dict):
        return {key: make_portable(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [make_portable(value) for value in data]
    if not isinstance(data, str) or not (home := _find_home()):
        return data
    return "~" + data[len(home) :] if data == home or data.startswith(f"{home}{os.sep}") else data


def replace_home(text: str) -> str:
    """Prose in which the user's home folder is ~, wherever it stands."""
    return text.replace(f"{home}{os.sep}", f"~{os.sep}") if (home := _find_home()) else text


def expand_home(path: str) -> str:
    """A path that begins with ~ as the shell would have it; any other as it is."""
    return str(Path(path).expanduser()) if path.startswith(f"~{os.sep}") else path


def _find_home() -> str | None:
    """The user's home folder; None where it is none of their own."""
    home = os.path.expanduser("~").rstrip(os.sep)  # noqa: PTH111 – Path.home() raises where there is none
    return home if home.startswith(os.sep) or ":" in home else None
