"""A stand-in for Ollama, which no package index has: `create` and `run`, and nothing else.

    ollama create NAME -f MODELFILE
    ollama run NAME PROMPT

It reads a Modelfile as strictly as Ollama does (docs/modelfile.md, parser/parser.go) and shares no
code with lora's own reader; opens the GGUF that FROM names in llama.cpp; and asks it what TEMPLATE
makes of SYSTEM and the prompt, with the parameters that the file has. So a Modelfile that says the
wrong thing gives another answer, or none.

What it is not: Ollama. Of Go's templates it knows `range .Messages`, `if eq .Role "…"` and its
`else`, `.Role` and `.Content`. What it does not know it refuses. Where the file names no
temperature it takes the likeliest token, and Ollama draws.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

INSTRUCTIONS = {
    "from", "license", "template", "system", "adapter", "draft", "renderer", "parser", "parameter", "message", "requires",
}  # fmt: skip
KNOWN = {"from", "license", "template", "system", "parameter"}
"""Those of the instructions that this program does something with, or can leave alone."""
PARAMETERS: dict[str, tuple[str, Callable[[str], object]]] = {
    "stop": ("stop", str), "temperature": ("temperature", float), "num_predict": ("n_predict", int),
    "seed": ("seed", int), "top_k": ("top_k", int), "top_p": ("top_p", float), "min_p": ("min_p", float),
    "repeat_penalty": ("repeat_penalty", float), "repeat_last_n": ("repeat_last_n", int), "num_ctx": ("n_ctx", int),
}  # fmt: skip
"""Ollama's parameters: llama.cpp's name and the kind of each."""
LONGEST = 200
"""Tokens of an answer where the file does not say; Ollama goes on to the end of the context."""
Turn = Mapping[str, str]
Node = str | tuple[str, str, list]


def read_modelfile(text: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction, in small letters, with its value; `parameter NAME` for one of those.
    Raises ValueError."""
    rest = text.removeprefix("\ufeff")
    while rest := rest.lstrip(" \t\r\n"):
        if rest[0] == "#":
            rest = re.sub(r"^[^\r\n]*", "", rest, count=1)
            continue
        word = re.match(r"([A-Za-z]+)[ \t]", rest)
        if word is None or word[1].lower() not in INSTRUCTIONS:
            raise ValueError(f"no instruction of Ollama's: {rest.splitlines()[0]!r}")
        name, rest = word[1].lower(), rest[word.end() :]
        if name == "parameter":
            key = re.match(r"(\w+)[ \t]", rest, re.A)
            if key is None:
                raise ValueError(f"PARAMETER without a name: {rest.splitlines()[0]!r}")
            name, rest = f"parameter {key[1]}", rest[key.end() :]
        value, rest = cut_value(rest)
        yield name, value


def cut_value(text: str) -> tuple[str, str]:
    """The value that a text begins with, and what comes after it: up to the first line's end at
    which quotes that were opened are closed. Raises ValueError."""
    for end in [*(found.start() for found in re.finditer(r"[\r\n]", text)), len(text)]:
        kept = "".join(each for each in text[:end] if each.isprintable() or each in "\t\r\n")
        value = kept.strip()
        mark = '"""' if value.startswith('"""') else '"' if value.startswith('"') else ""
        if len(value) >= 2 * len(mark) and value.endswith(mark):
            return value[len(mark) : len(value) - len(mark)], text[end:]
    raise ValueError(f"quotes that are opened and not closed: {text[:20]!r}")


def parse_template(text: str) -> list[Node]:
    """The nodes of a Go template: texts, and (kind, argument, nodes inside). Raises ValueError for
    what is no template, or beyond this program."""
    root: list[Node] = []
    open_at: list[tuple[str, list[Node]]] = [("", root)]
    trimmed = re.sub(r"\s*\{\{- ", "{{ ", re.sub(r" -\}\}\s*", " }}", text))
    for piece in re.split(r"(\{\{.*?\}\})", trimmed, flags=re.S):
        if not piece.startswith("{{"):
            open_at[-1][1].append(piece)
            continue
        action = piece[2:-2].strip()
        inside: list[Node] = []
        if action in (".Content", ".Role"):
            open_at[-1][1].append(("value", action[1:].lower(), inside))
        elif action == "range .Messages":
            open_at[-1][1].append(("range", "", inside))
            open_at.append(("range", inside))
        elif found := re.fullmatch(r'(else )?if eq \.Role "([a-z]+)"', action):
            leave_branch(open_at, found[1])
            open_at[-1][1].append(("else if" if found[1] else "if", found[2], inside))
            open_at.append(("if", inside))
        elif action == "end" and len(open_at) > 1:
            open_at.pop()
        else:
            raise ValueError(f"no action that this program knows: {piece}")
    if len(open_at) > 1:
        raise ValueError(f"{open_at[-1][0]} without end")
    return root


def leave_branch(open_at: list[tuple[str, list[Node]]], is_else: str | None) -> None:
    """Close the branch before an `else`. Raises ValueError where there is none."""
    if is_else and open_at.pop()[0] != "if":
        raise ValueError("else without if")


def render(nodes: list[Node], turns: list[Turn], turn: Turn | None = None) -> str:
    """The text that a template makes of turns (`role`, `content`)."""
    text, taken = "", False
    for node in nodes:
        if isinstance(node, str):
            text += node
            continue
        kind, argument, inside = node
        if kind == "range":
            text += "".join(render(inside, turns, each) for each in turns)
            continue
        if turn is None:
            raise ValueError(f".{argument} outside of range .Messages")
        if kind == "value":
            text += turn[argument]
            continue
        taken = taken and kind == "else if"
        if not taken and turn["role"] == argument:
            taken = True
            text += render(inside, turns, turn)
    return text


def create(name: str, modelfile: Path) -> dict[str, object]:
    """What is kept of a model: its GGUF, template, system message and parameters. Raises
    ValueError."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*(:[\w.-]+)?", name):
        raise ValueError(f"no model can be called {name}")
    kept: dict[str, object] = {}
    options: dict[str, object] = {}
    for instruction, value in read_modelfile(modelfile.read_text(encoding="utf-8")):
        word, _, key = instruction.partition(" ")
        if word not in KNOWN:
            raise ValueError(f"{word} is Ollama's, and nothing this program does")
        if key and key not in PARAMETERS:
            raise ValueError(f"unknown parameter '{key}'")
        if key:
            theirs, kind = PARAMETERS[key]
            options[theirs] = [*options.get(theirs, []), value] if key == "stop" else kind(value)  # type: ignore[misc]
        else:
            kept[word] = value
    gguf = modelfile.parent / str(kept.get("from", ""))
    if not gguf.is_file() or gguf.read_bytes()[:4] != b"GGUF":
        raise ValueError(f"FROM names no GGUF file: {gguf}")
    if "template" not in kept:
        raise ValueError("no TEMPLATE: Ollama may know one for this file, this program does not")
    parse_template(str(kept["template"]))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    return kept | {"gguf": str(gguf.resolve()), "sha256": digest, "options": options}


def run(kept: Mapping[str, object], prompt: str) -> str:
    """The answer of a model that was created. Raises ValueError where its file is another now."""
    gguf = Path(str(kept["gguf"]))
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != kept["sha256"]:
        raise ValueError(f"{gguf} was changed since ollama create")
    turns = [{"role": "user", "content": prompt}]
    if kept.get("system"):
        turns.insert(0, {"role": "system", "content": str(kept["system"])})
    asked = render(parse_template(str(kept["template"])), turns)
    given = dict(kept["options"])  # type: ignore[call-overload]
    return complete(gguf, given.pop("n_ctx", 4096), {"prompt": asked, **given})


def complete(gguf: Path, n_ctx: int, asked: Mapping[str, object]) -> str:
    """What llama.cpp's server answers to /completion; it adds the BOS that the file asks for, as
    Ollama's does."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_gpu_layers, params.verbosity = str(gguf), n_ctx, 0, 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    body = {"temperature": 0.0, "n_predict": LONGEST, **asked}
    request = urllib.request.Request(
        f"{server.listening_address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request) as reply:
        return json.load(reply)["content"]


def main(words: list[str]) -> int:
    """Be the program; exit status. Models are kept in the folder OLLAMA_MODELS."""
    home = Path(os.environ["OLLAMA_MODELS"])
    try:
        match words:
            case ["create", name, "-f", modelfile]:
                kept = create(name, Path(modelfile))
                home.mkdir(exist_ok=True)
                (home / f"{name}.json").write_text(json.dumps(kept), encoding="utf-8")
            case ["run", name, prompt]:
                file = home / f"{name}.json"
                if not file.is_file():
                    raise ValueError(f"there is no model {name}")
                print(run(json.loads(file.read_text(encoding="utf-8")), prompt), flush=True)
            case _:
                raise ValueError(f"nothing this program does: {' '.join(words)}")
    except ValueError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # llama.cpp's threads are not waited for
