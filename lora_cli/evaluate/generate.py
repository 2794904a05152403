"""`lora generate`: answer the same prompts with several models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from lora_cli.common import LoraError, UsageError, quote, spell_count, ui
from lora_cli.data import formats, pairs, readers
from lora_cli.evaluate.answerers import Answerer, Asked, Sampling
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.models import answering


class Question(NamedTuple):
    """A row to answer, in one of `formats.FORMATS`; a question without an answer has "?" in its
    place."""

    row: dict[str, Any]
    style: str
    place: str
    expected: str | None

    def convert(self, template: str | None) -> formats.Conversation:
        """Return the row's turns, the answer last. Raises UsageError naming its place."""
        try:
            found = formats.find_converter(self.style, formats.uses_alpaca(template))(self.row)
        except formats.BadRow as bad:
            raise _refuse_row(self.place, bad) from None
        assert isinstance(found, formats.Conversation)
        return found

    def asked(self, template: str | None) -> Asked:
        """Return what is asked, as the model with this chat template was trained to be asked."""
        found = self.convert(template)
        return Asked(found.messages[:-1], found.tools)

    @property
    def text(self) -> str:
        """The last message, as a person would recognise it."""
        return str(self.asked(None).messages[-1]["content"])


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """Read the prompts of the command line, then the rows of a file that `lora train` could
    read."""
    asked = [(f"prompt {number}", {"prompt": text}) for number, text in enumerate(prompts, start=1)]
    questions = [make_question(place, row) for place, row in asked]
    if file is not None:
        if file.is_file() and readers.guess_kind(file) in (None, "picture"):
            raise UsageError(
                f"{file} is none of {', '.join(readers.TABLES)}, nor one of them with .gz",
                "rows as for data.path, or a file NAME.txt with a prompt on each line",
            )
        try:
            questions += [make_question(place, row) for place, row in readers.read(file)]
        except OSError as error:
            raise UsageError(
                f"{file} cannot be read: {error.strerror}", f"ls -l {quote(file)}"
            ) from None
    if not questions:
        raise UsageError("no prompt was given", "--prompt TEXT, or --file FILE")
    return questions


def make_question(place: str, row: readers.Row) -> Question:
    """Make the question of a row; its answer, where it has one, is the expected one."""
    if isinstance(row, formats.BadRow):
        raise _refuse_row(place, row)
    if row.keys() == {"text"}:  # a line of a .txt file
        row = {"prompt": row["text"]}
    if formats.recognise_format(row) in (None, "text"):
        row = _read_pair(place, row)
    row = formats.rename_columns(row, formats.guess_columns(row))
    for style, asked, answer in (
        ("prompt_completion", "prompt", "completion"),
        ("alpaca", "instruction", "output"),
    ):
        if isinstance(row.get(asked), str):
            question = Question({**row, answer: row.get(answer) or "?"}, style, place, None)
            expected = _read_answer(question)
            return question._replace(expected=expected if row.get(answer) else None)
    found = formats.recognise_format(row)
    if found not in ("messages", "sharegpt", "prompt_completion"):
        raise UsageError(
            f"{place}: a row needs prompt, instruction, messages or conversations",
            '{"prompt": "…"}',
        )
    question = Question(row, found, place, None)
    return question._replace(expected=_read_answer(question))


def _read_answer(question: Question) -> str | None:
    """Return the text of a row's last turn, or None where it has none. Raises UsageError where that
    is no answer."""
    last = question.convert(None).messages[-1]
    if last["role"] != "assistant":
        raise UsageError(
            f"{question.place}: the last message is not an answer",
            "end it with the assistant's turn",
        )
    return last["content"] or None


def _read_pair(place: str, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of a source and its target as a prompt with its answer, any other as it is."""
    if formats.guess_columns(row):
        return row
    try:
        pair = pairs.find_pair(row)
    except formats.BadRow as bad:
        raise _refuse_row(place, bad) from None
    return row if pair is None else {"prompt": pair.source, "completion": pair.target}


def _refuse_row(place: str, bad: formats.BadRow) -> UsageError:
    hint = "mend or remove the row" if bad.hint == formats.MEND else bad.hint
    return UsageError(f"{place}: {bad.said}", hint)


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
        answers[label] = _answer(label, answerer, questions, Sampling(max_new_tokens, temperature))
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
                ui.report_json(row)
        else:
            _print_answers(question, {label: given[index] for label, given in answers.items()})
    expected = [question.expected for question in questions]
    if any(answer is not None for answer in expected):
        rows = [[label, *_count_exact_matches(given, expected)] for label, given in answers.items()]
        (ui.say if as_json else ui.report)(*ui.format_table(["exact match", "rows", "share"], rows))


def _answer(
    label: str, answerer: Answerer, questions: Sequence[Question], sampling: Sampling
) -> list[str]:
    """Return a model's answers. Raises LoraError naming the question that is too long for it."""
    asked = [question.asked(answerer.chat_template) for question in questions]
    warn_of_unread_tools(label, answerer, asked)
    try:
        return answerer.answer(asked, sampling)
    except answering.TooLongError as error:
        lengths = [len(answerer.encode(each)) for each in asked]
        place = questions[lengths.index(error.length)].place
        raise LoraError(f"{place}: {error.message}", error.hint) from None


def warn_of_unread_tools(label: str, answerer: Answerer, asked: Sequence[Asked]) -> None:
    """Warn where there are tools that a model is not shown."""
    number = sum(bool(each.tools) for each in asked)
    if number and not answerer.reads_tools:
        ui.warn(
            f"{label}: {spell_count(number, 'prompt has', 'prompts have')} tools, which its chat "
            "template does not read: they are left out"
        )


def _print_answers(question: Question, answers: dict[str, str]) -> None:
    """Print a prompt, the answer expected and those given; the further lines of each are
    indented."""
    _print_text("prompt:", question.text)
    if question.expected is not None:
        _print_text("expected:", question.expected)
    for label, answer in answers.items():
        _print_text(f"  {label}:", answer.strip())
    ui.report("")


def _print_text(name: str, text: str) -> None:
    if "\n" in text:
        ui.report(name, *(f"    {line}" for line in text.split("\n")))
    else:
        ui.report(f"{name} {text}")


def _count_exact_matches(given: Sequence[str], expected: Sequence[str | None]) -> tuple[str, str]:
    pairs = [
        (answer.strip(), wanted.strip())
        for answer, wanted in zip(given, expected)
        if wanted is not None
    ]
    hits = sum(answer == wanted for answer, wanted in pairs)
    return f"{hits}/{len(pairs)}", f"{100 * hits / len(pairs):.1f}%"
