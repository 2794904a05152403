"""Score what a model has written against what was expected, row by row.

The definitions, in the order of METRICS, for a text `answer` and the text `expected` of its row;
docs/how-to/evaluate.md has them with examples. Scores are 0 or 1, those of `f1` anything between.

    exact       equal but for blanks around both
    normalised  the same words, as SQuAD counts them: in lower case, without ASCII's punctuation and
                the articles a, an and the (Rajpurkar et al., 2016; evaluate-v2.0.py)
    f1          harmonic mean of the shares of these words that both have, each as often as where it
                is rarer; two texts without words are the same
    contains    the expected text stands in the answer, case and the number of blanks aside
    numeric     the same number: see `find_number`
    json_valid  the answer is one JSON value, whatever is expected
    json_equal  … and the same as the expected one: keys in any order, numbers by their value
    regex       see `score_regex`
    chrf, bleu  of all rows together, 0 to 100, as sacrebleu prints them (chrF2, BLEU 13a)

A row that a metric says nothing of is not counted in it: `numeric` of one without an expected
number, `json_equal` of one whose expected text is no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from lora_cli.scoring import regexes
from lora_cli.scoring.metrics import measure_overlap, split_words

Score = float | None
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>(?<![)\]])[-+\u2212])?(?:\$(?P<inner>[-+\u2212])?)?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?P<power>[eE][-+]?[0-9]{1,3}(?!\w))?"
)
MARK = "####"
"""What GSM8K writes before an answer's number."""


def score_exact(answer: str, expected: str) -> Score:
    """Return whether both are the same text but for blanks around them."""
    return float(answer.strip() == expected.strip())


def score_normalised(answer: str, expected: str) -> Score:
    """Return whether both have the same words in the same order."""
    return float(split_words(answer) == split_words(expected))


def score_f1(answer: str, expected: str) -> Score:
    """Return F1 of the words of both."""
    return measure_overlap(split_words(answer), split_words(expected))


def score_contains(answer: str, expected: str) -> Score:
    """Return whether the expected text stands in the answer."""
    one, other = (" ".join(text.casefold().split()) for text in (answer, expected))
    return float(other in one)


def score_numeric(answer: str, expected: str) -> Score:
    """Return whether both have the same number; None where none is expected."""
    wanted = find_number(expected)
    return None if wanted is None else float(find_number(answer) == wanted)


def find_number(text: str) -> Decimal | None:
    """Return the number that a text gives as its answer: the first after the last `####`, as GSM8K
    marks it, or, without that mark, the last of all; None where there is none.

    A number is digits with a fraction behind a point and a power of ten (5e3), perhaps with a sign
    and a `$` before them in either order. Commas are part of it where they part three digits each.
    What is behind it (a period, %, a unit) is no part of it, and digits within a word (H2O) are
    none. A minus directly behind a letter, a digit or a closing bracket is one between two numbers,
    and no sign.
    """
    _, mark, behind = text.rpartition(MARK)
    found = list(NUMBER.finditer(behind if mark else text))
    if not found:
        return None
    chosen = found[0] if mark else found[-1]
    number = Decimal(chosen["digits"].replace(",", "") + (chosen["power"] or ""))
    negative = (chosen["sign"] or chosen["inner"]) in ("-", "\u2212")
    return number.copy_negate() if negative else number  # as long as it is: `-` rounds


def score_json_valid(answer: str, expected: str) -> Score:
    """Return whether the answer is one JSON value."""
    return float(_is_json(answer))


def score_json_equal(answer: str, expected: str) -> Score:
    """Return whether both are the same JSON value; None where none is expected."""
    wanted = _parse(expected)
    if isinstance(wanted, _NotJson):
        return None
    return float(_is_same(_parse(answer), wanted))


class _NotJson:
    """What stands for a text that is no JSON."""


def _parse(text: str) -> Any:
    """Return the JSON value of a text, or _NotJson. NaN and Infinity are none, and what is nested
    or long beyond what Python reads is none either."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_read_number)
    except (ValueError, RecursionError):
        return _NotJson()


def _read_number(text: str) -> Decimal | tuple[str]:
    """Return a number with a fraction or a power; one that is beyond what decimals hold as its
    text, which is like no other value."""
    try:
        return Decimal(text)
    except InvalidOperation:
        return (text,)


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _is_json(text: str) -> bool:
    return not isinstance(_parse(text), _NotJson)


def _is_same(one: Any, other: Any) -> bool:
    """Return whether two JSON values are the same; 1 and 1.0 are, 1 and true are not."""
    try:
        if isinstance(one, bool) or isinstance(other, bool):
            return one is other
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(
                _is_same(value, other[key]) for key, value in one.items()
            )
        if isinstance(one, list) and isinstance(other, list):
            return len(one) == len(other) and all(map(_is_same, one, other))
        return bool(one == other)
    except RecursionError:
        return False


def score_regex(
    pattern: str, answers: Sequence[str], expected: Sequence[str], places: Sequence[str]
) -> list[Score]:
    """Return for each answer whether the pattern is in it; where it has a group, whether the first
    group's text is the same as in the expected text, but for blanks around it, and None where the
    expected text lacks the pattern. Raises UsageError for one that takes too long."""
    named = [(f"the answer to {place}", text) for place, text in zip(places, answers)]
    said = regexes.find_all(pattern, named)
    if not regexes.has_groups(pattern):
        return [float(each.found) for each in said]
    named = [(f"the expected text of {place}", text) for place, text in zip(places, expected)]
    wanted = regexes.find_all(pattern, named)
    return [
        float(one.found and _strip(one) == _strip(other)) if other.found else None
        for one, other in zip(said, wanted)
    ]


def _strip(match: regexes.Match) -> str | None:
    return None if match.text is None else match.text.strip()


PER_ROW: dict[str, Callable[[str, str], Score]] = {
    "exact": score_exact,
    "normalised": score_normalised,
    "f1": score_f1,
    "contains": score_contains,
    "numeric": score_numeric,
    "json_valid": score_json_valid,
    "json_equal": score_json_equal,
}
OF_LOSS = ("loss", "perplexity")
CORPUS = ("chrf", "bleu")
METRICS = (*OF_LOSS, *PER_ROW, "regex", *CORPUS)
MOST = 0.9
"""The share of expected answers by which a kind of data is told."""


class Choice(NamedTuple):
    """The metrics that are measured, and why these."""

    names: tuple[str, ...]
    why: str


def choose_metrics(expected: Sequence[str]) -> Choice:
    """Return the metrics for rows with these expected answers, told by what most of them are."""
    if not expected:
        return Choice((), "no row has an expected answer")

    def are(kind: Callable[[str], object]) -> bool:
        return sum(bool(kind(text)) for text in expected) >= MOST * len(expected)

    if are(lambda text: text.lstrip()[:1] in ("{", "[") and _is_json(text)):
        return Choice(("json_valid", "json_equal", "exact"), "the expected answers are JSON")
    if are(lambda text: MARK in text and find_number(text) is not None):
        return Choice(("numeric", "f1"), f"the expected answers end with {MARK} and a number")
    if are(lambda text: len(text.split()) == 1 and find_number(text) is not None):
        return Choice(("numeric", "exact"), "the expected answers are numbers")
    if sum(len(text.split()) for text in expected) <= 5 * len(expected):
        names = ("exact", "normalised", "f1", "contains")
        return Choice(names, "the expected answers are of a few words")
    return Choice(("exact", "f1", "chrf"), "the expected answers are texts")
