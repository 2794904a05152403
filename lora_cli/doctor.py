"""`lora doctor`: does what is installed on this machine compute what it should, and is what lora uses there?

Each check is tried, not looked up: a matrix product per device and type, PEFT and bitsandbytes against the reference. A
check that cannot even run is a problem with the exception as its text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from packaging.requirements import Requirement

from lora_cli import __version__, llama_cpp, ui

PACKAGE = "lora-cli"
TESTED = Path(__file__).parent / "constraints.txt"
LITTLE_DISK = 5e9
"""Bytes of free disk below which a run may not get through: checkpoints, a merged model, a GGUF."""


class Check(NamedTuple):
    """One finding: `problem` where a recipe would fail or go wrong, `note` for what one should know."""

    name: str
    status: Literal["ok", "note", "problem"]
    said: str
    fix: str | None = None


def doctor(show_oracle: bool, as_json: bool, prepare: Callable[[], None]) -> bool:
    """Run every check and print the findings; whether there was no problem. `prepare` quiets the libraries."""
    checks: list[Check] = []
    deviations: list[Any] = []
    for check in run(deviations, prepare):
        checks.append(check)
        if not as_json:
            print(_line(check), flush=True)
    problems = [check for check in checks if check.status == "problem"]
    if as_json:
        found = [deviation._asdict() | {"ok": deviation.ok} for deviation in deviations]
        print(json.dumps({"ok": not problems, "checks": [check._asdict() for check in checks], "oracle": found}))
        return not problems
    if show_oracle and deviations:
        from lora_cli import oracle

        print("\n" + oracle.table(deviations))
    notes = sum(check.status == "note" for check in checks)
    ui.say(f"\nproblems: {len(problems)}, notes: {notes}")
    return not problems


def _line(check: Check) -> str:
    """Status, name and text, folded to the terminal's width; the command that mends it on a line of its own."""
    text = f"{check.status:7}  {check.name}: {check.said}"
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
    return f"{text}\n{'':7}  -> {check.fix}" if check.fix else text


def run(deviations: list[Any], prepare: Callable[[], None]) -> Iterator[Check]:
    """Every check, as it is made; what the oracle measured is added to `deviations`."""
    yield Check("lora", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform(terse=True)}")
    yield from versions()
    yield from _tried("libraries", lambda: _import_libraries(prepare))
    yield from _tried("devices", devices)
    yield from _tried("oracle", lambda: oracle_checks(deviations))
    yield from _tried("4-bit", four_bit)
    yield from _tried("llama.cpp", tools)
    yield from _tried("disk", disk)
    yield from _tried("memory", memory)


def _tried(name: str, check: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """The findings of `check`; what it raises is a finding too."""
    try:
        yield from check()
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        fix = f"python -m pip install -r {TESTED}"
        yield Check(name, "problem", f"cannot be tried: {type(error).__name__}: {said}", fix)


# Versions -----------------------------------------------------------------------------------------------------------


def versions() -> Iterator[Check]:
    """Each package lora asks for: installed, in the range it asks for, and the version that was tested?"""
    tested = tested_versions()
    try:
        asked = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(PACKAGE, "problem", "is not installed, only its source is here", "python -m pip install -e .")
        asked = [f"{name}=={version}" for name, version in tested.items()]
    as_tested, good = [], True
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, check = requirement.name, _version(requirement, tested.get(requirement.name))
        if check is None:
            as_tested.append(f"{name} {tested[name]}")
        else:
            good = good and check.status != "problem"
            yield check
    if as_tested:
        yield Check("versions", "ok", f"as tested: {', '.join(as_tested)}")


def tested_versions() -> dict[str, str]:
    """Package -> version of the tested set, for this Python."""
    lines = [line.partition(" #")[0] for line in TESTED.read_text().splitlines() if line and line[0] != "#"]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: next(iter(pin.specifier)).version for pin in pins}


def _version(requirement: Requirement, tested: str | None) -> Check | None:
    """What is to be said of one package; None when it is the tested version."""
    wanted = f"{requirement.name}=={tested}" if tested else str(requirement)
    fix = f"python -m pip install '{wanted}'"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, "problem", "is not installed", fix)
    public = installed.partition("+")[0]  # 2.13.0+cpu is the build of a version, not another one
    if not requirement.specifier.contains(public, prereleases=True):
        return Check(requirement.name, "problem", f"{installed} is not {requirement.specifier}", fix)
    if tested is None:
        return Check(requirement.name, "ok", installed)
    return None if public == tested else Check(requirement.name, "note", f"{installed}, tested with {tested}", fix)


def _import_libraries(prepare: Callable[[], None]) -> Iterator[Check]:
    """Everything a run imports."""
    started = time.perf_counter()
    prepare()
    importlib.import_module("lora_cli.train")
    yield Check("libraries", "ok", f"imported in {time.perf_counter() - started:.1f} s")


# Devices ------------------------------------------------------------------------------------------------------------


def device_names() -> list[str]:
    """`cpu` and every accelerator, as torch names them."""
    import torch

    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(count))]


def devices() -> Iterator[Check]:
    """A matrix product and its gradient on every device in every type, against float64 on the CPU."""
    import torch

    for device in device_names():
        times, broken = {}, {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            try:
                times[name] = matmul_seconds(device, dtype)
            except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
                broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if "float32" in broken:
            yield Check(device, "problem", f"float32: {broken['float32']}", _tested_fix("torch"))
        else:
            ratios = [f"{name} ({times[name] / times['float32']:.2g}x the time)" for name in times if name != "float32"]
            yield Check(device, "ok", f"works in {', '.join(['float32', *ratios])}{_device_memory(device)}")
        for name in broken.keys() - {"float32"}:
            yield Check(device, "note", f"{name} does not work: {broken[name]}", "--set model.dtype=float32")


def matmul_seconds(device: str, dtype: Any) -> float:
    """The time of one product of two 512x512 matrices with its gradient. AssertionError if the result is wrong."""
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator).to(dtype) for _ in range(2))
    exact_product, exact_gradient = left.double() @ right.double(), torch.ones(512, 512).double() @ right.double().T
    one, other = left.to(device).requires_grad_(), right.to(device)
    best = float("inf")
    for _ in range(5):
        one.grad, started = None, time.perf_counter()
        product = one @ other
        product.backward(torch.ones_like(product))
        found = (product.detach().cpu().double(), one.grad.cpu().double())
        best = min(best, time.perf_counter() - started)
    limit = 8 * torch.finfo(dtype).eps
    for exact, value in zip((exact_product, exact_gradient), found):
        off = ((value - exact).abs().max() / exact.abs().max()).item()
        assert off <= limit, f"a product is off by {off:.1e} of its largest value"
    return best


def _device_memory(device: str) -> str:
    import torch

    if not device.startswith("cuda"):
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"; {torch.cuda.get_device_name(device)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


# PEFT and bitsandbytes ----------------------------------------------------------------------------------------------


def oracle_checks(deviations: list[Any]) -> Iterator[Check]:
    """PEFT's layers and bitsandbytes' NF4 against the papers' formulas, on the CPU and the first accelerator."""
    from lora_cli import oracle

    for device in device_names()[:2]:
        found = oracle.worst(list(oracle.deviations(device)))
        deviations += [each._replace(pair=f"{each.pair} ({device})") for each in found]
        for name in ("LoRA, rsLoRA, DoRA", "QLoRA", "NF4"):
            group = [each for each in found if _group(each.pair) == name]
            if wrong := [each for each in group if not each.ok]:
                pairs = [f"{each.pair} {each.measure} {each.value:.1e} (limit {each.limit:.0e})" for each in wrong[:3]]
                said = f"on {device} not what was published: {', '.join(pairs)}"
                yield Check(name, "problem", said, _tested_fix("peft", "bitsandbytes"))
            elif group:
                yield Check(name, "ok", f"on {device} as published: {_agreement(name, group)}")


def _group(pair: str) -> str:
    return "NF4" if pair == "NF4" else "QLoRA" if pair.endswith("QLoRA") else "LoRA, rsLoRA, DoRA"


def _agreement(name: str, group: list[Any]) -> str:
    """How near, in words; shares for NF4, whose codes are equal or not."""
    if name == "NF4":
        share = next(each.value for each in group if each.measure == "scale codes")
        return f"equal codes and scales, {share:.1%} of the scales' own codes differ"
    return f"to {max(each.value for each in group):.1e} ({len({each.pair for each in group})} kinds of layer)"


def _tested_fix(*names: str) -> str:
    tested = tested_versions()
    return "python -m pip install " + " ".join(f"{name}=={tested[name]}" for name in names)


def four_bit() -> Iterator[Check]:
    """What bitsandbytes gets wrong on this processor, and lora keeps away from recipes."""
    from lora_cli import model, oracle

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autograd kernel was not registered")  # what is being asked
        bare = oracle.compare_qlora(protected=False)["gradients"]
    if bare <= oracle.SINGLE:
        yield Check("4-bit gradients", "ok", "right, also after an evaluation")
    else:
        said = f"bitsandbytes by itself is off by {bare:.0%} after an evaluation; lora prevents that"
        yield Check("4-bit gradients", "note", said)
    misread = [length for length in range(16, 513, 16) if model.misreads(length)]
    if misread:
        shown = ", ".join(map(str, misread[:4]))
        said = f"bitsandbytes misreads rows of {shown}, … weights on this processor; lora refuses such bases"
        yield Check("4-bit rows", "note", said)
    else:
        yield Check("4-bit rows", "ok", "read right at every length up to 512")


# Tools, disk, memory ------------------------------------------------------------------------------------------------


def tools() -> Iterator[Check]:
    """What exporting needs beyond a recipe: converter, quantiser, and an engine to open the result in."""
    for name, find, fix in (
        ("converter", llama_cpp.search_converter, "lora setup-llama-cpp"),
        ("quantiser", llama_cpp.search_quantizer, "lora setup-llama-cpp --quantizer"),
    ):
        found = find()
        missing = "not found; lora export-gguf needs it" + (" for K-quants" if name == "quantiser" else "")
        yield Check(f"llama.cpp {name}", "ok" if found else "note", str(found or missing), None if found else fix)
    if importlib.util.find_spec("xllamacpp"):
        yield Check("llama.cpp engine", "ok", f"xllamacpp {importlib.metadata.version('xllamacpp')}")
    else:
        said = "not installed; GGUF files can be neither verified nor run"
        yield Check("llama.cpp engine", "note", said, "python -m pip install xllamacpp")


def disk() -> Iterator[Check]:
    """Room where runs and downloads go, and leave to write there."""
    from huggingface_hub import constants

    for name, folder in (("this folder", Path.cwd()), ("models' cache", Path(constants.HF_HUB_CACHE))):
        place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            yield Check("disk", "problem", f"{name}, {place}, cannot be written to", f"chmod u+w {place}")
        else:
            little = free < LITTLE_DISK
            said, fix = f"{free / 1e9:.1f} GB free for {name}, {place}", "make room, or set HF_HOME to another disk"
            yield Check("disk", "note" if little else "ok", said, fix if little else None)


def memory() -> Iterator[Check]:
    """RAM, and what of it is free."""
    import psutil

    ram = psutil.virtual_memory()
    yield Check(
        "memory", "ok", f"{ram.available / 1e9:.1f} of {ram.total / 1e9:.1f} GB free, {os.cpu_count()} processors"
    )
