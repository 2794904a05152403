"""Build llama.cpp's own `llama-quantize`, for comparing our quantiser with it
(tests/gguf/test_quantize_bytes.py).

    python scripts/build_llama_quantize.py        -> build/llama-quantize/llama-quantize

It takes the source from the package that `lora setup-llama-cpp` takes the converters from, and
needs cmake and a C++ compiler: a minute on two cores. Nothing that a user runs needs this program.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from lora_cli.gguf import install
from lora_cli.gguf.tools import VERSION

PROGRAM = Path("build/llama-quantize/llama-quantize")

# llama.cpp's own target compiles its whole `common` library (chat templates, HTTP, downloads) and
# the CPU backend: four times the work, none of which quantising uses. The files it writes are the
# same, byte for byte.
CMAKE_LISTS = """\
cmake_minimum_required(VERSION 3.14...3.28)
project(lora-llama-quantize C CXX)
add_subdirectory(${LLAMA_CPP} llama.cpp EXCLUDE_FROM_ALL)
set(BUILD_COMPILER "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}")
set(BUILD_TARGET "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")
configure_file(${LLAMA_CPP}/common/build-info.cpp.in build-info.cpp)
add_executable(llama-quantize
               ${LLAMA_CPP}/tools/quantize/main.cpp ${LLAMA_CPP}/tools/quantize/quantize.cpp
               ${LLAMA_CPP}/common/imatrix-loader.cpp left_out.cpp
               ${CMAKE_CURRENT_BINARY_DIR}/build-info.cpp)
target_include_directories(llama-quantize PRIVATE ${LLAMA_CPP}/common)
target_link_libraries(llama-quantize PRIVATE llama)
set_target_properties(llama-quantize PROPERTIES
                      RUNTIME_OUTPUT_DIRECTORY "$<1:${CMAKE_BINARY_DIR}/bin>")
"""
# Of the rest of `common`, what llama-quantize and its reader of importance matrices call: its log
# as plain stderr, and a function for an option that the comparison never passes.
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
# One static program that runs on any machine of this kind: no tuning to this CPU, no GPU, no
# network libraries.
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    **dict.fromkeys(
        ("GGML_NATIVE", "GGML_CPU", "GGML_METAL", "GGML_BLAS", "GGML_OPENMP", "GGML_CCACHE"), "OFF"
    ),
    **dict.fromkeys(("GGML_ALL_WARNINGS", "LLAMA_ALL_WARNINGS"), "OFF"),
    # Quantising itself is C; the C++ around it compiles faster and runs no slower at -O1.
    "CMAKE_CXX_FLAGS_RELEASE": "-O1 -DNDEBUG",
    "LLAMA_BUILD_NUMBER": "0",
    "LLAMA_BUILD_COMMIT": f"llama-cpp-python-{VERSION}",
}


def main() -> None:
    """Fetch the source, compile it in a folder that goes away, keep the program."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = unpack(install._download_source(folder), folder)
        (folder / "CMakeLists.txt").write_text(CMAKE_LISTS, encoding="utf-8")
        (folder / "left_out.cpp").write_text(LEFT_OUT, encoding="utf-8")
        options = [f"-D{option}={value}" for option, value in OPTIONS.items()]
        subprocess.run(
            ["cmake", "-S", folder, "-B", folder / "build", f"-DLLAMA_CPP={source}", *options],
            check=True,
        )
        parallel = ["--parallel", str(os.cpu_count() or 1)]
        subprocess.run(
            ["cmake", "--build", folder / "build", "--target", "llama-quantize", *parallel],
            check=True,
        )
        PROGRAM.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / "build" / "bin" / "llama-quantize", PROGRAM)


def unpack(archive: Path, folder: Path) -> Path:
    """llama.cpp's source, out of the package whose sha256 pip has checked."""
    top = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
    with tarfile.open(archive) as opened:
        opened.extractall(
            folder, [each for each in opened if each.name.startswith(top)], filter="data"
        )
    return folder / top


if __name__ == "__main__":
    main()
