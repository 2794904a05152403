"""Open a GGUF in llama.cpp in a process of its own, and compute a token with it:
`python opening.py FILE CONTEXT fast|exact [ADAPTER]`.

llama.cpp ends the process it runs in where it meets what it holds impossible: a shape that its code
for an architecture does not know, or a file that was damaged. So each file is opened once where
that costs nothing, and what is said there is read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import traceback
import urllib.request
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, children

MEND = "export it again; if it was made by a newer llama.cpp: pip install -U xllamacpp"
REASONS = (
    r" E (?:\w+: )?(.+)",
    r"(GGML_ASSERT\(.+)",
    r"([\w-]+\.(?:cpp|c|h):\d+: .+)",
    r"what\(\): +(.+)",
    r"RuntimeError: (.+)",
)
"""How llama.cpp says why it fails, the most telling first."""


def import_xllamacpp() -> Any:
    """Import the engine's package. Raises LoraError where it is not installed."""
    try:
        import xllamacpp
    except ModuleNotFoundError as error:
        if error.name != "xllamacpp":
            raise
        raise LoraError(
            "running a GGUF needs xllamacpp, which is not installed", "pip install 'lora-cli[gguf]'"
        ) from error
    return xllamacpp


SECONDS, SECONDS_PER_GB = 10, 30
"""Processor time for opening a file: a template in it may run for ever. A model of 1 GB takes 4 s
with all its tensors checked."""


def make_params(xlc: Any, path: Path, n_ctx: int, exact: bool, adapter: Path | None) -> Any:
    """Return llama.cpp's parameters for a model and `n_ctx` tokens; `exact`: with a float32 KV
    cache, without flash attention, and every tensor checked. Threads are as many as OMP_NUM_THREADS
    allows, as torch's are; without it, one for each processor."""
    params = xlc.CommonParams()
    # its threads spin while they wait for each other: with two on one free processor an answer took
    # five times as much of it as with one
    allowed = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if allowed.isdecimal() and int(allowed):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(allowed)
    params.n_ctx = n_ctx
    params.model.path = str(path)
    params.warmup, params.n_gpu_layers = False, 0
    if exact:
        params.cache_type_k = params.cache_type_v = xlc.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xlc.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.check_tensors = True
    if adapter is not None:
        params.lora_adapters = [xlc.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return params


def refuse_unopenable(path: Path, n_ctx: int, exact: bool, adapter: Path | None = None) -> None:
    """Raise LoraError, with llama.cpp's own words, where it cannot open a GGUF for `n_ctx` tokens
    and compute one with it, or ends its process over it."""
    import_xllamacpp()
    about = [each.stat() for each in (path, adapter) if each is not None]
    if adapter is not None:
        refuse_unopenable(path, n_ctx, exact)
    _try_once(path, n_ctx, exact, adapter, *[(each.st_mtime_ns, each.st_size) for each in about])


@cache
def _try_once(
    path: Path, n_ctx: int, exact: bool, adapter: Path | None, *_state: tuple[int, int]
) -> None:
    # ggml's own way of showing where it stopped is a debugger
    plain = {"PYTHONPATH": _find_search_path(), "GGML_NO_BACKTRACE": "1", "PYTHONUTF8": "1"}
    words = [path, n_ctx, "exact" if exact else "fast", *([adapter] if adapter else [])]
    done = children.run(
        [sys.executable, "-P", __file__, *map(str, words)],
        env={**os.environ, **plain},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        judged = adapter or path
        raise LoraError(f"llama.cpp cannot load {judged}: {find_reason(done.stderr, done)}", MEND)


def _find_search_path() -> str:
    """Return PYTHONPATH for a process that finds this package, installed or not."""
    here = str(Path(__file__).parent.parent.parent)
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


def find_reason(said: str, done: subprocess.CompletedProcess[str]) -> str:
    """Find in what llama.cpp said why it failed."""
    for pattern in REASONS:
        if found := re.search(pattern, said):
            return found[1].strip()
    if -done.returncode == getattr(signal, "SIGPROF", None):
        return "that takes too long"
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"it ended with exit {done.returncode}"


def ask(address: str, key: str, route: str, body: Mapping[str, Any] | None = None) -> Any:
    """Open the reply of llama.cpp's server to a GET, or to a POST of `body`. Raises
    urllib.error.HTTPError."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    # a proxy set in the environment must not get the requests to this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(urllib.request.Request(address + route, data, headers))


def open_alone() -> None:
    """Load the file that the command line names, and compute a token."""
    path, n_ctx, how, *adapter = sys.argv[1:]
    if hasattr(signal, "setitimer"):
        most = SECONDS + SECONDS_PER_GB * Path(path).stat().st_size / 1e9
        signal.setitimer(signal.ITIMER_PROF, most)
    xlc = import_xllamacpp()
    lora = Path(adapter[0]) if adapter else None
    params = make_params(xlc, Path(path), int(n_ctx), how == "exact", lora)
    key = secrets.token_hex()
    params.api_keys = [key]
    params.verbosity = 1
    server = xlc.Server(params)
    with ask(server.listening_address, key, "/completion", {"prompt": [0], "n_predict": 1}):
        pass
    # a server that is closed before its threads have begun waits for them for ever
    os._exit(0)


def main() -> None:
    """Open the file, and end at once in any case."""
    try:
        open_alone()
    except Exception:  # noqa: BLE001 – its words are read by the process that asked
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
