"""What llama.cpp makes of some texts: the program that `gguf_in_llama.py` runs in a process of its
own, which llama.cpp ends where a file is not what it holds possible. xllamacpp and the standard
library only: `python llama_program.py FILE SECONDS BYTES`, with JSON on stdin and stdout; it ends
after so much processor time, and takes so much memory beside its imports.

Asked `[[text, whether special tokens come around it], …]`, it answers `[{"ids": token ids,
"logprobs": natural logarithms after the last one, one for each token of the vocabulary}, …]`.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import urllib.request
from typing import Any

LEAST = math.log(2.0**-149)
"""What stands for the logarithm of 0."""


def open_server(file: str, key: str) -> Any:
    """Load a GGUF file into llama.cpp's server, on a free port of this machine, closed to all who
    lack the key; attention keeps keys and values in float32, so that it computes what torch does.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.chat_template = "chatml"  # prompts come rendered, and the file's is a stranger's program
    params.n_ctx, params.warmup, params.n_gpu_layers, params.verbosity = 512, False, 0, -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.api_keys = [key]
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    return xllamacpp.Server(params)


def limit(seconds: int, memory: int) -> None:
    """Let the system end this process after so much more processor time, and give it so many more
    bytes; not on Windows, and the bytes on Linux alone."""
    try:
        import resource
    except ImportError:
        return
    used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    most = int(used) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard < 0 else min(most, hard), hard))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - pathlib takes long
            held = int(file.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = held + memory
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def main() -> None:
    """Answer what is asked on stdin."""
    import xllamacpp  # noqa: F401 - before the limits

    limit(*map(int, sys.argv[2:4]))
    key = secrets.token_hex()
    server = open_server(sys.argv[1], key)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(route: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        address = server.listening_address + route
        with opener.open(urllib.request.Request(address, data, headers)) as reply:
            return json.load(reply)

    def tokenize(text: str, special: bool) -> list[int]:
        asked = {"content": text, "add_special": special, "parse_special": True}
        return ask("/tokenize", asked)["tokens"]

    num_tokens = ask("/v1/models")["data"][0]["meta"]["n_vocab"]
    # a step whose chosen token is not whole UTF-8 is told without probabilities, so that it is made
    # to choose a letter; what is told was taken before that
    letter = [[tokenize("a", False)[-1], 1e9]]
    answers = []
    for text, special in json.load(sys.stdin):
        ids = tokenize(text, special)
        body = {"prompt": ids, "n_predict": 1, "n_probs": num_tokens, "temperature": 0.0}
        found = ask("/completion", body | {"logit_bias": letter})["completion_probabilities"][0]
        logprobs = [LEAST] * num_tokens
        for row in found["top_logprobs"]:
            logprobs[row["id"]] = max(row["logprob"], LEAST)
        answers.append({"ids": ids, "logprobs": logprobs})
    json.dump(answers, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # a server that is closed before its threads have begun waits for them for ever


if __name__ == "__main__":
    main()
