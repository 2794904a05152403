"""Say how to run what was exported: an Ollama Modelfile, and command lines.

Ollama reads Go templates. One is written only where it is certain: where every probe conversation,
rendered by the tokenizer, is each message between a text before and a text after its role's
content, and one text that asks for the answer. Else TEMPLATE is left out, and Ollama goes by the
template inside the GGUF where it knows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_cli.common import escape, files, name_in_ollama, quote, ui
from lora_cli.gguf import preflight
from lora_cli.models import Adapter, Base, adapter_contents, adds_bos, attach, chat_template

MADE_BY = "# made by lora export-gguf"
ROLES = ("system", "user", "assistant")
PLAIN = r"[\w./-]+"
"""A value of a Modelfile that needs no quotes."""
BETWEEN = r"(?:[ \t\r\n]|#[^\r\n]*)*"
INSTRUCTION = r"((?i:PARAMETER) \w+|[A-Za-z]+)[ \t]"
Conversation = Sequence[Mapping[str, str]]


class Pieces(NamedTuple):
    """A chat template in pieces: the text before and after the content of each role, the text that
    asks for an answer, and the system message that is there when none is given."""

    around: dict[str, tuple[str, str]]
    ask: str
    system: str | None

    def render(self, conversation: Conversation) -> str:
        """Return the prompt for an answer to `conversation`, without BOS: what the Go template
        renders in Ollama."""
        given = conversation[0]["role"] == "system"
        default = (
            [] if given or self.system is None else [{"role": "system", "content": self.system}]
        )
        return (
            "".join(m["content"].join(self.around[m["role"]]) for m in [*default, *conversation])
            + self.ask
        )

    def go(self) -> str:
        """Write the pieces as a Go template."""
        cases = (
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in self.around.items()
        )
        branches = "{{ else ".join(cases)
        return "{{ range .Messages }}{{ " + branches + "{{ end }}{{ end }}" + self.ask


def find_pieces(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """Take the tokenizer's chat template apart; None where it has none, or where the pieces render
    a probe conversation differently."""
    if chat_template.find_template(tokenizer) is None:
        return None
    try:
        found = _take_apart(tokenizer)
        if found is None:
            return None
        certain = all(
            found.render(probe) == _render_conversation(tokenizer, probe)
            for probe in _make_probes()
        )
    except TemplateError:  # a template may refuse a system message, or a turn out of order
        return None
    return found if certain else None


def _take_apart(tokenizer: PreTrainedTokenizerBase) -> Pieces | None:
    """Find the pieces in one rendered conversation of three roles."""
    marks = {role: f"@{role}@" for role in ROLES}
    turns = [{"role": role, "content": mark} for role, mark in marks.items()]
    longer = [
        *turns,
        {"role": "user", "content": "@last@"},
    ]  # an answer in a prompt is never the last turn
    whole, all_turns = (
        _render_conversation(tokenizer, longer),
        _render_conversation(tokenizer, longer, ask=False),
    )
    two, one = (
        _render_conversation(tokenizer, turns[:2], ask=False),
        _render_conversation(tokenizer, turns[:1], ask=False),
    )
    last = two[len(one) :].replace(marks["user"], "@last@")
    if not (whole.startswith(all_turns) and all_turns.startswith(two) and two.startswith(one)):
        return None
    if not all_turns.endswith(last):
        return None
    parts = {
        "system": one,
        "user": two[len(one) :],
        "assistant": all_turns[len(two) : len(all_turns) - len(last)],
    }
    around = {role: tuple(parts[role].split(marks[role])) for role in ROLES}
    ask = whole[len(all_turns) :]
    if any(len(pair) != 2 for pair in around.values()) or "{{" in ask:
        return None
    if any("{{" in "".join(pair) for pair in around.values()):
        return None
    found = Pieces({role: (pair[0], pair[1]) for role, pair in around.items()}, ask, None)
    start, end = found.around["system"]
    without = _render_conversation(tokenizer, turns[1:2])
    system = without.removesuffix(found.render(turns[1:2]))
    if system == without or not (system.startswith(start) and system.endswith(end)):
        return found
    return found._replace(system=system[len(start) : len(system) - len(end)]) if system else found


def _render_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, ask: bool = True
) -> str:
    """Render the conversation without the BOS that Ollama and llama.cpp add."""
    text = chat_template.render(
        tokenizer, [dict(turn) for turn in conversation], add_generation_prompt=ask
    )
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def _make_probes() -> list[Conversation]:
    """Make conversations that every template in pieces renders as the sum of its pieces."""

    def chat(*turns: str) -> Conversation:
        return [
            {"role": role, "content": content}
            for role, content in (turn.split(": ", 1) for turn in turns)
        ]

    one, two, three = "user: Hi.", "assistant: Hello!\n\nHow are you?", "user: Fine: \n1. a\n2. b"
    return [
        chat(one),
        chat("system: Be brief.", one),
        chat(one, two, three),
        chat("system: Be brief.", one, two, three),
        chat(one, two, three, "assistant: <b>{x}</b>", "user: And?"),
    ]


def write_modelfile(folder: Path, ggufs: Sequence[Path], merged: Path) -> None:
    """Write `folder`/Modelfile for the first of `ggufs`, made from the model in `merged`; one of a
    user's own stays. What others wrote is in values alone: one that Ollama would not read as it is
    leaves the file unwritten, which is said."""
    path = folder / "Modelfile"
    if path.is_symlink() or (path.exists() and not _is_ours(path)):
        ui.warn(f"{path} is not ours and was left as it is")
        return
    tokenizer = Base(str(merged)).load_tokenizer()
    found = find_pieces(tokenizer)
    meant = [("FROM", f"./{ggufs[0].name}")]
    comments = [f"# FROM ./{escape(other.name)}" for other in ggufs[1:]]
    if found is None:
        comments.append(
            "# no TEMPLATE: this chat template has no certain translation; Ollama reads the GGUF's"
        )
        ui.say(
            "  Modelfile: without TEMPLATE, since the chat template cannot be translated to "
            "Ollama's language with certainty"
        )
    else:
        meant.append(("TEMPLATE", found.go()))
        meant += [("SYSTEM", found.system)] if found.system else []
    meant += [("PARAMETER stop", token) for token in list_stop_tokens(tokenizer, merged)]
    first, *rest = [_spell(*each) for each in meant]
    text = "\n".join([MADE_BY, first, *comments, *rest, ""])
    if _reads_as(text, meant):
        files.write_text(path, text)
        return
    path.unlink(missing_ok=True)
    odd = dict.fromkeys(each[0] for each in meant if not _reads_as(_spell(*each), [each]))
    ui.warn(f"no Modelfile: Ollama's language cannot hold the model's {' and '.join(odd)}")


def is_of(path: Path, gguf: Path) -> bool:
    """Return whether a file that exists is a Modelfile of ours for this GGUF."""
    if not _is_ours(path):
        return False
    return reads_from(path, gguf)


def reads_from(path: Path, gguf: Path) -> bool:
    """Return whether Ollama would take the model of a Modelfile, anybody's, from the GGUF beside
    it."""
    try:
        said = dict(reversed(list(read_modelfile(path.read_text(encoding="utf-8")))))
    except ValueError:  # of the text's encoding, too
        return False
    return said.get("FROM") in (gguf.name, f"./{gguf.name}")


def _is_ours(path: Path) -> bool:
    """Return whether a file that exists is a Modelfile of ours."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MADE_BY)) == MADE_BY.encode()


def _spell(name: str, value: str) -> str:
    """Return an instruction. Its value stands as it is where it is a plain word, else between
    quotes, in which nothing is escaped."""
    mark = '"""' if re.search('["\n]', value) else "" if re.fullmatch(PLAIN, value) else '"'
    return f"{name} {mark}{value}{mark}"


def _reads_as(text: str, meant: list[tuple[str, str]]) -> bool:
    """Return whether Ollama would read these instructions in a text, and no other."""
    try:
        return list(read_modelfile(text)) == meant
    except ValueError:
        return False


def read_modelfile(text: str) -> Iterator[tuple[str, str]]:
    """Yield the instructions of a Modelfile, each with its value, as Ollama's parser/parser.go
    reads them. Raises ValueError for what it refuses."""
    at = 0
    while (at := re.compile(BETWEEN).match(text, at).end()) < len(text):  # type: ignore[union-attr]
        name = re.compile(INSTRUCTION).match(text, at)
        if name is None:
            raise ValueError(f"no instruction: {text[at:][:20]!r}")
        value, at = _read_value(text, name.end())
        yield name[1], value


def _read_value(text: str, at: int) -> tuple[str, int]:
    """Read the value that begins at a place of a Modelfile; return it, and where it ends.

    It ends with a line that ends with the quotes that the value begins with, or with its first line
    where it begins with none. Blanks around it, and characters that cannot be printed, are lost.
    """
    parts: list[str] = []
    mark = ""
    while True:
        end = re.compile(r"[^\r\n]*").match(text, at).end()  # type: ignore[union-attr]
        kept = "".join(each for each in text[at:end] if each == "\t" or each.isprintable())
        bare = kept.strip()
        if not parts:
            mark = next(mark for mark in ('"""', '"', "") if bare.startswith(mark))
        if bare.endswith(mark) and (parts or len(bare) >= 2 * len(mark)):
            value = "".join([*parts, kept]).strip()
            return value[len(mark) : len(value) - len(mark)], end
        if end == len(text):
            raise ValueError("a value is not closed")
        parts += [kept, text[end]]
        at = end + 1


def list_stop_tokens(tokenizer: PreTrainedTokenizerBase, merged: Path) -> list[str]:
    """List the tokens that end an answer: the tokenizer's, and those of the model's generation
    settings that it has; embeddings may be padded, and settings of another model's."""
    configured = GenerationConfig.from_model_config(Base(str(merged)).config).eos_token_id
    if (merged / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(str(merged)).eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    return [tokens[i] for i in dict.fromkeys([tokenizer.eos_token_id, *ids]) if i in tokens]


def say_how(ggufs: Sequence[Path], merged: Path | None, adapter: Adapter | None) -> None:
    """Print how to run the files with llama.cpp and Ollama, and the model they came from with
    vLLM."""
    ui.say("to run it:")
    ui.say(f"  llama-server -m {quote(ggufs[0])}")
    if (modelfile := ggufs[0].with_name("Modelfile")).is_file():
        ui.say(f"  ollama create {quote(name_in_ollama(ggufs[0].stem))} -f {quote(modelfile)}")
    if merged is not None:
        ui.say(f"  vllm serve {quote(merged)}")
    if adapter is None:
        return
    if more := adapter_contents.list_beyond(adapter.folder):
        ui.say(f"  vLLM and llama-server cannot load {adapter}: {', '.join(more)}; merge it:")
        ui.say(f"  lora merge {quote(adapter)} OUT && vllm serve OUT")
        return
    config = attach.read_adapter_config(adapter.folder)
    ranks = config.rank_pattern
    rank = max(8, config.r, *ranks.values())
    if ranks or config.alpha_pattern:
        ui.say(
            "  vLLM scales every module by lora_alpha/r, whatever rank_pattern and alpha_pattern "
            f"say: lora convert {quote(adapter)} OUT, and serve OUT"
        )
    wide = f"--max-lora-rank {1 << (rank - 1).bit_length()}"
    named = quote(f"{files.name_artefact(Path(str(adapter)))}={adapter}")
    ui.say(f"  vllm serve {quote(adapter.base)} --enable-lora {wide} --lora-modules {named}")
    if not preflight.is_convertible(adapter.base):
        return
    ui.say(
        f"  llama-server -m BASE.gguf --lora LORA.gguf, from: lora export-gguf {quote(adapter)} "
        "--adapter-only"
    )
