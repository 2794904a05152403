"""What produced an artefact: the record of a run, and the copy of it that travels inside an
adapter.

`record.json` in a run's folder holds the resolved recipe, the choices `auto` made, versions, base,
data and results; a copy, `lora_record.json`, travels inside the adapter and names the parent of
whatever is made from it.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.common import privacy, remote_code
from lora_cli.common.errors import LoraError
from lora_cli.common.files import read_json

RUN_RECORD, ARTEFACT_RECORD, RESOLVED_RECIPE = "record.json", "lora_record.json", "recipe.yaml"


METRICS = "metrics.jsonl"


PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def new_record(command: str, **contents: Any) -> dict[str, Any]:
    """A record of `command`, started now, with the versions at work."""
    return {
        "command": command,
        "started": now(),
        "versions": {
            "lora-cli": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in PACKAGES},
        },
        **({"trusted_remote_code": True} if remote_code.is_allowed() else {}),
        **privacy.make_portable(contents),
    }


def read_record(path: Path) -> dict[str, Any]:
    """A record of ours; LoraError if the file is none."""
    record = read_json(path)
    kinds = {"recipe": dict, "base": dict, "status": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in kinds.items()
    ):
        raise LoraError(f"{path} is no record of a run", f"remove it: rm {path}")
    return record


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
