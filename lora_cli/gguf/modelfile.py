"""Say how to run what was exported: an Ollama Modelfile, and command lines.

Ollama reads Go templates. One is written only where it is certain: where every probe conversation,
rendered by the tokenizer, is each message between a text before and a text after its role's
content, and one text that asks for the answer. Else TEMPLATE is left out, and Ollama goes by the
template inside the GGUF where it knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from lora_cli.common import files, quote, ui
from lora_cli.gguf import preflight
from lora_cli.models import Adapter, Base, adapter_contents, adds_bos, chat_template

MADE_BY = "# made by lora export-gguf"
ROLES = ("system", "user", "assistant")
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
    return found if certain and '"""' not in found.go() else None


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
    if any(len(pair) != 2 or "{{" in "".join(pair) for pair in around.values()):
        return None
    found = Pieces(
        {role: (pair[0], pair[1]) for role, pair in around.items()}, whole[len(all_turns) :], None
    )
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
    user's own stays."""
    path = folder / "Modelfile"
    if path.is_symlink() or (
        path.exists() and not path.read_text(encoding="utf-8").startswith(MADE_BY)
    ):
        ui.warn(f"{path} is not ours and was left as it is")
        return
    tokenizer = Base(str(merged)).load_tokenizer()
    found = find_pieces(tokenizer)
    lines = [MADE_BY, f"FROM ./{ggufs[0].name}", *(f"# FROM ./{other.name}" for other in ggufs[1:])]
    if found is None:
        lines.append(
            "# no TEMPLATE: this chat template has no certain translation; Ollama reads the GGUF's"
        )
        ui.say(
            "  Modelfile: without TEMPLATE, since the chat template cannot be translated to "
            "Ollama's language with certainty"
        )
    else:
        lines.append(f'TEMPLATE """{found.go()}"""')
        lines += [f'SYSTEM """{found.system}"""'] if found.system else []
    lines += [f'PARAMETER stop "{token}"' for token in list_stop_tokens(tokenizer, merged)]
    files.write_text(path, "\n".join(lines) + "\n")


def list_stop_tokens(tokenizer: PreTrainedTokenizerBase, merged: Path) -> list[str]:
    """List the tokens that end an answer: the tokenizer's, and those of the model's generation
    settings."""
    configured = GenerationConfig.from_model_config(Base(str(merged)).config).eos_token_id
    if (merged / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(str(merged)).eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return [
        tokenizer.convert_ids_to_tokens(i)
        for i in dict.fromkeys([tokenizer.eos_token_id, *ids])
        if i is not None
    ]


def say_how(ggufs: Sequence[Path], merged: Path | None, adapter: Adapter | None) -> None:
    """Print how to run the files with llama.cpp and Ollama, and the model they came from with
    vLLM."""
    ui.say("to run it:")
    ui.say(f"  llama-server -m {quote(ggufs[0])}")
    ui.say(
        f"  ollama create {quote(ggufs[0].stem.lower())} -f {quote(ggufs[0].parent / 'Modelfile')}"
    )
    if merged is not None:
        ui.say(f"  vllm serve {quote(merged)}")
    if adapter is None:
        return
    if more := adapter_contents.list_beyond(adapter.folder):
        ui.say(f"  vLLM and llama-server cannot load {adapter}: {', '.join(more)}; merge it:")
        ui.say(f"  lora merge {quote(adapter)} OUT && vllm serve OUT")
        return
    config = files.read_json(adapter.folder / "adapter_config.json")
    ranks = config.get("rank_pattern") or {}
    rank = max(8, config["r"], *ranks.values())
    if ranks or config.get("alpha_pattern"):
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
