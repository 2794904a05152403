"""`lora generate` and `lora chat`: prompts answered by several models side by side; a conversation
with one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from lora_cli.common import UsageError, ui
from lora_cli.data import formats
from lora_cli.evaluate.answerers import Asked, Sampling, open_models


class Question(NamedTuple):
    """A row that waits for an answer: in one of `formats.FORMATS`, with any word where it gives no
    answer."""

    row: dict[str, Any]
    style: str
    place: str
    expected: str | None
    """The answer hoped for."""

    def asked(self, template: str | None) -> Asked:
        """What is asked, as the model with this chat template was trained to be asked."""
        try:
            found = formats.find_converter(self.style, formats.uses_alpaca(template))(self.row)
        except formats.BadRow as bad:
            raise UsageError(f"{self.place}: {bad.said}", bad.hint) from None
        assert isinstance(found, formats.Conversation)
        return Asked(found.messages[:-1], found.tools)

    @property
    def text(self) -> str:
        """The last message, as a person would recognise it."""
        return str(self.asked(None).messages[-1]["content"])


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """Prompts of the command line, then those of the file: rows of a known format in .jsonl, else
    lines of text."""
    questions = [
        _plain_question(prompt, f"prompt {number}")
        for number, prompt in enumerate(prompts, start=1)
    ]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}", f"ls -l {file}") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file} is not UTF-8 text (byte {error.start})", "save the file as UTF-8"
            ) from None
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place, json_file = f"{file}:{number}", file.suffix in (".jsonl", ".json")
                questions.append(
                    _parse_question(line, place)
                    if json_file
                    else _plain_question(line.strip(), place)
                )
    if not questions:
        raise UsageError("no prompt was given", "--prompt TEXT, or --file FILE")
    return questions


def _plain_question(prompt: str, place: str) -> Question:
    return Question({"prompt": prompt, "completion": "?"}, "prompt_completion", place, None)


def _parse_question(line: str, place: str) -> Question:
    """A row of JSON: its answer, where it has one, is what is hoped for."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{place}: not valid JSON: {error.msg}", "one JSON object a line"
        ) from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits; thousands of brackets
        said = str(error).partition(";")[0]
        raise UsageError(
            f"{place}: JSON that cannot be read: {said}", "one JSON object a line"
        ) from None
    for style, asked, answer in (
        ("prompt_completion", "prompt", "completion"),
        ("alpaca", "instruction", "output"),
    ):
        if isinstance(row, dict) and isinstance(row.get(asked), str):
            expected = row.get(answer) or None
            return Question({**row, answer: expected or "?"}, style, place, expected)
    found = formats.recognise_format(row) if isinstance(row, dict) else None
    if found not in ("messages", "sharegpt", "prompt_completion"):
        raise UsageError(
            f"{place}: a row needs prompt, instruction, messages or conversations",
            '{"prompt": "…"}',
        )
    question = Question(row, found, place, None)
    try:
        conversation = formats.find_converter(found)(row)
    except formats.BadRow as bad:
        raise UsageError(f"{place}: {bad.said}", bad.hint) from None
    assert isinstance(conversation, formats.Conversation)
    if conversation.messages[-1]["role"] != "assistant":
        raise UsageError(
            f"{place}: the last message is no answer", "end it with the assistant's turn"
        )
    return question._replace(expected=conversation.messages[-1]["content"] or None)


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
    """Print each prompt with every model's answer, then how many answers are exactly the ones
    expected."""
    questions = read_questions(prompts, file)
    set_seed(0)
    answers = {}
    for label, answerer in open_models(list(dict.fromkeys(paths)), base).items():
        conversations = [question.asked(answerer.chat_template) for question in questions]
        answers[label] = answerer.answer(conversations, Sampling(max_new_tokens, temperature))
    shown = questions if show is None else questions[:show]
    for index, question in enumerate(shown):
        if as_json:
            for label, given in answers.items():
                row = {
                    "model": label,
                    "prompt": question.text,
                    "answer": given[index],
                    "expected": question.expected,
                }
                print(json.dumps(row, ensure_ascii=False))
        else:
            print(
                _format_answers(question, {label: given[index] for label, given in answers.items()})
            )
    expected = [question.expected for question in questions]
    if any(answer is not None for answer in expected):
        rows = [[label, *_count_exact_matches(given, expected)] for label, given in answers.items()]
        (ui.say if as_json else print)(ui.format_table(["exact match", "rows", "share"], rows))


def _format_answers(question: Question, answers: dict[str, str]) -> str:
    lines = [f"prompt: {question.text}"]
    if question.expected is not None:
        lines.append(f"expected: {question.expected}")
    for label, answer in answers.items():
        text = answer.strip()
        lines.append(
            f"  {label}: {text}"
            if "\n" not in text
            else f"  {label}:\n    " + text.replace("\n", "\n    ")
        )
    return "\n".join(lines) + "\n"


def _count_exact_matches(given: Sequence[str], expected: Sequence[str | None]) -> tuple[str, str]:
    pairs = [
        (answer.strip(), wanted.strip())
        for answer, wanted in zip(given, expected)
        if wanted is not None
    ]
    hits = sum(answer == wanted for answer, wanted in pairs)
    return f"{hits}/{len(pairs)}", f"{100 * hits / len(pairs):.1f}%"
