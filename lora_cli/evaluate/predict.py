"""`lora predict`: tell of each row what a model of its task says: labels, entities, answers.

Rows are read some at a time, so that files of any size are answered in constant memory; of these,
rows that are about as long share a batch, since padding is computed like text. Answers come in the
order of the rows, a line of JSON for each.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import LoraError, UsageError, files, quote, spell_count, ui
from lora_cli.data import formats, readers
from lora_cli.evaluate.input_rows import Rows, Wanted, open_rows, parse_columns, suggest
from lora_cli.evaluate.opened import open_all, read_all
from lora_cli.evaluate.predictors import (
    Asked,
    Predictor,
    Reading,
    Ready,
    find_predictor,
    is_told,
)
from lora_cli.scoring import ClassScore, answers

WINDOW = 64
"""Batches that are read and sorted at a time."""
Said = answers.Answer | formats.BadRow
"""An answer, or why there is none."""
Write = Callable[[dict[str, Any]], None]


class Options(NamedTuple):
    """How rows are answered, what stands beside the answers, and what becomes of bad rows."""

    reading: Reading = Reading()
    keep: Sequence[str] = ()
    """Columns of a row that are repeated beside its answer."""
    skips_bad: bool = False
    """Whether a row that cannot be answered gets a line that says why, and does not end all."""
    as_json: bool = False
    """Whether counts and metrics are one JSON object on stdout."""


class Waiting(NamedTuple):
    """A row that waits for its answer: where it stands, as it was read, and as it is asked."""

    place: str
    row: readers.Row
    asked: Asked | formats.BadRow

    @property
    def bad(self) -> formats.BadRow | None:
        """Why it cannot be asked, whatever the model."""
        return self.asked if isinstance(self.asked, formats.BadRow) else None


@dataclass
class Counted:
    """What became of the rows."""

    rows: int = 0
    cut: Counter[str] = field(default_factory=Counter)
    """Rows that were cut, by the model that they were too long for."""
    bad: Counter[str] = field(default_factory=Counter)
    """Rows that could not be answered, by kind."""
    first_bad: str | None = None
    told: int = 0
    """Rows that say what is right."""


def predict(
    paths: Sequence[str],
    data: str | None,
    texts: Sequence[str],
    out: Path | None,
    base: str | None,
    columns: Sequence[str],
    options: Options,
) -> None:
    """Answer the rows of `data`, or `texts`, by each model, on stdout or into the new file `out`;
    then say the metrics, where rows say what is right. Raises LoraError for the first row that
    cannot be answered, unless these are skipped."""
    _refuse_contradictions(data, texts, out, options)
    wanted = Wanted(data, texts, parse_columns(columns), options.keep)
    with _open_out(out) as write:
        named = read_all(paths, base)
        task = named[0].base.task
        if options.reading.max_new_tokens and not task.has_targets:
            said = f"--max-new-tokens: {named[0].path} is for {task.name}, and writes no text"
            raise UsageError(said, "leave it out")
        kind = find_predictor(task)
        rows = open_rows(wanted, named[0].columns, kind)
        with ExitStack() as asking:
            predictors = {}
            for model in open_all(named):
                asking.enter_context(model.asking())
                predictors[model.name] = kind(model, options.reading)
            answering = Answering(predictors, options)
            _answer_all(rows, answering, write, 1 if task.reads_pictures else WINDOW)
    _say_counts(answering)
    _report_scores(answering, on_stdout=out is not None)


def _refuse_contradictions(
    data: str | None, texts: Sequence[str], out: Path | None, options: Options
) -> None:
    """Raise UsageError for options that cannot be together, or that are missing."""
    if data is None and not texts:
        raise UsageError("there are no rows to answer", "--data FILE, or --text TEXT")
    if data is not None and texts:
        raise UsageError("--data and --text are both given", "leave one of them out")
    if options.as_json and out is None:
        raise UsageError("--json is for what is said beside the answers", "--out FILE for these")


@contextmanager
def _open_out(out: Path | None) -> Iterator[Write]:
    """What writes a line: to stdout, or to a new file that is there whole or not at all."""
    if out is None:
        yield ui.report_json
        return
    with files.staged_file(out, f"--out {quote(files.find_free(out))} takes another name") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(f"{json.dumps(line, ensure_ascii=False)}\n")

        yield write


class Answering:
    """Answers rows by several models, and counts what becomes of them."""

    def __init__(self, predictors: Mapping[str, Predictor], options: Options) -> None:
        self.predictors, self.options = predictors, options
        self.counted = Counted()

    def answer(self, window: Sequence[Waiting]) -> list[dict[str, Any]]:
        """Return a line for each row. Raises LoraError for the first that cannot be answered,
        unless such rows are skipped."""
        said = {name: self._ask(window, name) for name in self.predictors}
        self.counted.rows += len(window)
        return [
            {
                **self._describe(row),
                **self._join(row, {name: each[at] for name, each in said.items()}),
            }
            for at, row in enumerate(window)
        ]

    def _ask(self, window: Sequence[Waiting], name: str) -> list[Said]:
        """Return what a model says of each row, computed in batches of rows of about one length,
        the longest first: what memory does not suffice for is told at once."""
        predictor, size = self.predictors[name], self.options.reading.batch_size
        said: list[Said | None] = [row.bad for row in window]
        asked = {at: row.asked for at, row in enumerate(window) if isinstance(row.asked, Asked)}
        ready: dict[int, Ready] = {}
        for at, made in zip(asked, predictor.prepare(list(asked.values()))):
            if isinstance(made, Ready):
                ready[at] = made
                self.counted.cut[name] += made.is_cut
            else:
                said[at] = made
        order = sorted(ready, key=lambda at: -ready[at].length)
        for start in range(0, len(order), size):
            some = order[start : start + size]
            for at, answer in zip(some, predictor.answer([ready[at] for at in some])):
                said[at] = answer
        return [each for each in said if each is not None]

    def _describe(self, waiting: Waiting) -> dict[str, Any]:
        """Return what stands beside a row's answer: its place, what was asked, what is right where
        that is known, and the columns that are kept."""
        line: dict[str, Any] = {"place": waiting.place}
        if isinstance(waiting.asked, formats.BadRow) or isinstance(waiting.row, formats.BadRow):
            return line
        predictor, given = next(iter(self.predictors.values())), waiting.asked.row
        names = [name for name in predictor.shown if given.get(name) is not None]
        line |= {name: _make_plain(given[name]) for name in names}
        expected = given.get(predictor.expected)
        if self.options.reading.with_labels and is_told(expected):
            line["expected"] = _make_plain(expected)
            self.counted.told += 1
        if self.options.keep:
            kept = formats.rename_columns(waiting.row, {name: name for name in self.options.keep})
            line["row"] = {name: _make_plain(kept.get(name)) for name in self.options.keep}
        return line

    def _join(self, waiting: Waiting, said: Mapping[str, Said]) -> dict[str, Any]:
        """Return the answer of one model, or those of several by their names; for a row that has
        none, the error."""
        wrong = [(name, each) for name, each in said.items() if isinstance(each, formats.BadRow)]
        for name, bad in wrong[:1]:
            self.counted.bad[bad.kind] += 1
            own = len(said) > 1 and waiting.bad is None
            text = f"{waiting.place}: {f'{name}: ' if own else ''}{bad.said}"
            if not self.options.skips_bad:
                raise LoraError(text, suggest(bad))
            self.counted.first_bad = self.counted.first_bad or text
        found = {
            name: {"error": each.said} if isinstance(each, formats.BadRow) else each
            for name, each in said.items()
        }
        return next(iter(found.values())) if len(found) == 1 else {"answers": found}


def _make_plain(value: Any) -> Any:
    """Return a value as JSON can hold it: a date as text, a number that is none as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_make_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _make_plain(each) for key, each in value.items()}
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _answer_all(rows: Rows, answering: Answering, write: Write, window: int) -> None:
    """Write the answers to all rows, in their order; of rows that all take the same, as pictures
    do, no more than a batch is read at a time."""
    progress = ui.Progress()
    size = answering.options.reading.batch_size * (1 if rows.is_piped else window)
    while read := list(islice(rows.rows, size)):
        waiting = [Waiting(place, row, rows.convert(place, row)) for place, row in read]
        for line in answering.answer(waiting):
            write(line)
        if write is not ui.report_json:
            progress.update(f"{spell_count(format(answering.counted.rows, ','), 'row')} answered")
    if write is not ui.report_json and answering.counted.rows > size:  # off a terminal it told few
        progress.update(
            f"{spell_count(format(answering.counted.rows, ','), 'row')} answered", force=True
        )
    progress.clear()


def _say_counts(answering: Answering) -> None:
    """Say what became of the rows, where that is not all."""
    counted, several = answering.counted, len(answering.predictors) > 1
    for name, predictor in answering.predictors.items():
        whose = f"{name}: " if several else ""
        if number := counted.cut[name]:
            ui.warn(
                f"{whose}{number} of {spell_count(counted.rows, 'row')} "
                f"{'is' if number == 1 else 'are'} cut at "
                f"{spell_count(predictor.limit, 'token')}"
            )
        for note in predictor.list_notes():
            ui.say(f"{whose}{note}")
    if 0 < counted.told < counted.rows:
        says = "says" if counted.told == 1 else "say"
        ui.say(f"{counted.told} of {counted.rows} rows {says} what is right")
    if counted.bad:
        kinds = ", ".join(f"{number} × {kind}" for kind, number in counted.bad.most_common())
        ui.warn(
            f"{counted.bad.total()} of {spell_count(counted.rows, 'row')} "
            f"{'has' if counted.bad.total() == 1 else 'have'} no answer "
            f"({kinds}); the first is "
            f"{counted.first_bad}"
        )


def _report_scores(answering: Answering, on_stdout: bool) -> None:
    """Say the metrics of the rows of which it is known what is right, of each model a column; and
    how well each class was found."""
    counted = answering.counted
    scores = {name: each.scorer.score() for name, each in answering.predictors.items()}
    if answering.options.as_json:
        ui.report_json(
            {
                "rows": counted.rows,
                "told": counted.told,
                "cut": {name: counted.cut[name] for name in scores},
                "bad": dict(counted.bad),
                "metrics": {name: each.values for name, each in scores.items()},
                "classes": {
                    name: [row._asdict() for row in each.table] for name, each in scores.items()
                },
            }
        )
        return
    write = ui.report if on_stdout else ui.say
    metrics = list(dict.fromkeys(metric for each in scores.values() for metric in each.values))
    if metrics:
        rows = [
            [metric, *(_spell(each.values.get(metric)) for each in scores.values())]
            for metric in metrics
        ]
        write(*ui.format_table(["metric", *scores], rows))
    for name, each in scores.items():
        if each.table:
            whose = [f"{name}:"] if len(scores) > 1 else []
            write("", *whose, *ui.format_table(CLASS_COLUMNS, _tabulate(each.table)))


CLASS_COLUMNS = ("class", "precision", "recall", "f1", "support")


def _tabulate(table: Sequence[ClassScore]) -> list[list[str]]:
    return [
        [row.name, *map(_spell, (row.precision, row.recall, row.f1)), f"{row.support:,}"]
        for row in table
    ]


def _spell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
