"""Dequantise a stranger's GGUF file: the program that `gguf_reading.py` runs in a process of its
own, once `gguf_header_program.py` has looked through the file.

It imports torch and transformers before its limits begin; the hub is never asked, and one thread
works: each takes room of its own.
"""

from __future__ import annotations

import errno
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from gguf import GGUFReader

from lora_cli.common import LoraError, RejectedError
from lora_cli.models import gguf_rope, gguf_tokenizer, gguf_weights

LONGEST = 1000
"""Characters of an error's text that are passed on."""


def handle(shared: None, job: list[Any]) -> dict[str, Any]:
    """Write the model of the GGUF file in the folder `alone` into `folder`, with its tokenizer, and
    check it. A job is `[what errors call the file, alone, folder, how many numbers it holds]`.

    Returns `{"dtype", "matrices"}`; `{"ours": [kind, message, hint]}` for an error of this
    program's, `{"theirs": [kind, words, errno, file]}` for one of a library's.
    """
    shown, alone, folder = map(Path, job[:3])
    torch.set_num_threads(1)
    try:
        reader = GGUFReader(alone / gguf_weights.ALONE)
        dtype = gguf_weights.choose_dtype(reader)
        mend = partial(gguf_rope.put_scaling, shown, reader)
        gguf_weights.write_weights(shown, alone, folder, dtype, job[3], mend)
        gguf_tokenizer.write_tokenizer(alone, reader, folder)
        matrices = gguf_weights.check_weights(shown, reader, folder, dtype)
    except LoraError as error:
        kind = "rejected" if isinstance(error, RejectedError) else "refused"
        return {"ours": [kind, error.message, error.hint]}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers' is no Exception
        return {"theirs": describe(error)}
    return {"dtype": str(dtype).removeprefix("torch."), "matrices": matrices}


def describe(error: BaseException) -> list[Any]:
    """Return the kind of a library's error, its words, its number where it is the system's, and its
    file, or the module that is missing. Raises MemoryError for all that mean this."""
    said = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if told := re.search(r"\(os error (\d+)\)", said):  # of libraries in Rust
        number = int(told[1])
    no_memory = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
    if isinstance(error, MemoryError) or number == errno.ENOMEM or any(map(said.count, no_memory)):
        raise MemoryError
    file = getattr(error, "filename" if isinstance(error, OSError) else "name", None)
    return [type(error).__name__, " ".join(said.split())[:LONGEST], number, file]
