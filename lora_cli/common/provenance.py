"""Write and read the record of what produced an artefact.

`record.json` in a run's folder holds the resolved recipe, the choices `auto` made, versions, base,
data and results. A copy, `lora_record.json`, travels inside the adapter and names the parent of
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
from lora_cli.common.errors import LoraError, quote
from lora_cli.common.files import read_json

RUN_RECORD = "record.json"
ARTEFACT_RECORD = "lora_record.json"
RESOLVED_RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def new_record(command: str, **contents: Any) -> dict[str, Any]:
    """Return a record of `command`, started now, with the versions installed."""
    return {
        "command": command,
        "started": now(),
        "versions": {
            "lora-cli": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        **({"trusted_remote_code": True} if remote_code.is_allowed() else {}),
        **privacy.make_portable(contents),
    }


def read_record(path: Path) -> dict[str, Any]:
    """Return a run's record; raise LoraError if the file is not one."""
    record = read_json(path)
    kinds = {"recipe": dict, "base": dict, "status": str}
    if not isinstance(record, dict) or not all(
        isinstance(record.get(key), kind) for key, kind in kinds.items()
    ):
        raise LoraError(f"{path} is not the record of a run", f"remove it: rm {quote(path)}")
    return record


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
