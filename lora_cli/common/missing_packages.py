"""Find the package that an error says is missing.

Libraries import what only some models and settings need when they need it, and say what is missing
in an ImportError of Python's, or in sentences of their own.
"""

from __future__ import annotations

import re

from lora_cli.common.shown import quote

SENTENCES = (
    r"pip install (?:-U |--upgrade )?[`'\"]?([\w\[\],.+:/@><=-]*[\w\]])",
    r"[Pp]lease install (https://github\.com/[\w./-]*\w)",
    r"The '([\w.-]+)[^']*' distribution was not found",
    r"requires the (?:🤗 )?([\w-]+) (?:library|package)",
    r"[`'\"]([\w.-]+)[`'\"] (?:library |package )?is not installed",
    r"packages that were not found in your environment: ?([\w.-]+)",
    r"package for (FlashAttention\d) doesn't seem to be installed",
)
"""What PEFT, TRL, transformers and importlib write; the group is the package."""
DISTRIBUTIONS = {
    "google": "protobuf",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "PyYAML",
    "cv2": "opencv-python",
    "FlashAttention2": "flash-attn",
    "FlashAttention3": "flash-attn-3",
    "FlashAttention4": "flash-attn-4",
}
"""Names under which PyPI has what is imported, or written about, under another."""


def find_missing_package(error: BaseException) -> str | None:
    """Return the name to install by, of what an error says is not installed, or None."""
    text = " ".join(str(error).split())
    if found := re.match(r"No module named '([\w]+)", text):
        return None if found[1] == "lora_cli" else DISTRIBUTIONS.get(found[1], found[1])
    for sentence in SENTENCES:
        if found := re.search(sentence, text):
            return DISTRIBUTIONS.get(found[1], found[1])
    return None


def suggest_package(error: BaseException) -> str | None:
    """Return the command that installs what an error says is not installed, or None."""
    name = find_missing_package(error)
    if name is None:
        return None
    return f"pip install {quote(f'git+{name}' if name.startswith('https://') else name)}"
