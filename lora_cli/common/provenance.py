"""Write and read the record of what produced an artefact.

`record.json` in a run's folder holds the resolved recipe, the choices `auto` made, versions, base,
data and results. A copy, `lora_record.json`, travels inside the adapter and names the parent of
whatever is made from it.
"""

from __future__ import annotations

import platform
from datetime import UTC, date, datetime
from importlib.metadata import version
from typing import Annotated, Any

from pydantic import AfterValidator

from lora_cli import __version__
from lora_cli.common import privacy, remote_code
from lora_cli.common.stored import Stored

RUN_RECORD = "record.json"
ARTEFACT_RECORD = "lora_record.json"
RESOLVED_RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations"
REPORT, REPORT_NUMBERS = "report.html", "report.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")


def _refuse_no_day(started: str) -> str:
    date.fromisoformat(started[:10])
    return started


class Record(Stored):
    """What every record says: the verb that made the artefact, when and by which versions."""

    command: str = ""
    started: Annotated[str, AfterValidator(_refuse_no_day)]
    """In UTC, ISO 8601."""
    versions: dict[str, str] = {}


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


def now() -> str:
    """Return the time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
