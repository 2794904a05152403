"""Run a command, and end all of it when the process that asked for it ends, also by kill -9:
`keeper.py SOCKET COMMAND…`.

The other end of the socket is that process's alone. The command leads a group, in which is what it
starts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress


def end_group(leader: int) -> None:
    """Kill what is left of a group."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: nothing but zombies
        os.killpg(leader, signal.SIGKILL)


def watch(lifeline: socket.socket, leader: int) -> None:
    """Wait for the end of the process at the other end, and end the group."""
    lifeline.recv(1)
    end_group(leader)


def main() -> None:
    """Run the command, and end as it does: by the same status or signal."""
    _, number, *command = sys.argv
    lifeline = socket.socket(fileno=int(number))
    lifeline.set_inheritable(False)
    leader = subprocess.Popen(command, process_group=0)
    threading.Thread(target=watch, args=[lifeline, leader.pid], daemon=True).start()
    status = leader.wait()
    end_group(leader.pid)
    if status < 0:
        with suppress(OSError):  # nobody listens to SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
