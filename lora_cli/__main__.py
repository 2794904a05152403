"""The program: until its imports are done there is nothing to tidy, and a signal ends it at
once."""

import os
import signal
import sys
from typing import NoReturn

OLDEST = (3, 11)
"""The Python that pyproject.toml asks for. This file alone is read by older ones, too: by one that
has a checkout, or another one's packages, on its path."""


WRONG_PYTHON = """error: lora needs Python 3.11 or newer, and this is {}: {}

hint: python3.12 -m venv .venv && .venv/bin/pip install lora-cli (any from 3.11 on)"""

NO_PACKAGE = """error: the package {}, which lora needs, is not installed

hint: {} -m pip install lora-cli"""


def main() -> NoReturn:
    """Run the command line."""
    if sys.version_info < OLDEST:
        found = "{}.{}.{}".format(*sys.version_info)  # noqa: UP032 – as old as that
        sys.exit(WRONG_PYTHON.format(found, sys.executable))
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))
    try:
        from lora_cli import cli
        from lora_cli.common import endings
    except ModuleNotFoundError as error:  # an installation that broke off, or had --no-deps
        if (error.name or "lora_cli").startswith("lora_cli"):
            raise
        sys.exit(NO_PACKAGE.format(error.name, sys.executable))

    try:
        cli.main()
    except SystemExit as ended:
        endings.leave(int(ended.code or 0))


if __name__ == "__main__":
    main()
