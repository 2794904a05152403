"""`lora generate` and `lora chat`: prompts answered by several models side by side; a conversation with one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from lora_cli import data, ui
from lora_cli.answer import Messages, Sampling, open_models
from lora_cli.errors import UsageError


class Question(NamedTuple):
    """A row that waits for an answer: `row` in one of data.FORMATS, its answer empty where the file gives none."""

    row: dict[str, Any]
    style: str
    number: int

    def messages(self, template: str | None) -> Messages:
        """What is asked, as the model with this chat template was trained to be asked."""
        return self._conversation(template)[:-1]

    @property
    def expected(self) -> str | None:
        """The answer hoped for."""
        return self._conversation(None)[-1]["content"] or None

    @property
    def text(self) -> str:
        """The last message, as a person would recognise it."""
        return self._conversation(None)[-2]["content"]

    def _conversation(self, template: str | None) -> Messages:
        return data.to_messages(self.row, self.style, self.number - 1, data.uses_alpaca(template))


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """Prompts of the command line, then those of the file: rows of a known format in .jsonl, else lines of text."""
    questions = [_plain(prompt, number) for number, prompt in enumerate(prompts, start=1)]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}", f"ls -l {file}") from None
        except UnicodeDecodeError as error:
            raise UsageError(f"{file} is not UTF-8 text (byte {error.start})", "save the file as UTF-8") from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                questions.append(_question(line, file, number))
    if not questions:
        raise UsageError("no prompt was given", "--prompt TEXT, or --file FILE")
    return questions


def _plain(prompt: str, number: int) -> Question:
    return Question({"prompt": prompt, "completion": ""}, "prompt_completion", number)


def _question(line: str, file: Path, number: int) -> Question:
    if file.suffix not in (".jsonl", ".json"):
        return _plain(line.strip(), number)
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}:{number}: not valid JSON: {error.msg}", "one JSON object a line") from None
    if isinstance(row, dict) and isinstance(row.get("prompt"), str) and "completion" not in row:
        return _plain(row["prompt"], number)
    for style, needed in data.FORMATS.items():
        if style != "text" and isinstance(row, dict) and all(column in row for column in needed):
            question = Question(row, style, number)
            if question._conversation(None)[-1]["role"] != "assistant":
                raise UsageError(f"{file}:{number}: the last message is no answer", "end it with the assistant's turn")
            return question
    raise UsageError(f"{file}:{number}: a row needs prompt, instruction and output, or messages", '{"prompt": "…"}')


def generate(
    paths: Sequence[str],
    prompts: Sequence[str],
    file: Path | None,
    max_new_tokens: int,
    temperature: float,
    base: str | None,
    show: int | None,
    as_json: bool,
) -> None:
    """Print each prompt with every model's answer, then how many answers are exactly the ones expected."""
    questions = read_questions(prompts, file)
    set_seed(0)
    answers = {}
    for label, answerer in open_models(list(dict.fromkeys(paths)), base).items():
        conversations = [question.messages(answerer.chat_template) for question in questions]
        answers[label] = answerer.answer(conversations, Sampling(max_new_tokens, temperature))
    shown = questions if show is None else questions[:show]
    for index, question in enumerate(shown):
        if as_json:
            for label, given in answers.items():
                row = {"model": label, "prompt": question.text, "answer": given[index], "expected": question.expected}
                print(json.dumps(row, ensure_ascii=False))
        else:
            print(_side_by_side(question, {label: given[index] for label, given in answers.items()}))
    expected = [question.expected for question in questions]
    if any(answer is not None for answer in expected):
        rows = [[label, *_exact_match(given, expected)] for label, given in answers.items()]
        (ui.say if as_json else print)(ui.table(["exact match", "rows", "share"], rows))


def _side_by_side(question: Question, answers: dict[str, str]) -> str:
    lines = [f"prompt: {question.text}"]
    if question.expected is not None:
        lines.append(f"expected: {question.expected}")
    for label, answer in answers.items():
        text = answer.strip()
        lines.append(f"  {label}: {text}" if "\n" not in text else f"  {label}:\n    " + text.replace("\n", "\n    "))
    return "\n".join(lines) + "\n"


def _exact_match(given: Sequence[str], expected: Sequence[str | None]) -> tuple[str, str]:
    pairs = [(answer.strip(), wanted.strip()) for answer, wanted in zip(given, expected) if wanted is not None]
    hits = sum(answer == wanted for answer, wanted in pairs)
    return f"{hits}/{len(pairs)}", f"{100 * hits / len(pairs):.1f}%"


def chat(path: str, system: str | None, max_new_tokens: int, temperature: float, base: str | None) -> None:
    """Read lines from stdin, stream answers to stdout; the conversation so far is given back each time."""
    answerer = open_models([path], base)[path]
    opening = [{"role": "system", "content": system}] if system else []
    messages: Messages = list(opening)
    ui.say(f"{path}: /reset starts over, /quit leaves")
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = answerer.stream(messages, Sampling(max_new_tokens, temperature))
            messages.append({"role": "assistant", "content": answer})


def _lines() -> Iterator[str]:
    """Lines of stdin, with a prompt on stderr where a person types them."""
    if sys.stdin is None:
        raise UsageError("there is no input to read", "lora generate PATH --prompt TEXT")
    asking = sys.stdin.isatty()
    while True:
        if asking:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()
