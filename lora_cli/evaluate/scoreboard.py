"""Make what is known of rows a table: metrics of each model with their intervals, how much they
differ from the first model's, and the rows in which models differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_cli.common import ui
from lora_cli.evaluate.held_out import HeldRow
from lora_cli.scoring import answer_metrics, bootstrap, regexes, text_metrics

LONGEST = 300
"""Characters that are shown of a text."""
COUNTERS = {
    "chrf": (text_metrics.count_chrf, text_metrics.combine_chrf),
    "bleu": (text_metrics.count_bleu, text_metrics.combine_bleu),
}


class Counted(NamedTuple):
    """What a metric counts of rows (rows, k), with the rows' numbers."""

    numbers: list[int]
    counts: bootstrap.Numbers

    def of(self, numbers: Sequence[int]) -> bootstrap.Numbers:
        """Return the counts of some of the rows."""
        at = {number: place for place, number in enumerate(self.numbers)}
        return self.counts[[at[number] for number in numbers]]


class Answered(NamedTuple):
    """A row with an answer to it."""

    row: HeldRow
    text: str

    @property
    def right(self) -> str:
        """What is expected; empty where that is not known."""
        return self.row.expected or ""


def score_rows(
    rows: Sequence[HeldRow],
    known: Mapping[int, Mapping[str, Any]],
    metrics: Sequence[str],
    pattern: str | None,
) -> dict[int, dict[str, float]]:
    """Return the scores of each row, by its number, that one model has answered."""
    scores: dict[int, dict[str, float]] = {row.number: {} for row in rows}
    answered = [
        Answered(row, str(known[row.number]["answer"]))
        for row in rows
        if "answer" in known.get(row.number, {})
    ]
    for name in metrics:
        for each, score in _score_metric(name, answered, pattern):
            if score is not None:
                scores[each.row.number][name] = score
    for row in rows:
        if (loss := known.get(row.number, {}).get("loss")) is not None:
            scores[row.number]["loss"] = loss
    return scores


def _score_metric(
    name: str, answered: Sequence[Answered], pattern: str | None
) -> Iterable[tuple[Answered, float | None]]:
    """Return the score of each answer that the metric looks at."""
    told = [each for each in answered if each.row.expected is not None]
    if name in answer_metrics.OF_LOSS:
        return []
    if name == "regex":
        assert pattern is not None, "refused without"
        looked_at = told if regexes.has_groups(pattern) else answered
        found = answer_metrics.score_regex(
            pattern,
            [each.text for each in looked_at],
            [each.right for each in looked_at],
            [each.row.place for each in looked_at],
        )
        return zip(looked_at, found)
    if name in COUNTERS:
        count, combine = COUNTERS[name]
        return [(each, combine(count(each.text, [each.right]))) for each in told]
    score = answer_metrics.PER_ROW[name]
    looked_at = answered if name == "json_valid" else told
    return [(each, score(each.text, each.right)) for each in looked_at]


def count_metric(
    name: str,
    rows: Sequence[HeldRow],
    known: Mapping[int, Mapping[str, Any]],
    scores: Mapping[int, Mapping[str, float]],
) -> Counted:
    """Return what a metric counts of the rows that it says something of."""
    if name in answer_metrics.OF_LOSS:
        numbers = [row.number for row in rows if known.get(row.number, {}).get("tokens")]
        counts = [
            [_or_nan(known[n]["loss"]) * known[n]["tokens"], known[n]["tokens"]] for n in numbers
        ]
        return Counted(numbers, np.array(counts, np.float64).reshape(-1, 2))
    told = [row for row in rows if name in scores[row.number]]
    numbers = [row.number for row in told]
    if name in COUNTERS:
        count = COUNTERS[name][0]
        made = [count(str(known[r.number]["answer"]), [r.expected or ""]) for r in told]
        return Counted(numbers, np.array(made, np.float64).reshape(len(told), -1))
    return Counted(numbers, bootstrap.make_shares([scores[n][name] for n in numbers]))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def find_combine(name: str) -> bootstrap.Combine:
    """Return what makes the sums of a metric's counts its value."""
    if name == "perplexity":
        return lambda sums: math.exp(min(bootstrap.divide(sums), 700.0))
    return COUNTERS[name][1] if name in COUNTERS else bootstrap.divide


def measure(name: str, counted: Counted) -> dict[str, Any]:
    """Return a metric as evaluation.json has it."""
    found = bootstrap.find_interval(counted.counts, find_combine(name)).to_data()
    if name in answer_metrics.OF_LOSS:
        found["tokens"] = int(counted.counts[:, 1].sum())
    return found


def compare(name: str, one: Counted, other: Counted) -> dict[str, Any] | None:
    """Return by how much the second is larger, over the rows that both have; None without any, and
    of losses over other tokens."""
    there = set(other.numbers)
    shared = [number for number in one.numbers if number in there]
    if not shared:
        return None
    pair = one.of(shared), other.of(shared)
    if name in answer_metrics.OF_LOSS and (pair[0][:, 1] != pair[1][:, 1]).any():
        return None
    return bootstrap.compare(*pair, find_combine(name)).to_data()


def find_differing(
    rows: Sequence[HeldRow], known: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> list[HeldRow]:
    """Return the rows that two models have answered differently, blanks around answers aside."""
    found = []
    for row in rows:
        said = [each.get(row.number, {}).get("answer") for each in known.values()]
        if len({text.strip() for text in said if text is not None}) > 1:
            found.append(row)
    return found


def spell(found: Mapping[str, Any] | None, signed: bool = False) -> str:
    """Return a value with its interval, such as `0.42 [0.28, 0.56]`."""
    if found is None:
        return ""
    if found["value"] is None:
        return "not finite" if found["count"] else ""
    ends = [found["low"], found["high"]]
    sign = "+" if signed else ""
    digits = 1 if max(abs(found["value"]), *(abs(each or 0) for each in ends)) >= 100 else 3
    value = f"{found['value']:{sign}.{digits}f}"
    if None in ends:
        return value
    return f"{value} [{ends[0]:{sign}.{digits}f}, {ends[1]:{sign}.{digits}f}]"


def report(evaluation: Mapping[str, Any], names: Sequence[str]) -> None:
    """Print the table of models and metrics, what differs from the first model, and what was
    forgotten."""
    models = evaluation["models"]
    if names:
        rows = [[name, *(spell(each["metrics"][name]) for each in models)] for name in names]
        ui.report(*ui.format_table(["metric", *(each["label"] for each in models)], rows))
    others = [each for each in models if each["differences"]]
    if others:
        rows = [
            [name, *(spell(each["differences"].get(name), True) for each in others)]
            for name in names
        ]
        header = [f"difference to {evaluation['against']}", *(each["label"] for each in others)]
        ui.report("", *ui.format_table(header, rows))
    _report_forgetting(models)
    for each in models:
        ui.report(*_list_tasks(each))


def _report_forgetting(models: Sequence[Mapping[str, Any]]) -> None:
    told = [each for each in models if each["forgetting"]]
    if not told:
        return
    rows = []
    for each in told:
        found = each["forgetting"]
        own = {"value": found["loss"], "low": found["low"], "high": found["high"], "count": 1}
        rows.append([each["label"], spell(own), spell(found["difference"], True)])
    header = ["forgetting: loss on general text", "per token", "difference"]
    ui.report("", *ui.format_table(header, rows))


def _list_tasks(model: Mapping[str, Any]) -> list[str]:
    if not model.get("tasks"):
        return []
    rows = [
        [task, name, f"{value:.4f}", "" if error is None else f"{error:.4f}"]
        for task, found in model["tasks"]["results"].items()
        for name, value, error in found
    ]
    return ["", *ui.format_table([f"lm-eval: {model['label']}", "metric", "value", "+-"], rows)]


def show_rows(
    rows: Sequence[HeldRow],
    known: Mapping[str, Mapping[int, Mapping[str, Any]]],
    scores: Mapping[str, Mapping[int, Mapping[str, float]]],
    names: Sequence[str],
) -> None:
    """Print rows with every model's answer and its scores."""
    shown = [name for name in names if name not in answer_metrics.OF_LOSS]
    for row in rows:
        ui.report("", f"{row.place}: {_cut(row.question.text if row.question else '')}")
        if row.expected is not None:
            ui.report(f"  expected: {_cut(row.expected)}")
        for label, own in known.items():
            found = own.get(row.number, {})
            told = scores[label][row.number]
            said = ", ".join(f"{name} {told[name]:g}" for name in shown if name in told)
            text = found.get("answer", f"no answer ({found.get('error', '')})")
            ui.report(f"  {label}{f' ({said})' if said else ''}: {_cut(str(text))}")


def _cut(text: str) -> str:
    """Return a text as one line, of which the end is kept: an answer's result stands there."""
    line = " ".join(text.split())
    if len(line) <= LONGEST:
        return line
    half = LONGEST // 2
    return f"{line[:half]} … {line[-half:]}"
