"""What `lora serve` refuses before it listens, and the commands that `--print` prints.

Hermetic: the tiny model, configurations without weights. Alone: pytest
tests/serve/test_command_line.py
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, decoders
from transformers import AutoTokenizer

from lora_cli.common import LoraError, UsageError
from lora_cli.evaluate import answerers, open_answerers
from lora_cli.serve import asked, commands, serve
from lora_cli.serve.pieces import Assembler, Drawing, End, Piece, Token, name_token
from lora_cli.serve.torch_engine import TorchEngine
from tests.serve.serving import make_adapter


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "plain": make_adapter(tiny / "model", folder / "plain", 1),
        "dora": make_adapter(tiny / "model", folder / "dora", 2, dora=True),
    }


def write_config(folder: Path, kind: str, architecture: str) -> Path:
    folder.mkdir()
    config = {"model_type": kind, "architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def refuse(lora, *words: object, status: int = 2) -> str:
    done = lora("serve", *words)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\nhint: ") == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_what_is_not_served(lora, tiny: Path, adapters, tmp_path: Path) -> None:
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    plain = adapters["plain"]
    for engine in ((), ("--print", "llama.cpp")):  # the commands of others are not others
        for given in (("--adapter", f"a={plain}"), ("--base", tiny / "model")):
            said = refuse(lora, gguf, *given, "--port", 0, *engine)
            assert "on which no adapter is laid" in said
        said = refuse(lora, plain, "--adapter", f"plain={adapters['dora']}", "--port", 0, *engine)
        assert "two models are called plain" in said
        given = (tiny / "model", "--base", plain)
        assert "--base is for an adapter" in refuse(lora, *given, "--port", 0, *engine)
    teller = write_config(tmp_path / "teller", "bert", "BertForSequenceClassification")
    assert "writes no text" in refuse(lora, teller, "--port", 0, status=1)
    assert "it is NAME=PATH" in refuse(lora, plain, "--adapter", adapters["dora"], "--port", 0)
    said = refuse(lora, plain, "--adapter", f"a={tiny / 'model'}", "--port", 0)
    assert "is not an adapter" in said
    assert "does not exist" in refuse(lora, tmp_path / "gone.gguf", "--port", 0, status=1)


def test_adapters_of_two_bases_are_not_served_together(lora, adapters, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in adapters["dora"].iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "adapter_config.json").read_text())
    base = tmp_path / "base"
    base.symlink_to(config["base_model_name_or_path"])
    (other / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(base)})
    )
    for engine in ((), ("--print", "vllm")):
        said = refuse(lora, adapters["plain"], "--adapter", f"other={other}", "--port", 0, *engine)
        assert "serve each by a server of its own" in said


def test_adapters_lie_on_one_base_which_is_served_too(adapters, tiny: Path) -> None:
    given = [f"dora={adapters['dora']}"]
    for path, names in (
        (adapters["plain"], ["plain", "dora", "model"]),
        (tiny / "model", ["dora", "model"]),
    ):
        engines = serve.open_engines(str(path), given, None, 100)
        assert list(engines) == names
        [engine] = set(engines.values())
        models = engine.models.values()
        assert len({id(each) for model in models for each in model.bases.loaded.values()}) == 1
        assert {engine.find_positions(name) for name in names} == {100}
        assert [engine.measure_longest_token(name) for name in names * 2] == [13] * 2 * len(names)
        said = set()
        for name in [*names, *names]:
            prompt = engine.render(name, answerers.Asked([{"role": "user", "content": "red dog"}]))
            end = engine.write(name, prompt, Drawing(20, 0.0), lambda piece: None, lambda: True)
            said.add((name, end.text))
        assert len(said) == len(names)


def test_a_port_in_use_is_named(lora, tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refuse(lora, tiny / "model", "--port", port, status=1)
    assert f"error: 127.0.0.1:{port} is in use\n\nhint: --port 0" in said


@pytest.mark.parametrize("host", ["a..b", "..", "a" * 100, "bücher.."])
def test_a_host_that_is_none_is_named(lora, tiny: Path, host: str) -> None:
    # socket.getaddrinfo raises UnicodeError of these, which is no OSError
    said = refuse(lora, tiny / "model", "--host", host, "--no-api-key", status=1)
    assert "error: --host " in said and "bug" not in said


def test_no_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(LoraError, match="serving needs uvicorn") as caught:
        serve.refuse_missing_packages()
    assert caught.value.hint == "pip install 'lora-cli[serve]'"


def test_others_are_not_let_in_unasked() -> None:
    for given in (("0.0.0.0", 1, None, False), ("::", 1, None, False), ("box", 1, None, False)):
        with pytest.raises(UsageError, match="lets other machines ask"):
            serve.settle_address(*given)
    for key in ("", "a b", "ключ"):
        with pytest.raises(UsageError, match="has to be characters"):
            serve.settle_address("localhost", 1, key, False)
    with pytest.raises(UsageError, match="both given"):
        serve.settle_address("localhost", 1, "key", True)
    made = [serve.settle_address(host, 1, None, False) for host in ("127.0.0.1", "::1")]
    assert all(re.fullmatch("[0-9a-f]{32}", each.key) and each.was_made for each in made)
    assert made[0].key != made[1].key
    assert serve.settle_address("0.0.0.0", 1, "key", False).is_local is False
    assert serve.settle_address("[::1]", 1, None, False).host == "::1"  # as an address spells it


def test_commands_of_other_engines(lora, adapters, tiny: Path) -> None:
    words = [adapters["plain"], "--adapter", f"dora={adapters['dora']}", "--print"]
    base = str(tiny / "model")
    done = lora("serve", *words, "vllm")
    first, *rest = map(shlex.split, done.stdout.splitlines())
    assert first == [
        *("vllm", "serve", base, "--lora-modules", f"plain={adapters['plain']}"),
        *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "1"),
    ]
    assert [line[:2] for line in rest] == [["lora", "merge"], ["vllm", "serve"]]
    assert "vLLM does not lay dora over its base: DoRA magnitudes" in done.stderr
    sglang = lora("serve", *words, "sglang").stdout.splitlines()
    assert f"--lora-paths plain={adapters['plain']}" in sglang[0]
    for engine, last in (("ollama", "ollama run dora"), ("llama.cpp", "llama-server -m dora-gguf")):
        lines = lora("serve", *words, engine).stdout.splitlines()
        assert lines[0] == f"lora merge {adapters['plain']} plain-merged"
        assert lines[-1].startswith(last)


def test_ollama_reads_the_modelfile_of_the_file_that_is_served(tmp_path: Path, capsys) -> None:
    file = tmp_path / "My run-Q4_K_M.gguf"
    file.touch()

    def show() -> list[str]:
        commands.show(str(file), [], None, "ollama")
        return capsys.readouterr().out.splitlines()

    made, run = f"echo FROM ./'{file.name}' > ", "ollama run my-run-q4_k_m"
    beside = tmp_path / "Modelfile"
    created = "ollama create my-run-q4_k_m -f "
    assert show() == [f"{made}{beside}", f"{created}{beside}", run]
    beside.write_text(f"# mine\nFROM {file.name}\n")
    assert show() == [f"{created}{beside}", run]
    for other in ("FROM ./other.gguf\n", 'FROM """\n'):
        beside.write_text(other)
        own = f"'{tmp_path / file.stem}.Modelfile'"
        assert show() == [f"{made}{own}", f"{created}{own}", run]


def test_what_an_engine_scales_otherwise_is_merged(
    lora, adapters, tiny: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in adapters["plain"].iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    config = json.loads((changed / "adapter_config.json").read_text())

    def show(engine: str, **more: object) -> tuple[str, str]:
        (changed / "adapter_config.json").write_text(json.dumps(config | more))
        done = lora("serve", changed, "--print", engine)
        return done.stdout, done.stderr

    assert "--lora-modules" in show("vllm", use_rslora=True)[0]
    stdout, stderr = show("sglang", use_rslora=True)
    assert "lora merge" in stdout
    assert "not by use_rslora" in stderr
    stdout, stderr = show("vllm", alpha_pattern={"q_proj": 3})
    assert "lora merge" in stdout
    assert "not by alpha_pattern" in stderr
    assert "--max-lora-rank 320" in show("vllm", r=300)[0]
    wide = make_adapter(tiny / "model", tmp_path / "wide", 3, r=513)
    said = lora("serve", wide, "--print", "vllm").stderr
    assert "its rank is 513, and 512 the most" in said


def test_tools_are_shown_to_the_template(tiny: Path) -> None:
    """And `tool_choice: none` hides them; arguments of calls are mappings."""
    [model] = open_answerers.open_models([str(tiny / "model")]).values()
    model.tokenizer.chat_template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
        "{{ m.content }}{{ m.tool_calls[0].function.arguments.a if m.tool_calls }}{% endfor %}"
    )
    engine = TorchEngine({"m": model})
    tool = {"type": "function", "function": {"name": "red dog", "parameters": {}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": " sun"}'}}

    def render(*more: dict, **given: object) -> str:
        messages = [{"role": "user", "content": "bus"}, *more]
        wanted = asked.read_chat({"model": "m", "messages": messages, **given}, 9)
        return model.tokenizer.decode(engine.render("m", asked.convert_messages(wanted)))

    assert render() == "bus"
    assert render(tools=[tool]) == "red dog bus"
    assert render(tools=[tool], tool_choice="none") == "bus"
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(said, {"role": "tool", "content": " ice", "tool_call_id": "1"}) == "bus sun ice"


@pytest.mark.parametrize(
    "cut", [{"min_p": 1.0}, {"top_h": 0.01}, {"typical_p": 0.01}, {"epsilon_cutoff": 0.9},
            {"eta_cutoff": 0.9}, {"top_k": 1, "top_p": 0.01}],
)  # fmt: skip
def test_answers_are_drawn_by_temperature_and_top_p_alone(
    cut: dict[str, float], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [model] = open_answerers.open_models([str(tiny / "model")]).values()
    engine, drawing = TorchEngine({"m": model}), Drawing(8, 2.0, seed=1)
    settings = model.network.generation_config
    monkeypatch.setattr(settings, "repetition_penalty", 50.0)  # else it is too sure of its answer

    def draw() -> str:
        asked = answerers.Asked([{"role": "user", "content": "Sort: zoo cat"}])
        return engine.write("m", model.encode(asked), drawing, lambda _: None, lambda: True).text

    expected = draw()
    for name, value in cut.items():
        monkeypatch.setattr(settings, name, value)
    assert draw() == expected


def test_a_stop_string_may_name_any_special_token(tiny: Path) -> None:
    """Also one with no part in the tokenizer's settings; and a text that is no token ends nothing
    at the token for unknown ones."""
    [model] = open_answerers.open_models([str(tiny / "model")]).values()
    model.tokenizer.add_tokens([AddedToken("<file>", special=True)])
    special, unknown = model.tokenizer.convert_tokens_to_ids("<file>"), 0
    assert special not in model.tokenizer.all_special_ids
    assert model.tokenizer.convert_tokens_to_ids("no token") == unknown
    engine, drawing = TorchEngine({"m": model}), Drawing(9, 0.0, stop=("<file>", "no token"))

    def ends_at(token: int) -> bool:
        found = []
        model.write_ids = lambda prompts, sampling, stopping_criteria, **_: found.append(
            bool(stopping_criteria[0](torch.tensor([[token]]), None))
        )
        engine.write("m", [1], drawing, lambda _: None, lambda: True)
        return found[0]

    assert [ends_at(token) for token in (special, unknown, 40)] == [True, False, False]


class Letters:
    """A tokenizer of one letter a token, that may write ` .` as `.`: 0 is half a character."""

    def __init__(self, moves: bool) -> None:
        self.clean_up_tokenization_spaces = moves

    def decode(self, ids: list[int], **given: object) -> str:
        text = "".join(map(chr, ids)).replace("\0", "\ufffd")
        return text.replace(" .", ".") if self.clean_up_tokenization_spaces else text

    def convert_ids_to_tokens(self, token: int) -> str:
        return chr(token)


@pytest.mark.parametrize("moves", [True, False])
@pytest.mark.parametrize("text", ["one two . three", "a\0\0b . c", "   .", "xx stop yy", "sto"])
def test_pieces_are_the_text_whatever_moves(text: str, moves: bool) -> None:
    pieces: list[Piece] = []
    letters = Letters(moves)
    made = Assembler(letters, ["stop"], pieces.append)
    stopped = any(made.add(ord(letter), None) for letter in text)
    made.end(stopped)
    expected = letters.decode([ord(letter) for letter in text]).partition("stop")[0]
    assert "".join(piece.text for piece in pieces) == made.text == expected
    assert End("stop", 1, made.text).text == expected


@pytest.mark.parametrize("stop", ["no", "\u2603 d"])
def test_pieces_of_characters_in_bytes_are_the_text_wherever_it_ends(tiny: Path, stop: str) -> None:
    """Half a character makes those before it unreadable, too, where each byte is a token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    ids = tokenizer("a \u00e9\u2603 dog \U0001f642\u00e9", add_special_tokens=False)["input_ids"]
    assert sum(f"{token}".startswith("<0x") for token in tokenizer.convert_ids_to_tokens(ids)) == 11
    for length in range(len(ids) + 1):
        pieces: list[Piece] = []
        made = Assembler(tokenizer, [stop], pieces.append)
        told = Token(name_token(tokenizer, ids[0], 0.0, None), [])
        stopped = any(made.add(token, told) for token in ids[:length])
        made.end(stopped)
        expected = tokenizer.decode(ids[:length]).partition(stop)[0]
        assert "".join(piece.text for piece in pieces) == made.text == expected
        assert stopped or sum(len(piece.tokens) for piece in pieces) == length


def test_tokens_are_told_with_the_spaces_that_they_have_in_the_text(tiny: Path) -> None:
    """Also where a tokenizer, as Llama 2's, strips the first one of each text that it decodes."""
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    ids = tokenizer(" red dog sun .", add_special_tokens=False)["input_ids"]
    told = [name_token(tokenizer, token, 0.0, before) for before, token in zip([None, *ids], ids)]
    assert "".join(each.text for each in told) == tokenizer.decode(ids) == "red dog sun ."
    assert b"".join(each.data for each in told) == b"red dog sun ."
