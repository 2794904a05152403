"""`lora doctor`: check that what is installed computes what it should, and is what lora uses.

What a recipe needs is tried, not looked up: a matrix product per device and type, PEFT and
bitsandbytes against the reference, a file on each disk. A check that cannot even run is a problem
with the exception as its text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lora_cli import __version__
from lora_cli.common import LoraError, files, quote, threads, ui
from lora_cli.doctor import device_checks
from lora_cli.doctor.finding import TESTED, Check, name_fix, read_tested_versions
from lora_cli.gguf import ggml, tools

PACKAGE = "lora-cli"
LITTLE_DISK = 5e9
"""Bytes of free disk below which a run may not get through: checkpoints, a merged model, a GGUF."""
BUSY = 50
"""Percent of the processors that other work takes, above which a run is far slower."""


def run_doctor(show_oracle: bool, as_json: bool, prepare: Callable[[], None]) -> bool:
    """Run every check and print the findings; whether there was no problem. `prepare` quiets the
    libraries."""
    checks: list[Check] = []
    deviations: list[Any] = []
    for check in run_checks(deviations, prepare):
        checks.append(check)
        if not as_json:
            ui.report(*_format_check(check))
    problems = [check for check in checks if check.status == "problem"]
    if as_json:
        found = [
            each._asdict()
            | {"ok": each.ok, "value": None if math.isnan(each.value) else each.value}
            for each in deviations
        ]
        ui.report_json(
            {"ok": not problems, "checks": [each._asdict() for each in checks], "oracle": found}
        )
        return not problems
    if show_oracle and deviations:
        from lora_cli.doctor import oracle

        ui.report("", *oracle.format_deviations(deviations))
    notes = sum(check.status == "note" for check in checks)
    ui.say("", f"problems: {len(problems)}, notes: {notes}")
    return not problems


def _format_check(check: Check) -> list[str]:
    """Return the lines of a finding: status, name and text, folded to the terminal's width, and the
    command that mends it."""
    lines = [f"{check.status:7}  {check.name}: {check.said}"]
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        lines = textwrap.wrap(
            lines[0],
            width,
            subsequent_indent=" " * 9,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return [*lines, f"{'':7}  -> {check.fix}"] if check.fix else lines


def run_checks(deviations: list[Any], prepare: Callable[[], None]) -> Iterator[Check]:
    """Run every check and yield its findings; what the oracle measures is added to `deviations`."""
    yield Check(
        "lora",
        "ok",
        f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}",
    )
    yield from _try_check("versions", check_versions)
    yield from _try_check("libraries", lambda: _import_libraries(prepare))
    yield from _try_check("devices", device_checks.check_devices)
    yield from _try_check("oracle", lambda: check_oracle(deviations))
    yield from _try_check("4-bit", check_four_bit)
    yield from _try_check("training", device_checks.check_training)
    yield from _try_check("llama.cpp", check_tools)
    yield from _try_check("disk", check_disk)
    yield from _try_check("cache", check_cache)
    yield from _try_check("memory", check_memory)
    yield from _try_check("threads", check_threads)


def _try_check(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Yield the findings of `check`; an exception becomes a finding too."""
    try:
        yield from check()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        fix = f"python -m pip install -r {quote(TESTED)}"
        yield Check(name, "problem", f"cannot be tried: {type(error).__name__}: {said}", fix)


# Versions -----------------------------------------------------------------------------------------


def check_versions() -> Iterator[Check]:
    """Check each package lora asks for: whether it is installed, in range, and the version that was
    tested."""
    from packaging.requirements import Requirement

    tested = read_tested_versions()
    try:
        asked = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            PACKAGE,
            "problem",
            "is not installed, only its source is here",
            "python -m pip install -e .",
        )
        asked = [
            name for name in tested if _find_version(name)
        ]  # the ranges stand in what is missing
    as_tested = []
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, check = requirement.name, _check_version(requirement, tested.get(requirement.name))
        if check is None:
            as_tested.append(f"{name} {tested[name]}")
        else:
            yield check
    if as_tested:
        yield Check("versions", "ok", f"as tested: {', '.join(as_tested)}")


def _find_version(name: str) -> str | None:
    """Return the version of a package; None where it is not, or only partly, installed."""
    try:
        return importlib.metadata.version(name) or None
    except (
        importlib.metadata.PackageNotFoundError,
        KeyError,
    ):  # KeyError: a folder without its metadata
        return None


def _check_version(requirement: Any, tested: str | None) -> Check | None:
    """Return the finding for one package; None when it is the tested version."""
    wanted = f"{requirement.name}=={tested}" if tested else str(requirement)
    fix = f"python -m pip install {quote(wanted)}"
    installed = _find_version(requirement.name)
    if installed is None:
        again = fix.replace("install", "install --force-reinstall")
        return Check(requirement.name, "problem", "is not, or not wholly, installed", again)
    public = installed.partition("+")[0]  # 2.13.0+cpu is the build of a version, not another one
    if not requirement.specifier.contains(public, prereleases=True):
        return Check(
            requirement.name, "problem", f"{installed} is not {requirement.specifier}", fix
        )
    if tested is None:
        return Check(requirement.name, "ok", installed)
    return (
        None
        if public == tested
        else Check(requirement.name, "note", f"{installed}, tested with {tested}", fix)
    )


def _import_libraries(prepare: Callable[[], None]) -> Iterator[Check]:
    """Import everything a run imports."""
    started = time.perf_counter()
    prepare()
    import lora_cli.train.run  # noqa: F401

    yield Check("libraries", "ok", f"imported in {time.perf_counter() - started:.1f} s")


# PEFT and bitsandbytes ----------------------------------------------------------------------------


def check_oracle(deviations: list[Any]) -> Iterator[Check]:
    """Compare PEFT's layers and bitsandbytes' NF4 with the papers' formulas, on the CPU and the
    first accelerator."""
    from lora_cli.doctor import oracle

    for device in device_checks.list_device_names()[:2]:
        for name, compare in oracle.measure_deviations(device).items():
            yield from _try_check(name, partial(_check_group, name, device, compare, deviations))


def _check_group(
    name: str, device: str, compare: Callable[[], Iterator[Any]], deviations: list[Any]
) -> Iterator[Check]:
    """One group of comparisons: as published, or the first that are not."""
    from lora_cli.doctor import oracle

    group = oracle.find_worst(compare())
    deviations += group
    if wrong := [each for each in group if not each.ok]:
        shown = "; ".join(
            f"{each.pair} {each.measure} {each.value:.1e} (limit {each.limit:.0e})"
            for each in wrong[:3]
        )
        yield Check(
            name, "problem", f"not what was published: {shown}", name_fix("peft", "bitsandbytes")
        )
    elif name == "NF4":
        share = max(each.value for each in group if each.measure == "scale codes")
        yield Check(
            name, "ok", f"on {device} as published; {share:.1%} of the scales' 8-bit codes differ"
        )
    else:
        yield Check(
            name,
            "ok",
            f"on {device} as published, to {oracle.find_largest(each.value for each in group):.1e}",
        )


def check_four_bit() -> Iterator[Check]:
    """Report what bitsandbytes gets wrong on this processor, which lora refuses in recipes."""
    from lora_cli.doctor import oracle
    from lora_cli.models import four_bit

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*autograd kernel was not registered"
        )  # what is being asked
        bare = oracle.compare_qlora(protected=False)["gradients"]
    if bare <= oracle.SINGLE:
        yield Check("4-bit gradients", "ok", "right, also after an evaluation")
    else:
        said = (
            f"bitsandbytes by itself is off by {bare:.0%} after an evaluation; lora prevents that"
        )
        yield Check("4-bit gradients", "note", said)
    misread = [length for length in range(16, 513, 16) if four_bit.misreads_rows(length)]
    if misread:
        shown = ", ".join(map(str, misread[:4]))
        said = f"bitsandbytes misreads rows of {shown}, … weights on this processor; "
        said += "lora refuses such bases"
        yield Check("4-bit rows", "note", said)
    else:
        yield Check("4-bit rows", "ok", "read right at every length up to 512")


# Tools, disk, memory ------------------------------------------------------------------------------


def check_tools() -> Iterator[Check]:
    """Check what exporting needs beyond a recipe (so notes only): the converter, an engine to open
    the result in, and its quantiser."""
    try:
        yield Check("llama.cpp converter", "ok", str(tools.find_converter()))
    except (LoraError, OSError, UnicodeDecodeError) as error:
        fix = error.hint if isinstance(error, LoraError) else "lora setup-llama-cpp"
        yield Check("llama.cpp converter", "note", str(error), fix)
    try:
        engine = importlib.import_module("xllamacpp")
        yield Check(
            "llama.cpp engine", "ok", f"xllamacpp {getattr(engine, '__version__', '')}".strip()
        )
        ggml.Ggml()
        yield Check("llama.cpp quantiser", "ok", "ggml's, in xllamacpp")
    except ImportError as error:
        said = f"GGUF files can be neither verified nor run, and K-quants not be made: {error}"
        yield Check("llama.cpp engine", "note", said, "python -m pip install xllamacpp")
    except LoraError as error:
        yield Check("llama.cpp quantiser", "note", error.message, error.hint)


def check_disk() -> Iterator[Check]:
    """Check the room where runs and downloads go, by writing a file there."""
    from datasets import config
    from huggingface_hub import constants

    folders = {
        "this folder": Path.cwd(),
        "models": Path(constants.HF_HUB_CACHE),
        "data sets": Path(config.HF_DATASETS_CACHE),
    }
    for name, folder in folders.items():
        elsewhere = "work in another folder" if name == "this folder" else "export HF_HOME=FOLDER"
        place = next(parent for parent in (folder, *folder.parents) if parent.exists())
        try:
            with tempfile.TemporaryFile(dir=place):
                free = shutil.disk_usage(place).free
        except OSError as error:
            yield Check(
                f"disk for {name}",
                "problem",
                f"{folder} cannot be written to: {error.strerror}",
                elsewhere,
            )
            continue
        little = free < LITTLE_DISK
        said, fix = f"{free / 1e9:.1f} GB free at {folder}", f"make room, or {elsewhere}"
        yield Check(f"disk for {name}", "note" if little else "ok", said, fix if little else None)


def check_cache() -> Iterator[Check]:
    """Report how large lora's own cache is."""
    from lora_cli.doctor import cached

    total, bases = map(cached.format_size, cached.measure_cache())
    said = f"{total} in {files.find_cache_home()}, {bases} of it bases made of GGUF files"
    yield Check("cache", "ok", f"{said}; lora cache lists them")


def check_memory() -> Iterator[Check]:
    """Report the RAM, and what of it is free."""
    import psutil

    ram = psutil.virtual_memory()
    yield Check(
        "memory",
        "ok",
        f"{ram.available / 1e9:.1f} of {ram.total / 1e9:.1f} GB free",
    )


def check_threads() -> Iterator[Check]:
    """Report torch's threads, how they wait, and whether other work keeps the processors busy."""
    import psutil
    import torch

    num, waiting = torch.get_num_threads(), threads.describe_waiting()
    said = f"{num} on {os.cpu_count()} processors, waiting {waiting}"
    busy = psutil.cpu_percent(interval=0.5)
    if busy < BUSY:
        yield Check("threads", "ok", said)
        return
    fewer = "OMP_NUM_THREADS=1 lora train …, or " if num > 1 else ""
    said = f"{said}; other work takes {busy:.0f}% of them"
    yield Check("threads", "note", said, f"{fewer}end the other work")
