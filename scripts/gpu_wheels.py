"""Fill a folder with what `make gpu` needs on a machine with an NVIDIA GPU and no network: wheels,
and the tiny model.

    python scripts/gpu_wheels.py .gpu [--tiny build/tiny]

The wheels are for Python 3.12 on Linux, x86-64: all that lora-cli needs, in the versions of
lora_cli/constraints.txt, but for the four packages that are too large to travel and that a machine
with PyTorch has. Those that the benchmark compares with come in the newest version that was looked
at. bitsandbytes is packed again with the library of one CUDA version. At the end every requirement
of every wheel is checked against what travels.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parent.parent
PYTHON = "3.12"
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 26, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
THERE = {"torch": "2.11.0", "numpy": "2.5.2", "pandas": None, "pyarrow": None, "triton": None}
"""What is on such a machine and stays there, with its version where it was seen."""
PEERS = {"liger-kernel": "0.8.5", "cut-cross-entropy": "25.1.1"}
"""What is only measured beside lora; lora itself needs neither, so constraints.txt has neither."""
CUDA = "130"
"""The CUDA version of that machine's torch, as bitsandbytes names its libraries."""
LIMIT = 55 << 20
"""Bytes that may travel."""
MARKERS = {
    "python_version": PYTHON,
    "python_full_version": f"{PYTHON}.3",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
    "extra": "",
}


def read_pins() -> dict[str, str]:
    """Return the tested version of each package, by its normalised name."""
    lines = (ROOT / "lora_cli/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line.partition(" #")[0]) for line in lines if line and line[0] != "#"]
    return {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins} | PEERS


def list_needs(lines: list[str]) -> Iterator[Requirement]:
    """Yield the requirements among `lines` that hold on the other machine."""
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(dict(MARKERS)):
            yield requirement


def read_needs(wheel: Path) -> list[str]:
    """Return the lines Requires-Dist of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    return [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]


def find_wheels(folder: Path) -> dict[str, tuple[str, Path]]:
    """Return version and file of each package whose wheel is in the folder."""
    found = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, *_ = parse_wheel_filename(path.name)
        found[str(name)] = (str(version), path)
    return found


def download(pins: dict[str, str], names: set[str], folder: Path) -> None:
    """Fetch the wheels of these packages, without what they need."""
    if unknown := sorted(name for name in names if name not in pins):
        raise SystemExit(f"constraints.txt pins no version of {', '.join(unknown)}")
    where = [f"--platform={platform}" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *where]
    subprocess.run([*command, *(f"{name}=={pins[name]}" for name in sorted(names))], check=True)


def collect(folder: Path) -> None:
    """Fetch all that lora-cli and its peers need, and what that needs in turn."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins, asked = read_pins(), list(list_needs(project["dependencies"]))
    wanted = {canonicalize_name(each.name) for each in asked} | PEERS.keys()
    while missing := wanted - find_wheels(folder).keys() - THERE.keys():
        download(pins, missing, folder)
        for name in missing:
            _, wheel = find_wheels(folder)[name]
            needs = list_needs(read_needs(wheel))
            wanted |= {canonicalize_name(each.name) for each in needs}


def repack(wheel: Path, kept: tuple[str, ...]) -> None:
    """Replace a wheel by one whose shared libraries are only those named, with the hashes of its
    RECORD."""
    made = wheel.with_suffix(".part")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as new:
        lines, record = list[str](), ""
        for entry in old.infolist():
            name = entry.filename
            if name.endswith(".dist-info/RECORD"):
                record = name
            elif not name.endswith(".so") or Path(name).name in kept:
                content = old.read(name)
                digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
                new.writestr(entry, content, zipfile.ZIP_DEFLATED)
                lines.append(f"{name},sha256={digest.rstrip('=')},{len(content)}")
        there = {Path(line.split(",")[0]).name for line in lines}
        if lacking := set(kept) - there:
            raise SystemExit(f"{wheel.name} has no {', '.join(sorted(lacking))}")
        new.writestr(record, "\n".join([*lines, f"{record},,"]) + "\n")
    made.replace(wheel)


def find_unmet(folder: Path) -> list[str]:
    """Return in words the requirements of the folder's wheels that neither travel nor are there."""
    carried, unmet = find_wheels(folder), []
    for name, (_, wheel) in carried.items():
        for need in list_needs(read_needs(wheel)):
            wanted = canonicalize_name(need.name)
            version = carried[wanted][0] if wanted in carried else THERE.get(wanted)
            known = wanted in carried or wanted in THERE
            if not known or (version and not need.specifier.contains(version, prereleases=True)):
                unmet.append(f"{name} needs {need}, and there is {version or 'none'}")
    return unmet


def main() -> None:
    """Fill the folder anew, and say how large it is and what is lacking."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", type=Path, default=ROOT / "build/tiny")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    collect(options.folder)
    _, wheel = find_wheels(options.folder)["bitsandbytes"]
    # the one for processors is small, and lets the wheels be tried without a GPU
    repack(wheel, (f"libbitsandbytes_cuda{CUDA}.so", "libbitsandbytes_cpu.so"))
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d"]
    subprocess.run([*build, options.folder.absolute()], check=True, cwd=ROOT, capture_output=True)
    shutil.copytree(options.tiny, options.folder / "tiny")
    size = sum(each.stat().st_size for each in options.folder.rglob("*") if each.is_file())
    unmet = find_unmet(options.folder)
    for line in unmet:
        print(f"note: {line}")
    print(f"{options.folder}: {len(find_wheels(options.folder))} wheels, {size / 1e6:.1f} MB")
    if size > LIMIT:
        raise SystemExit(f"more than {LIMIT >> 20} MiB: that is too much to travel")


if __name__ == "__main__":
    main()
