"""Start a command in several processes, by torch's elastic agent, and end as they do.

What the agent does not: the message of the rank that failed first is the job's and its exit status
too, ranks end at once where one has failed, and SIGUSR1 reaches them.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from lora_cli.common import (
    LoraError,
    UsageError,
    endings,
    files,
    quote_words,
    spell_count,
    stored,
    ui,
)
from lora_cli.distributed import ports, ranks
from lora_cli.distributed.place import Nodes

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

PATIENCE = 60
"""Seconds in which the other machines have to come."""
GRACE = 600
"""Seconds that ranks have to end their step and save, after a signal."""
ENDED_BY_SIGNAL = tuple(128 + number for number in endings.NUMBERS)
LOOPBACK = ("localhost:", "127.0.0.1:")
SAVE: signal.Signals | None = getattr(signal, "SIGUSR1", None)


class Failure(stored.Stored):
    """What a rank leaves of its end."""

    lines: list[str]
    status: int
    torn: bool


def settle_nodes(nodes: Nodes | None, rows: int, on_cpu: bool) -> Nodes | None:
    """Return what is to be started; None for one process in all.

    Where the user has not said it, that is one process for each of this machine's GPUs, but no more
    than a step has `rows`. UsageError for more processes than GPUs.
    """
    import torch

    devices = 0 if on_cpu or not torch.cuda.is_available() else torch.cuda.device_count()
    if nodes is None and min(devices, rows) > 1:
        nodes = Nodes(min(devices, rows))
        fewer = (
            f": a step has {spell_count(rows, 'row')}"
            if rows < devices
            else " (--nproc 1: one in all)"
        )
        ui.say(
            f"{spell_count(nodes.processes, 'process', 'processes')}, one for each of "
            f"{spell_count(devices, 'GPU')}{fewer}"
        )
    if nodes is None:
        return None
    nodes = nodes._replace(processes=nodes.processes or max(1, devices))
    if nodes.processes * nodes.machines == 1:
        return None
    if devices and nodes.processes > devices:
        raise UsageError(
            f"--nproc {nodes.processes}: this machine has {spell_count(devices, 'GPU')}",
            f"--nproc {devices}",
        )
    return nodes


def start(nodes: Nodes, arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run `lora` with these arguments in as many processes as `nodes` says, to their end; return
    what is to be changed where a rank has asked to be started again.

    Raise LoraError or SystemExit as the rank did that failed first, and LoraError where the other
    machines do not come.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    if nodes.machines > 1:
        host, _, port = nodes.endpoint.rpartition(":")
        ports.refuse_mute(host.strip("[]"), int(port))
    with files.scratch_folder() as folder, _passing_on(folder), _environment(nodes, folder):
        try:
            launched = elastic_launch(_configure(nodes, folder), sys.executable)
            with _tamed_agent():
                launched("-m", "lora_cli", *arguments)
        except SignalException as heard:
            sys.exit(128 + heard.sigval)
        except ChildFailedError as failed:
            if (folder / ranks.AGAIN).is_file():
                asked: dict[str, Any] = files.read_json(folder / ranks.AGAIN)
                return asked
            _raise_failure(folder, failed.failures)
        except RendezvousError as error:
            raise LoraError(
                f"the {nodes.machines} machines did not all come to {nodes.endpoint} within "
                f"{PATIENCE} s: {str(error).partition(chr(10))[0]}",
                "start the same command on each, and look whether they reach that port",
            ) from None
    return None


@contextmanager
def _tamed_agent() -> Iterator[None]:
    """Keep the agent from its own account of all that ranks say, and let it kill the others where
    one has failed: their step is torn, and nothing of it may be saved."""
    from torch.distributed.elastic.multiprocessing import api

    before, disabled = api._get_default_signal, logging.root.manager.disable
    api._get_default_signal = api._get_kill_signal
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        api._get_default_signal = before
        logging.disable(disabled)


def _configure(nodes: Nodes, folder: Path) -> LaunchConfig:
    """Return what torch's agent is told."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=nodes.machines,
        max_nodes=nodes.machines,
        nproc_per_node=nodes.processes,
        run_id=nodes.id,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint,
        rdzv_configs={"join_timeout": PATIENCE, "read_timeout": PATIENCE},
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs")),
        # else the machine's own name, which others have to know
        local_addr="localhost" if nodes.endpoint.startswith(LOOPBACK) else None,
        shutdown_timeout=GRACE,
        # what it was started to ignore (nohup) ends nothing
        signals_to_handle=",".join(
            each.name for each in endings.NUMBERS if signal.getsignal(each) != signal.SIG_IGN
        ),
    )


@contextmanager
def _environment(nodes: Nodes, folder: Path) -> Iterator[None]:
    """Let the ranks know where to leave what they fail of, and share the processors."""
    threads = max(1, (os.cpu_count() or 1) // nodes.processes)
    given = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    given = {name: value for name, value in given.items() if name not in os.environ}
    given[ranks.FAILURES] = str(folder)
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _passing_on(folder: Path) -> Iterator[None]:
    """Pass SIGUSR1 on to a rank that listens, and to nobody before one does."""
    if SAVE is None:
        yield
        return

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        for path in folder.glob(f"{ranks.LISTENING}*"):
            with suppress(ProcessLookupError):
                os.kill(int(path.name.removeprefix(ranks.LISTENING)), SAVE)

    before = signal.signal(SAVE, pass_on)
    try:
        yield
    finally:
        signal.signal(SAVE, before)


def _raise_failure(folder: Path, failures: dict[int, Any]) -> NoReturn:
    """Say what the rank said that failed by itself, and end with its status.

    The agent's order of failures is by whole seconds: ranks that ended because another had gone
    say so themselves.
    """
    told = {int(path.stem): Failure.read(path) for path in folder.glob("[0-9]*.json")}
    own = {rank: failure for rank, failure in told.items() if not failure.torn}
    if own:
        failure = own[min(own)]
        ui.say(*failure.lines)
        sys.exit(failure.status)
    # in the order in which they were found, so that those that were killed for it come last
    silent = [rank for rank in failures if rank not in told]
    if not silent:
        raise LoraError(
            "the processes on this machine lost their peers on another one",
            "what went wrong is said there",
        )
    rank, ended = silent[0], failures[silent[0]]
    if ended.exitcode in ENDED_BY_SIGNAL:  # one of them heard it, and all have saved
        sys.exit(ended.exitcode)
    how = f"status {ended.exitcode}"
    if ended.exitcode < 0:
        how = signal.Signals(-ended.exitcode).name
    given = [word for word in sys.argv[1:] if word != "--resume"]
    raise LoraError(
        f"process {rank} of this run ended by {how}, and the others with it",
        "SIGKILL is the system's where memory runs out (dmesg | tail); --resume goes on from the "
        f"last checkpoint: {quote_words(['lora', *given])} --resume",
    )
