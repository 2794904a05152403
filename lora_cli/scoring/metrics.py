"""Score classes, sets of labels, numbers, tags and answers against what was expected.

Shares lie between 0 and 1. A share of nothing (the precision of a class that nobody predicted) is
0.0, as scikit-learn has it with zero_division=0. What is not defined at all is left out of
`Scores.values`, which never holds a nan: everything where there is no example, a correlation with
a constant, all of numbers that are not finite.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]
NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))
"""What SQuAD's program does not count: ASCII's only."""


class ClassScore(NamedTuple):
    """How well one class, one label or one type of entity was found."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int
    """How often it was expected."""


@dataclass(frozen=True)
class Scores:
    """What there is to say of predictions."""

    values: dict[str, float]
    """Name of a metric -> its value."""
    table: tuple[ClassScore, ...] = ()


def score_classes(predicted: ArrayLike, expected: ArrayLike, names: Sequence[str]) -> Scores:
    """Score one class per example, given as ids (n,) of `names`.

    `accuracy`; `f1_macro` and `f1_weighted`, means over the classes that occur (predicted or
    expected), as scikit-learn's; `f1_micro`, which is the accuracy; `matthews`. Of two classes also
    `precision`, `recall` and `f1` of the second, as GLUE reports. The table has every name.
    """
    scores = _score_ids(np.asarray(predicted), np.asarray(expected), names)
    if len(names) != 2 or not scores.table:
        return scores
    second = scores.table[1]
    of_second = {"precision": second.precision, "recall": second.recall, "f1": second.f1}
    return Scores(scores.values | of_second, scores.table)


def score_label_sets(predicted: ArrayLike, expected: ArrayLike, names: Sequence[str]) -> Scores:
    """Score any number of labels per example, given as booleans (n, labels).

    `accuracy` is the share of examples with exactly the labels that were expected; `f1_micro`
    counts all labels together, and `f1_macro` is the mean over all of them, as scikit-learn has it:
    a label that never occurs counts 0.0.
    """
    said, wanted = np.asarray(predicted, dtype=bool), np.asarray(expected, dtype=bool)
    assert said.shape == wanted.shape == (len(said), len(names))
    if not said.size:
        return Scores({})
    counts = [each.sum(axis=0) for each in (said & wanted, said, wanted)]
    table = _tabulate(names, *counts)
    values = {
        "accuracy": float((said == wanted).all(axis=1).mean()),
        "f1_micro": _tabulate_all(*counts).f1,
        "f1_macro": _average(row.f1 for row in table),
    }
    return Scores(values, table)


def score_numbers(predicted: ArrayLike, expected: ArrayLike) -> Scores:
    """Score numbers (n,), or k of them per example (n, k), each metric then the mean over columns.

    `mse`, `mae`, `pearson`, `spearman` (equal numbers share their mean rank) and `r2`. Left out are
    both correlations where one side of a column is constant, and `r2` where the expected one is.
    """
    said, wanted = np.asarray(predicted, np.float64), np.asarray(expected, np.float64)
    assert said.shape == wanted.shape and said.ndim in (1, 2)
    if not said.size or not np.isfinite([said, wanted]).all():
        return Scores({})
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        columns = [
            _score_column(*each) for each in zip(np.atleast_2d(said.T), np.atleast_2d(wanted.T))
        ]
        values = {name: float(np.mean([each[name] for each in columns])) for name in columns[0]}
    return Scores({name: value for name, value in values.items() if math.isfinite(value)})


def score_tags(predicted: Sequence[list[str]], expected: Sequence[list[str]]) -> Scores:
    """Score a tag per token, for each sentence a list.

    Tags with B-, I-, E- or S- name entities, which are read as seqeval's default does (IOB2, and
    IOB1 and IOBES as they come): `precision`, `recall` and `f1` of whole entities, type and both
    ends equal; `f1_macro` over the types that occur, which the table has; `accuracy` of tokens.
    Other tags, as those of parts of speech, are classes of tokens: as `score_classes`.
    """
    assert list(map(len, predicted)) == list(map(len, expected))
    said = [tag for sentence in predicted for tag in sentence]
    wanted = [tag for sentence in expected for tag in sentence]
    if not wanted:
        return Scores({})
    tags = sorted({*said, *wanted})
    if not name_entities(tags):
        ids = {tag: at for at, tag in enumerate(tags)}
        as_ids = [np.array([ids[tag] for tag in each], int) for each in (said, wanted)]
        return _score_ids(as_ids[0], as_ids[1], tags)
    found, true = set(find_entities(predicted)), set(find_entities(expected))
    names = sorted({kind for kind, _, _ in found | true})
    each = [Counter(kind for kind, _, _ in entities) for entities in (found & true, found, true)]
    counts = [np.array([number[name] for name in names], np.int64) for number in each]
    table, whole = _tabulate(names, *counts), _tabulate_all(*counts)
    values = {"precision": whole.precision, "recall": whole.recall, "f1": whole.f1}
    values["f1_macro"] = _average(row.f1 for row in table)
    values["accuracy"] = _average(a == b for a, b in zip(said, wanted))
    return Scores(values, table)


def score_answers(predicted: Sequence[str], expected: Sequence[Sequence[str]]) -> Scores:
    """Score answers, each against those accepted for its question; of them the best counts.

    `exact_match` and `f1` of words, without case, punctuation, articles and extra blanks, as
    SQuAD's evaluate-v2.0.py. No accepted answer means that the question has none, and that "" is
    right; where there are such questions also `no_answer_accuracy`, and `has_answer_exact` and
    `has_answer_f1` of the others.
    """
    rows = [_score_answer(*each) for each in zip(predicted, expected, strict=True)]
    if not rows:
        return Scores({})
    exact, f1 = np.array(rows).T
    values = {"exact_match": exact.mean(), "f1": f1.mean()}
    has_answer = np.array([bool(accepted) for accepted in expected])
    if not has_answer.all():
        values["no_answer_accuracy"] = exact[~has_answer].mean()
        if has_answer.any():
            values["has_answer_exact"] = exact[has_answer].mean()
            values["has_answer_f1"] = f1[has_answer].mean()
    return Scores({name: float(value) for name, value in values.items()})


def _score_ids(predicted: NDArray[Any], expected: NDArray[Any], names: Sequence[str]) -> Scores:
    """Score one class per example. Counts suffice, so a thousand classes need no matrix."""
    assert predicted.shape == expected.shape == (len(predicted),)
    if not len(predicted):
        return Scores({})
    for ids in (predicted, expected):
        assert ids.min() >= 0 and ids.max() < len(names), "an id beyond the names"
    right, said, wanted = (
        np.bincount(ids, minlength=len(names))
        for ids in (expected[predicted == expected], predicted, expected)
    )
    table = _tabulate(names, right, said, wanted)
    values = {
        "accuracy": float(right.sum() / len(expected)),
        "f1_macro": _average(row.f1 for row, occurs in zip(table, said + wanted) if occurs),
        "f1_micro": _tabulate_all(right, said, wanted).f1,
        "f1_weighted": sum(row.f1 * row.support for row in table) / len(expected),
        "matthews": _correlate_classes(right, said, wanted),
    }
    return Scores(values, table)


def _correlate_classes(right: Counts, predicted: Counts, expected: Counts) -> float:
    """Return Matthews' coefficient of any number of classes (Gorodkin, 2004); 0.0 where one side is
    of one class, as in scikit-learn."""
    number = int(expected.sum())
    shared = number * int(right.sum()) - int(predicted @ expected)
    spread = math.prod(number**2 - int(each @ each) for each in (predicted, expected))
    return shared / math.sqrt(spread) if spread else 0.0


def _score_column(predicted: Numbers, expected: Numbers) -> dict[str, float]:
    """Return the metrics of numbers (n,), nan where one is not defined."""
    off = predicted - expected
    from_mean = expected - expected.mean()
    explained = 1 - (off @ off) / (from_mean @ from_mean)
    return {
        "mse": (off**2).mean(),
        "mae": np.abs(off).mean(),
        "pearson": _correlate(predicted, expected),
        "spearman": _correlate(_rank(predicted), _rank(expected)),
        "r2": math.nan if _is_constant(expected) else explained,
    }


def _is_constant(numbers: Numbers) -> bool:
    """Return whether all are the same; a mean is rounded, so a variance does not tell."""
    return bool((numbers == numbers[0]).all())


def _correlate(one: Numbers, other: Numbers) -> float:
    """Return Pearson's coefficient of two times (n,), nan where one is constant."""
    if _is_constant(one) or _is_constant(other):
        return math.nan
    one, other = one - one.mean(), other - other.mean()
    one, other = one / np.abs(one).max(), other / np.abs(other).max()  # squares stay in range
    return float(np.clip(one @ other / math.sqrt((one @ one) * (other @ other)), -1, 1))


def _rank(numbers: Numbers) -> Numbers:
    """Return the rank of each of (n,) from 1 on; equal numbers share the mean of their ranks."""
    _, place, count = np.unique(numbers, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def name_entities(tags: Iterable[str]) -> bool:
    """Return whether such tags name entities; O alone, B, I and O without types do too."""
    tags = list(tags)
    return any(re.match("[BIES]-", tag) for tag in tags) or {"O", *"BIES"}.issuperset(tags)


def find_entities(sentences: Sequence[list[str]]) -> Iterator[tuple[str, int, int]]:
    """Yield type, first and last token of each entity, as seqeval's `get_entities` reads all
    sentences in one, with O after each: an I after O begins an entity, another type ends one."""
    before, kind_before, first = "O", "", 0
    for at, tag in enumerate(tag for sentence in sentences for tag in (*sentence, "O")):
        mark, kind = tag[:1] or "O", tag[1:].split("-", 1)[-1] or "_"
        changes = kind != kind_before
        ends = before in "ES" or (before in "BI" and mark in "BSO")
        begins = mark in "BS" or (before in "ESO" and mark in "EI")
        if ends or (changes and before not in "O."):
            yield kind_before, first, at - 1
        if begins or (changes and mark not in "O."):
            first = at
        before, kind_before = mark, kind


def _score_answer(predicted: str, expected: Sequence[str]) -> tuple[float, float]:
    """Return exact match and F1 of words with the best accepted answer. One that has no words is
    none, as in SQuAD's program."""
    words = split_words(predicted)
    accepted = [each for each in map(split_words, expected) if each] or [[]]
    return float(words in accepted), max(measure_overlap(words, each) for each in accepted)


def split_words(answer: str) -> list[str]:
    """Return an answer's words as SQuAD's program counts them: in lower case, without ASCII's
    punctuation and the articles a, an and the."""
    plain = answer.lower().translate(NO_PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def measure_overlap(words: list[str], others: list[str]) -> float:
    """Return F1 of the words that two answers share; of two empty ones 1.0."""
    if not words or not others:
        return float(words == others)
    shared = (Counter(words) & Counter(others)).total()
    return 2 * shared / (len(words) + len(others))


def _tabulate(
    names: Sequence[str], right: Counts, predicted: Counts, expected: Counts
) -> tuple[ClassScore, ...]:
    """Return a row per name, from how often each was right, predicted and expected: (names,)."""
    precision, recall = _divide(right, predicted), _divide(right, expected)
    f1 = _divide(2 * right, predicted + expected)
    columns = (each.tolist() for each in (precision, recall, f1, expected))
    return tuple(ClassScore(*row) for row in zip(names, *columns, strict=True))


def _tabulate_all(right: Counts, predicted: Counts, expected: Counts) -> ClassScore:
    """Return the row of all together."""
    counts = (each.sum(keepdims=True) for each in (right, predicted, expected))
    return _tabulate([""], *counts)[0]


def _divide(parts: Counts, wholes: Counts) -> Numbers:
    """Return the shares, 0.0 of nothing."""
    return np.divide(parts, wholes, out=np.zeros(len(parts)), where=wholes != 0)


def _average(values: Iterable[float]) -> float:
    """Return the mean, 0.0 of nothing."""
    numbers = list(values)
    return math.fsum(numbers) / max(1, len(numbers))
