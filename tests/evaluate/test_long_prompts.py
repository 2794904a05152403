"""What is longer than a model reads is refused, cut short or, in a chat, loses its oldest turns: no
model answers beyond its positions in silence.

Hermetic: the tiny model, which reads 512 tokens. Alone: pytest tests/evaluate/test_long_prompts.py
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from lora_cli.common import LoraError
from lora_cli.evaluate import chat, generate
from lora_cli.evaluate.answerers import Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.gguf import tools
from lora_cli.models.answering import TooLongError, limit_answer

LONG = [{"role": "user", "content": "red dog " * 400}]
NEARLY = [{"role": "user", "content": "Copy: " + "red " * 480}]


@pytest.fixture(scope="module")
def gguf(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tools.convert(tiny / "model", file, "f16", tools.find_converter())
    return file


def test_an_answer_has_the_room_that_is_left() -> None:
    assert limit_answer(10, None, 128) == 128
    assert limit_answer(10, 512, 128) == 128
    assert limit_answer(500, 512, 128) == 12
    for longest in (512, 802):
        with pytest.raises(TooLongError, match=rf"the prompt has {longest} tokens, .* 512"):
            limit_answer(longest, 512, 128)


@pytest.mark.parametrize("kind", ["transformers", "llama.cpp"])
def test_both_engines_keep_to_it(kind: str, tiny: Path, gguf: Path) -> None:
    path = str(gguf if kind == "llama.cpp" else tiny / "model")
    (answerer,) = open_models([path]).values()
    with pytest.raises(TooLongError):
        answerer.answer([Asked(LONG)], Sampling(8, 0.0))
    (answer,) = answerer.answer([Asked(NEARLY)], Sampling(500, 0.0))
    assert len(answer.split()) <= 512 - 480


def test_a_chat_drops_its_oldest_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = []

    class Short:
        """Reads four messages."""

        chat_template = "one"

        def stream(self, conversation: Asked, sampling: Sampling) -> str:
            limit_answer(len(conversation.messages), 5, 1)
            heard.append([message["content"] for message in conversation.messages])
            return f"answer {len(heard)}"

    monkeypatch.setattr(chat, "open_models", lambda paths, base: {paths[0]: Short()})
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n/help\nthree\n"))
    chat.chat("model", "be brief", 8, 0.0, None)
    assert heard == [
        ["be brief", "one"],
        ["be brief", "one", "answer 1", "two"],
        ["be brief", "two", "answer 2", "three"],
    ]
    said = capsys.readouterr().err
    assert said.count("the oldest question and answer are left out") == 1
    assert "/help is no command, and was not sent: /reset starts over, /quit leaves" in said
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n"))
    monkeypatch.setattr(Short, "stream", lambda *given: limit_answer(9, 5, 1))
    with pytest.raises(TooLongError):
        chat.chat("model", None, 8, 0.0, None)


def test_a_message_that_is_too_long_does_not_end_a_person_s_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard = []

    class Letters:
        """Reads nine letters."""

        chat_template: str | None = "one"

        def stream(self, conversation: Asked, sampling: Sampling) -> str:
            said = "".join(message["content"] for message in conversation.messages)
            limit_answer(len(said), 10, 1)
            heard.append(said)
            return "."

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(chat, "open_models", lambda paths, base: {paths[0]: Letters()})
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\nfar too long\nsix\n"))
    chat.chat("model", None, 8, 0.0, None)
    assert heard == ["one", "one.two", "two.six"]
    assert "it was not sent" in capsys.readouterr().err
    monkeypatch.setattr(Letters, "chat_template", None)
    with pytest.raises(LoraError, match="it cannot hold a conversation") as caught:
        chat.chat("a model", None, 8, 0.0, None)
    assert caught.value.hint == "lora generate 'a model' --prompt TEXT"


def test_the_prompt_that_is_too_long_is_named(tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"prompt": "red"}}\n{{"prompt": "{"red " * 600}"}}\n')
    with pytest.raises(LoraError, match=r"rows\.jsonl:2: the prompt has 6\d\d tokens, and prompt"):
        generate.generate([str(tiny / "model")], ["sun"], rows, 4, 0.0, None, None, False)


def test_a_long_prompt_beside_it_takes_no_room_from_a_short_one(tiny: Path) -> None:
    (answerer,) = open_models([str(tiny / "model")]).values()
    short = [
        [{"role": "user", "content": f"Copy: {'red fig sun ' * times}"}] for times in (1, 12, 20)
    ]
    asked = [Asked(messages) for messages in (short[0], NEARLY, *short[1:])]
    together = answerer.answer(asked, Sampling(64, 0.0))
    alone = [answerer.answer([each], Sampling(64, 0.0))[0] for each in asked]
    assert together == alone
    assert max(len(answer.split()) for answer in alone) > 32 > len(together[1].split())
