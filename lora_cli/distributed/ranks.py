"""The processes that train together, one *rank* each: what the first one knows, and all do.

A rank that did something by itself - another step, a stop, a smaller batch - would leave the others
waiting for it. So what a run hangs on is found by the first rank and handed on, or summed over all.
Only the first rank writes files and speaks.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_cli.common import LoraError, files, ui
from lora_cli.distributed import ports
from lora_cli.distributed.place import Place

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

MEETING = timedelta(seconds=60)
"""How long ranks that are started wait for each other."""
SILENCE = timedelta(seconds=600)
"""How long a rank waits for the others amid the training before it takes them for dead."""
PREPARING = timedelta(days=7)
"""How long it waits for the first one to prepare the data, which may be a hub's."""
PARTING = timedelta(seconds=2)
"""How long a rank that ends by an error waits for the first one to record that."""
PIECE = 64 << 20
"""Bytes that are handed over at a time."""
FAILURES = "LORA_FAILURES"
"""Environment variable: the folder in which ranks leave what they failed of, for our launcher."""
AGAIN = "again.json"
"""File there: what the launcher is to change before it starts all ranks again."""
LISTENING = "listening-"
"""File there, of the process that listens to signals."""
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG, Linux

_place: Place | None = None
_store: Store | None = None
_runs, _turns = itertools.count(), itertools.count()
Given = TypeVar("Given")


def count() -> int:
    """Return how many processes train together."""
    return _place.world if _place else 1


def number() -> int:
    """Return which of them this is, counted from 0."""
    return _place.rank if _place else 0


def is_first() -> bool:
    """Return whether this is the one that writes and speaks, as it is where it is the only one."""
    return number() == 0


@contextmanager
def joined(place: Place | None) -> Iterator[None]:
    """Be one of several processes inside the block, or the only one. Raises LoraError where the
    others do not come."""
    global _place, _store
    if place is None:
        yield
        return
    _end_with_parent()
    with ui.hush() if place.rank else nullcontext():
        _place = place
        _store = _meet(place)
        try:
            yield
            part()
        except (KeyboardInterrupt, SystemExit):  # all end after the same step
            part()
            raise
        finally:  # or gloo's threads may end a process that has ended
            import torch.distributed

            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _end_with_parent() -> None:
    """Let the end of the launcher, by kill -9 too, be this process's SIGTERM. Elsewhere than on
    Linux nothing does that."""
    if platform.system() == "Linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


def _meet(place: Place) -> Store:
    """Return the store that the ranks share."""
    import torch.distributed

    if place.rank:
        ports.refuse_mute(place.address, place.port)
    with _named(place):
        try:
            store, *_ = next(
                torch.distributed.rendezvous("env://", place.rank, place.world, timeout=MEETING)
            )
        except torch.distributed.DistError as error:
            raise LoraError(
                f"process {place.rank} of {place.world} cannot meet the others at {place.address}:"
                f"{place.port} within {MEETING.seconds} s: {str(error).partition(chr(10))[0]}",
                "is the first one running, and may this machine reach that port?",
            ) from None
    return store


@contextmanager
def _named(place: Place) -> Iterator[None]:
    """Let the environment say the place inside: outside, a library would join a group at the first
    sight of it, alone."""
    os.environ |= place.to_environment()
    try:
        yield
    finally:
        for name in place.to_environment():
            os.environ.pop(name, None)


@contextmanager
def told() -> Iterator[None]:
    """Say nothing inside that our launcher has said, which has done the same before."""
    with ui.hush() if _place and FAILURES in os.environ else nullcontext():
        yield


def begin(found: Mapping[str, Any]) -> None:
    """Hand on what this rank, the first, has found, as JSON; then all are a group."""
    if _store is not None:
        _store.set(_name_found(), json.dumps(found))
        _form_group()


def follow() -> dict[str, Any]:
    """Return what the first rank has found; then all are a group."""
    assert _store is not None
    name = _name_found()
    _store.wait([name], PREPARING)
    found: dict[str, Any] = json.loads(_store.get(name))
    _form_group()
    return found


def _name_found() -> str:
    """Return the name, in the store, of what is found for the next run of these processes."""
    return f"found-{next(_runs)}"


def _form_group() -> None:
    import torch
    import torch.distributed

    from lora_cli.common import devices

    if torch.distributed.is_initialized():  # of a run before
        return
    assert _place is not None
    assert _store is not None
    os.environ |= _place.to_environment()  # accelerate and transformers read them
    backend = "gloo"
    if devices.find_device().type == "cuda":
        torch.cuda.set_device(_place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        torch.distributed.init_process_group(
            backend,
            store=torch.distributed.PrefixStore("group", _store),
            rank=_place.rank,
            world_size=_place.world,
            timeout=SILENCE,
        )
    except RuntimeError as error:
        if "device.cc" not in str(error):
            raise
        raise LoraError(  # this machine's own, and not that a peer is gone
            f"the processes find no network to speak over: {str(error).rpartition('. ')[2]}",
            "unset GLOO_SOCKET_IFNAME, or name an interface that `ip link` shows",
        ) from None


@contextmanager
def in_turn() -> Iterator[None]:
    """Let the first process of each machine do what is inside before the others do, so that they
    find it done."""
    if _place is None or _store is None:
        yield
        return
    name = f"turn-{next(_turns)}-{_place.rank - _place.local_rank}"
    if _place.local_rank:
        _store.wait([name], PREPARING)
    yield
    if not _place.local_rank:
        _store.set(name, b"")


def add_up(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks of a tensor, on its device and without waiting for it."""
    if count() > 1:
        import torch.distributed

        torch.distributed.all_reduce(numbers)
    return numbers


def find_largest(numbers: Sequence[int]) -> list[int]:
    """Return the largest that any rank has of each of some whole numbers."""
    if count() == 1:
        return list(numbers)
    import torch

    largest = torch.tensor(numbers)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return [int(each) for each in largest.tolist()]


def gather(given: Given) -> list[Given]:
    """Return what each rank gives, on the first one; an empty list on others."""
    if count() == 1:
        return [given]
    import torch.distributed

    gathered: list[Any] | None = [None] * count() if is_first() else None
    torch.distributed.gather_object(given, gathered)
    return gathered or []


def share(given: Given) -> Given:
    """Return what the first rank gives, on all."""
    if count() == 1:
        return given
    import torch.distributed

    shared = [given]
    torch.distributed.broadcast_object_list(shared)
    return shared[0]


@contextmanager
def fetched(folder: Path | None, mark: bytes | None) -> Iterator[Path | None]:
    """Give a folder of the first rank, which is at the same place here or, on machines that do not
    share its disk, a copy that goes away; None where the first gives None.

    `mark` tells what the folder is here; None where it is not, or not whole.
    """
    lacks = folder is not None and mark != share(mark)
    if folder is None or not any(find_largest([lacks])):
        yield folder
        return
    with files.scratch_folder() as scratch:
        copies = share(gather(str(scratch)))
        assert _place is not None
        copy = Path(copies[_place.rank - _place.local_rank]) / folder.name
        writes = lacks and _place.local_rank == 0
        for name, data in _hand_over(folder):
            if writes:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                with (copy / name).open("ab") as file:
                    file.write(data)
        part()
        yield copy if lacks else folder
        part()


def _hand_over(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the first rank's files of a folder on all ranks, in pieces, by their names in it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file()) if is_first() else []
    names = share([str(path.relative_to(folder)) for path in found])
    for name in names:
        with (folder / name).open("rb") if is_first() else nullcontext() as file:
            while True:
                piece = share(file.read(PIECE) if file else b"")
                yield name, piece
                if len(piece) < PIECE:
                    break


def part() -> None:
    """Wait until all have come here, the first rank once it has written everything: where one has
    ended, a launcher ends the others. Raises where one is gone."""
    find_largest([0])


def tell_failure(lines: Sequence[str], status: int, error: BaseException) -> bool:
    """Leave what a rank says of its end to the launcher, or say it if no other has said anything;
    return whether there was anybody to leave it to.

    A rank whose peer is gone has nothing to say that the peer has not.
    """
    if _place is None:
        return False
    torn = is_torn(error)
    if folder := os.environ.get(FAILURES):
        told = {"lines": list(lines), "status": status, "torn": torn}
        with suppress(OSError):  # the launcher may be gone
            files.write_json(Path(folder) / f"{number()}.json", told)
    else:
        time.sleep(1.0 if torn else 0.0)
        with suppress(RuntimeError):
            if _store is None or _store.add("told", 1) == 1:
                ui.say(f"process {number()} of {count()}:", *lines)
    with suppress(RuntimeError):  # the store may have gone with the first rank
        if _store is not None and is_first():
            _store.set("ended", b"")
        elif _store is not None and not torn:
            _store.wait(["ended"], PARTING)
    return True


def may_start_again() -> bool:
    """Return whether the launcher starts the ranks again where one asks it to: it is ours, and
    alone."""
    return _place is not None and FAILURES in os.environ and _place.local_world == _place.world


def ask_to_start_again(changed: Mapping[str, Any]) -> None:
    """Leave to the launcher what is to be changed, as JSON, before it starts all ranks again; then
    end by an error."""
    assert may_start_again()
    files.write_json(Path(os.environ[FAILURES]) / AGAIN, changed)


def is_torn(error: BaseException | None) -> bool:
    """Return whether an error is that another rank has gone."""
    import torch.distributed

    while error is not None:
        said = str(error)
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in said:
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def note_listening() -> None:
    """Tell the launcher that this process, the first of its machine, listens to signals: what one
    is asked, all do."""
    folder = os.environ.get(FAILURES)
    if _place is not None and folder and _place.local_rank == 0:
        files.write_text(Path(folder) / f"{LISTENING}{os.getpid()}", "")
