"""Install llama.cpp's converters, and build its quantiser, into the managed copy that `llama_cpp.py` searches last.

The converters are three things of one revision (two scripts, `conversion/`, `gguf-py/`). The source package of
llama-cpp-python carries all three together with the C++ source, so pip fetches it: from the index pip is configured
for, checked against one sha256. Everything lands under its final name by one rename, so processes may race.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from lora_cli.common import LoraError, format_duration, say
from lora_cli.gguf.tools import (
    CONVERTER,
    QUANTIZER,
    VERSION,
    find_last_line,
    find_managed_home,
    find_missing_part,
    run_command,
)

SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of llama_cpp_python-<VERSION>.tar.gz, 77 MB."""

# Of the archive's 4000 files: the converters, and the part of the source that llama-quantize is made of.
KEEP = re.compile(
    r"LICENSE|convert_(hf|lora)_to_gguf\.py|(conversion|gguf-py|cmake|include|src)/.+|CMakeLists\.txt"
    r"|ggml/(CMakeLists\.txt|(cmake|include)/.+|src/(ggml-cpu/[^/]+\.h|[^/]+))|tools/quantize/[^/]+"
    r"|common/(build-info\.h|build-info\.cpp\.in|common\.h|log\.h|imatrix-loader\.(h|cpp))|vendor/(.+/)?CMakeLists\.txt|vendor/hash/.+"
)

# llama.cpp's own target compiles its whole `common` library (chat templates, HTTP, downloads) and the CPU backend:
# four times the work, none of which quantising uses. The files it writes are the same, byte for byte.
CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.14...3.28)
project(lora-llama-quantize C CXX)
add_subdirectory(${LLAMA_CPP} llama.cpp EXCLUDE_FROM_ALL)
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")
configure_file(${LLAMA_CPP}/common/build-info.cpp.in build-info.cpp)
add_executable(llama-quantize ${LLAMA_CPP}/tools/quantize/main.cpp ${LLAMA_CPP}/tools/quantize/quantize.cpp
               ${LLAMA_CPP}/common/imatrix-loader.cpp left_out.cpp ${CMAKE_CURRENT_BINARY_DIR}/build-info.cpp)
target_include_directories(llama-quantize PRIVATE ${LLAMA_CPP}/common)
target_link_libraries(llama-quantize PRIVATE llama)
set_target_properties(llama-quantize PROPERTIES RUNTIME_OUTPUT_DIRECTORY "$<1:${CMAKE_BINARY_DIR}/bin>")
"""
# Of the rest of `common`, what llama-quantize and its reader of importance matrices call: its log as plain stderr, and
# a function for an option that `quantize` never passes.
LEFT_OUT = """\
#include <cstdarg>
#include "common.h"
#include "log.h"
int common_log_get_verbosity_thold() { return LOG_LEVEL_ERROR; }
struct common_log * common_log_main() { return nullptr; }
void common_log_add(struct common_log *, enum ggml_log_level, const char * format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
}
bool string_parse_kv_override(const char *, std::vector<llama_model_kv_override> &) {
    fprintf(stderr, "this llama-quantize was built without --override-kv\\n");
    return false;
}
"""
# One static program that runs on any machine of this kind: no tuning to this CPU, no GPU, no network libraries.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    **dict.fromkeys(("GGML_NATIVE", "GGML_CPU", "GGML_METAL", "GGML_BLAS", "GGML_OPENMP", "GGML_CCACHE"), "OFF"),
    **dict.fromkeys(("GGML_ALL_WARNINGS", "LLAMA_ALL_WARNINGS"), "OFF"),
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": f"llama-cpp-python-{VERSION}",
}


def install_converters() -> Path:
    """Install both converters and the quantiser's source (8 MB) into the managed copy; returns its folder.

    Does nothing where they are. Downloads 77 MB. Raises LoraError when pip fails or brings another archive.
    """
    home = find_managed_home()
    if not find_missing_part(home / CONVERTER):
        return home
    say(f"downloading llama.cpp (source package of llama-cpp-python {VERSION}, 77 MB)")
    started = time.monotonic()
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".llama.cpp-", dir=home.parent) as folder:
        fresh = Path(folder) / "llama.cpp"
        _unpack(_download_source(Path(folder)), fresh)
        _rename(fresh, home)
    say(f"llama.cpp's converters are in {home} ({format_duration(time.monotonic() - started)})")
    return home


def install_quantizer() -> Path:
    """Build `llama-quantize` into the managed copy (two minutes of CPU time); returns the program.

    Installs the converters first where they are not: it is the same source. Does nothing where it is built. Raises
    LoraError before anything is downloaded when there is no C++ compiler, and with the end of the log when the build
    fails.
    """
    program = find_managed_home() / "bin" / QUANTIZER
    if program.is_file():
        return program
    if not _has_compiler():
        raise LoraError("building llama-quantize needs a C++ compiler, and none was found", _name_compiler_command())
    home, started = install_converters(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=home) as folder:
        built = _build(Path(folder), home)
        program.parent.mkdir(exist_ok=True)
        built.replace(program)
    say(f"llama-quantize is in {program} ({format_duration(time.monotonic() - started)})")
    return program


def _download_source(folder: Path) -> Path:
    """The source package, by pip. Stated with its hash, so that pip runs nothing of an archive that is not ours."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    command = _pip("download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), "-r", str(wanted))
    code, lines = run_command(command, "downloading")
    if code:
        raise _explain_pip(f"llama-cpp-python {VERSION}", lines)
    return folder / f"llama_cpp_python-{VERSION}.tar.gz"


def _unpack(sdist: Path, target: Path) -> None:
    """The files of KEEP from `sdist`, below `target`. Raises LoraError when its sha256 is another one."""
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if digest != SHA256:
        raise LoraError(
            f"{sdist.name} is not the archive it should be: its sha256 is {digest}, expected {SHA256}",
            "try again; if it stays so, ask who runs the package index or its mirror: pip config list",
        )
    top = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(top)
            if name != member.name and member.isfile() and KEEP.fullmatch(name):
                archive.extract(member.replace(name=name), target, filter="data")


def _rename(fresh: Path, home: Path) -> None:
    """Give `fresh` its final name, unless another process was first."""
    if home.is_dir() and find_missing_part(home / CONVERTER):
        home.rename(fresh.with_name("incomplete"))  # goes away with the temporary folder
    try:
        fresh.rename(home)
    except OSError:
        if find_missing_part(home / CONVERTER):
            raise


def _build(folder: Path, home: Path) -> Path:
    """Compile `llama-quantize` in `folder` from the source in `home`; the log stays in `home`."""
    (folder / "CMakeLists.txt").write_text(CMAKE_LISTS, encoding="utf-8")
    (folder / "left_out.cpp").write_text(LEFT_OUT, encoding="utf-8")
    env = _build_tools(folder / "tools")
    cmake = shutil.which("cmake", path=env["PATH"])
    assert cmake is not None
    configure = [cmake, "-S", str(folder), "-B", str(folder / "build"), f"-DLLAMA_CPP={home.as_posix()}"]
    configure += [f"-D{name}={value}" for name, value in OPTIONS.items()]
    if os.name != "nt":
        # Quantising itself is C; the C++ around it compiles faster and runs no slower at -O1.
        configure += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]
        configure += ["-G", "Ninja"] if shutil.which("ninja", path=env["PATH"]) else []
    build = [cmake, "--build", str(folder / "build"), "--config", "Release", "--target", "llama-quantize"]
    build += ["--parallel", str(os.cpu_count() or 1)]
    log = home / "build-llama-quantize.log"
    log.unlink(missing_ok=True)
    for command in (configure, build):
        code, lines = run_command(command, "building llama-quantize", env, log)
        if code:
            tail = "\n  ".join([line for line in lines if line.strip()][-12:])
            raise LoraError(
                f"building llama-quantize failed; the end of {log}:\n  {tail}",
                f"if the compiler is old or incomplete: {_name_compiler_command()}; "
                f"a llama.cpp built by hand works as well: "
                "--llama-cpp DIR",
            )
    built = folder / "build" / "bin" / QUANTIZER
    _, said = run_command([str(built), "--help"], "trying llama-quantize")
    if not any("Q4_K_M" in line for line in said):
        raise LoraError(f"the llama-quantize just built does not run: {find_last_line(said)}", f"see {log}")
    return built


def _build_tools(target: Path) -> dict[str, str]:
    """Environment in which cmake and a builder (make or ninja) are found: pip's own copies where there are none."""
    env = {"PATH": os.environ.get("PATH", os.defpath), "NINJA_STATUS": "[%p] "}
    lacking = [] if shutil.which("cmake") else ["cmake"]
    if os.name != "nt" and not shutil.which("make") and not shutil.which("ninja"):
        lacking.append("ninja")
    if lacking:
        say(f"fetching {' and '.join(lacking)} for the build")
        code, lines = run_command(_pip("install", "--target", str(target), *lacking), "fetching")
        if code:
            raise _explain_pip(" and ".join(lacking), lines)
        env["PATH"] = os.pathsep.join([str(target / "bin"), env["PATH"]])
        env["PYTHONPATH"] = str(target)
    return env


def _pip(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def _explain_pip(what: str, lines: list[str]) -> LoraError:
    said = find_last_line(lines)
    if "No module named pip" in said:
        return LoraError(f"this Python has no pip to fetch {what} with", f"{sys.executable} -m ensurepip")
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        return LoraError(f"the package index offers another {what} than the expected one (sha256)", "pip config list")
    return LoraError(
        f"pip could not fetch {what}: {said}",
        "check the network and `pip config list`, or point LLAMA_CPP_DIR at a llama.cpp checkout",
    )


def _has_compiler() -> bool:
    """Whether a C++ compiler is installed, as far as that can be told without running cmake."""
    if platform.system() == "Darwin":  # /usr/bin/c++ is always there and asks for the tools when run
        return subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode == 0
    if os.name == "nt":
        installer = Path(os.environ.get("PROGRAMFILES(X86)", "C:/")) / "Microsoft Visual Studio/Installer/vswhere.exe"
        return installer.is_file() or shutil.which("cl") is not None
    named = os.environ.get("CXX", "").split()[:1]
    return any(shutil.which(name) for name in [*named, "c++", "g++", "clang++"])


def _name_compiler_command() -> str:
    """The one command that installs a C++ compiler here."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    if os.name == "nt":
        workload = "Microsoft.VisualStudio.Workload.VCTools"
        return f'winget install Microsoft.VisualStudio.2022.BuildTools --override "--passive --wait --add {workload}"'
    managers = {
        "apt-get": "install -y g++",
        "dnf": "install -y gcc-c++",
        "apk": "add g++",
        "pacman": "-S --noconfirm gcc",
    }
    known = [f"sudo {manager} {arguments}" for manager, arguments in managers.items() if shutil.which(manager)]
    return known[0] if known else "install g++ or clang with the system's package manager"
