"""Look whether a port is another program's before processes try to meet there."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from datetime import timedelta

from lora_cli.common import LoraError

ANSWER = 10.0
"""Seconds in which torch's store answers, wherever it is."""


def refuse_mute(address: str, port: int) -> None:
    """Raise LoraError where a program listens at the port and does not answer as torch's store
    does: torch waits for that without end, and hears no signal meanwhile."""
    try:
        socket.create_connection((address, port), ANSWER).close()
    except OSError:  # nobody is there yet
        return
    greeting = threading.Thread(target=_greet, args=(address, port), daemon=True)
    greeting.start()
    greeting.join(ANSWER)
    if greeting.is_alive():
        raise LoraError(
            f"{address}:{port} is another program's: it listens, and does not answer",
            "--rdzv-endpoint HOST:PORT, or MASTER_PORT, with another port",
        )


def _greet(address: str, port: int) -> None:
    from torch.distributed import TCPStore

    with suppress(RuntimeError):  # whoever answers otherwise is refused when they meet
        TCPStore(address, port, timeout=timedelta(seconds=ANSWER / 2), wait_for_workers=False)
