"""Run a GGUF in llama.cpp itself, through xllamacpp (the `gguf` extra).

xllamacpp starts llama.cpp's own server inside this process, on a free port of 127.0.0.1. Here it is
closed to everybody else by a random key, and spoken to with the calls of llama.cpp's
tools/server/README.md: GET /props (chat template, special tokens), GET /v1/models (`meta`: sizes),
POST /tokenize, POST /apply-template, POST /completion (`prompt` as token ids, so that nothing is
added to it; `n_probs` for log-probabilities).
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import urllib.error
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from lora_cli.common import LoraError
from lora_cli.gguf import opening, tools

NEUTRAL = {
    "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "dry_multiplier": 0.0,
    "xtc_probability": 0.0, "typical_p": 1.0, "mirostat": 0, "ignore_eos": False,
}  # fmt: skip
"""Settings of samplers that can pass over the likeliest token, where they do not. A file may bring
others (`general.sampling.…`)."""
CONTEXT = 4096
"""Tokens of prompt and answer together, unless more are asked for."""


class GGUFModel:
    """A loaded GGUF. Use as a context manager, or `close()` it: it holds the model in memory, a
    port and threads."""

    def __init__(
        self,
        path: Path,
        n_ctx: int = CONTEXT,
        gpu_layers: int = 0,
        exact: bool = False,
        adapter: Path | None = None,
    ) -> None:
        """Load `path` without a word on stderr.

        `n_ctx`: tokens of prompt and answer together (0: what the model was trained for, which can
        be a lot of memory). `gpu_layers`: layers put on the GPU by a GPU build of xllamacpp (-1:
        all). `exact`: to compare a model with a reference, since flash attention reads K and V as
        float16, which alone moves log-probabilities of a float32 model by 1e-2 (6e-5 with `exact`);
        values that are not finite are then refused. `adapter`: a GGUF of a LoRA adapter, applied at
        full strength. Raises LoraError when xllamacpp is not installed or llama.cpp cannot load the
        file.
        """
        if not tools.is_whole_gguf(path, with_tensors=False):
            raise LoraError(f"{path} is not a GGUF file", "copy it again, or export it again")
        xlc = opening.import_xllamacpp()
        opening.refuse_unopenable(path, n_ctx, exact, adapter)
        params = opening.make_params(xlc, path, n_ctx, exact, adapter)
        params.n_gpu_layers = gpu_layers
        self._key = secrets.token_hex()
        params.api_keys = [self._key]
        self.path = path
        self._server = _load_server(xlc, params)
        props = self._ask("/props")
        self.metadata: Mapping[str, Any] = {
            "ftype": props["model_ftype"],
            **self._ask("/v1/models")["data"][0]["meta"],
        }
        """What llama.cpp says of the model: `ftype`, `n_vocab`, `n_ctx_train`, `n_embd`,
        `n_params`, `size` (bytes)."""
        self.chat_template: str = props["chat_template"]
        """The GGUF's embedded chat template; llama.cpp's default (ChatML) where it has none."""
        self.settings: Mapping[str, Any] = props["default_generation_settings"]["params"]
        self.bos_token: str = props["bos_token"]
        self.eos_token: str = props["eos_token"]

    @property
    def takes_likeliest(self) -> bool:
        """Whether at temperature 0 the likeliest token is taken each time."""
        return all(self.settings.get(name) == NEUTRAL[name] for name in NEUTRAL)

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Return the token ids of `text`; special tokens written out in it count as such.

        `add_special` adds what the GGUF says comes around a prompt (BOS for a Llama).
        """
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self._ask("/tokenize", body)["tokens"]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of token ids as an answer would have it; special tokens are written
        out."""
        return self._ask("/detokenize", {"tokens": list(ids)})["content"]

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
    ) -> str:
        """Render the prompt for `messages` (`role`, `content`) and `tools` by the embedded chat
        template, ready for an answer.

        llama.cpp takes a leading BOS out of the text, since it adds one when it tokenises:
        `complete(render(…))` and `tokenize(render(…))` have exactly one.
        """
        asked: dict[str, Any] = {"messages": [dict(message) for message in messages]}
        return self._ask("/apply-template", asked | ({"tools": list(tools)} if tools else {}))[
            "prompt"
        ]

    def complete(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Return the answer to `prompt`, up to an end-of-generation token (left out) or
        `max_new_tokens`; see `stream`."""
        return self.write(prompt, max_new_tokens, temperature, seed)[0]

    def write(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> tuple[str, bool]:
        """Return the answer to `prompt`, and whether it ended by itself, and not at
        `max_new_tokens`; see `stream`."""
        pieces = list(self._walk_pieces(prompt, max_new_tokens, temperature, seed))
        text = "".join(piece["content"] for piece in pieces)
        return text, pieces[-1].get("stop_type") in ("eos", "word")

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer piece by piece, as it is made; dropping the iterator stops llama.cpp.

        `prompt` as token ids is taken as it is. A text gets the GGUF's BOS unless it starts with
        it. `temperature` 0 is greedy; above, llama.cpp's usual samplers apply as well (top-k 40,
        top-p 0.95, min-p 0.05). Raises LoraError when the prompt does not fit into `n_ctx` or holds
        ids outside the vocabulary.
        """
        for piece in self._walk_pieces(prompt, max_new_tokens, temperature, seed):
            yield piece["content"]

    def _walk_pieces(
        self, prompt: str | Sequence[int], max_new_tokens: int, temperature: float, seed: int
    ) -> Iterator[dict[str, Any]]:
        body = {"n_predict": max_new_tokens, "temperature": temperature, "seed": seed}
        return self.write_pieces(self.encode(prompt), body)

    def write_pieces(
        self, prompt: Sequence[int], body: Mapping[str, Any]
    ) -> Generator[dict[str, Any]]:
        """Yield llama.cpp's own pieces of the answer to a prompt; the last has `stop_type`.
        Dropping the iterator stops llama.cpp.

        `body`: more of what POST /completion takes. Raises LoraError as `stream` does.
        """
        asked = {**body, "prompt": list(prompt), "stream": True}
        with self._open("/completion", asked) as reply:
            for line in reply:
                if line.startswith(b"data: "):
                    piece = json.loads(line.removeprefix(b"data: "))
                    if "error" in piece:
                        raise LoraError(f"llama.cpp stopped answering: {_read_message(piece)}")
                    yield piece

    def logprobs(self, prompt_ids: Sequence[int]) -> list[float]:
        """Return natural-log probabilities of the token after `prompt_ids`, one per token id of the
        whole vocabulary.

        No temperature and no sampler has touched them. llama.cpp works them out in float32, where a
        probability below 1e-45 is 0: such tokens all get the logarithm of that, -103.3, which keeps
        a divergence finite.
        """
        n_vocab = self.metadata["n_vocab"]
        body = {"prompt": list(prompt_ids), "n_predict": 1, "n_probs": n_vocab, "temperature": 0.0}
        # llama.cpp drops the probabilities of a step whose chosen token is not whole UTF-8 (a byte
        # of an emoji), so it is made to choose "a". The probabilities are taken from the raw
        # logits, which the bias does not reach.
        body["logit_bias"] = [[self.tokenize("a", add_special=False)[-1], 1e9]]
        rows = self._ask("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        least = math.log(2.0**-149)
        logprobs = [least] * n_vocab
        for row in rows:
            logprobs[row["id"]] = max(
                row["logprob"], least
            )  # log(0) comes as the lowest float32, -3.4e38
        return logprobs

    def close(self) -> None:
        """Free the model, the port and the threads. The model cannot be used afterwards."""
        self._server = None

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Return a prompt as token ids; a text gets the GGUF's BOS unless it begins with it."""
        if not isinstance(prompt, str):
            return list(prompt)
        has_bos = bool(self.bos_token) and prompt.startswith(self.bos_token)
        return self.tokenize(prompt, add_special=not has_bos)

    def _ask(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._open(route, body) as reply:
            return json.load(reply)

    def _open(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        """Open the reply to a GET, or to a POST of `body`."""
        assert self._server is not None, "used after close()"
        try:
            return opening.ask(self._server.listening_address, self._key, route, body)
        except urllib.error.HTTPError as error:
            raise LoraError(f"llama.cpp refused: {_read_message(json.load(error))}") from error


def _load_server(xlc: Any, params: Any) -> Any:
    """Start the server, without a word on stderr."""
    params.verbosity = -1
    with _silence_stderr():
        try:
            return xlc.Server(params)
        except RuntimeError as error:
            raise LoraError(
                f"llama.cpp cannot load {params.model.path} for {params.n_ctx} tokens: {error}",
                "it was opened for fewer: ask for less, or free memory",
            ) from error


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Send file descriptor 2, where C++ writes, nowhere for a while."""
    sys.stderr.flush()
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _read_message(reply: Mapping[str, Any]) -> str:
    """Read llama.cpp's own words in an error reply."""
    return reply["error"]["message"]
