"""What every room uses: errors, the screen, files that appear whole, privacy, remote code, library
errors."""

from lora_cli.common.errors import LoraError, RejectedError, UsageError, find_nearest, join_errors
from lora_cli.common.files import read_json, refuse_link, refuse_occupied, write_json, write_text
from lora_cli.common.library_errors import translate_refusals
from lora_cli.common.ui import Progress, format_duration, say, warn

__all__ = [
    "LoraError",
    "Progress",
    "RejectedError",
    "UsageError",
    "files",
    "find_nearest",
    "format_duration",
    "join_errors",
    "library_errors",
    "privacy",
    "provenance",
    "read_json",
    "refuse_link",
    "refuse_occupied",
    "remote_code",
    "say",
    "translate_refusals",
    "ui",
    "warn",
    "write_json",
    "write_text",
]
