"""The program: until its imports are done there is nothing to tidy, and a signal ends it at
once."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: os._exit(128 + number))
    from lora_cli import cli
    from lora_cli.common import endings

    try:
        cli.main()
    except SystemExit as ended:
        endings.leave(int(ended.code or 0))


if __name__ == "__main__":
    main()
