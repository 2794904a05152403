"""Score texts that were written against texts that were expected: ROUGE, BLEU, chrF.

The definitions are those of the packages that papers name: rouge-score without its stemmer, and
sacrebleu as it is without options. Both tokenise for languages with blanks and Latin letters: ROUGE
sees a-z and 0-9 only, so of a Chinese or Russian text it sees nothing, and chrF tells more.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from operator import or_
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_cli.scoring.metrics import Scores

Pair = tuple[str, Sequence[str]]
"""A text, and those that were expected, of which each will do."""
BLEU_ORDER, CHRF_ORDER = 4, 6
"""The longest n-gram: of words, and of characters."""
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
"""What mteval-v13a reads as a character, in its order."""
SPLITS = (
    (r"([ -&(-+/:-@\[-`{-~])", r" \1 "),  # ASCII's punctuation but ' , - .
    (r"([^0-9])([.,])", r"\1 \2 "),  # not a number's: 1,000.5 is one word
    (r"([.,])([^0-9])", r" \1 \2"),
    (r"([0-9])(-)", r"\1 \2 "),
)
"""What mteval-v13a sets apart by blanks, one rule after the other."""


def score_texts(predicted: Sequence[str], expected: Sequence[str | Sequence[str]]) -> Scores:
    """Score texts, each against one that was expected or several.

    Between 0 and 1, means over the texts: `rouge1`, `rouge2` and `rougeL` (F1, with the best
    of several), and `exact`, the share that equals an expected text but for blanks around it. Of
    all texts together, between 0 and 100 as sacrebleu prints them: `bleu` (13a, exp) and `chrf`
    (chrF2). BLEU is 0.0 where no text has four words. No texts: no values.
    """
    accepted = [[each] if isinstance(each, str) else list(each) for each in expected]
    assert all(accepted), "each text needs one to compare it with"
    pairs: list[Pair] = list(zip(predicted, accepted, strict=True))
    if not pairs:
        return Scores({})
    rouge = [_score_rouge(*pair) for pair in pairs]
    values = {name: fmean(each[name] for each in rouge) for name in rouge[0]}
    values["bleu"] = combine_bleu(_add_up([count_bleu(*pair) for pair in pairs]))
    values["chrf"] = combine_chrf(_add_up([count_chrf(*pair) for pair in pairs]))
    values["exact"] = fmean(text.strip() in map(str.strip, each) for text, each in pairs)
    return Scores(values)


def _add_up(counts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.sum(counts, axis=0)


def _score_rouge(text: str, accepted: Sequence[str]) -> dict[str, float]:
    """Return ROUGE's F1 by name, each of the expected text that makes it best."""
    words = _split_alphanumeric(text)
    found = []
    for other in map(_split_alphanumeric, accepted):
        shared = [_count_shared(_count_ngrams(words, n), _count_ngrams(other, n)) for n in (1, 2)]
        found.append(
            {
                "rouge1": _find_f1(shared[0], len(words), len(other)),
                "rouge2": _find_f1(shared[1], len(words) - 1, len(other) - 1),
                "rougeL": _find_f1(_measure_common(words, other), len(words), len(other)),
            }
        )
    return {name: max(each[name] for each in found) for name in found[0]}


def _split_alphanumeric(text: str) -> tuple[str, ...]:
    """Return the words that ROUGE counts."""
    return tuple(re.findall("[a-z0-9]+", text.lower()))


def _measure_common(words: Sequence[str], others: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by one addition of long integers per
    word: bit i is 0 where the length grows at words[i] (Hyyrö, Bit-parallel LCS, 2004)."""
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    every = row = (1 << len(words)) - 1
    for word in others:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & every
    return len(words) - row.bit_count()


def _find_f1(shared: int, number: int, other_number: int) -> float:
    """Return the harmonic mean of the shares that are shared, 0.0 of nothing."""
    return 2 * shared / (number + other_number) if shared else 0.0


def _count_ngrams(items: str | tuple[str, ...], order: int) -> Counter[Any]:
    """Count the runs of so many words or characters."""
    return Counter(items[at : at + order] for at in range(len(items) - order + 1))


def _count_shared(grams: Counter[Any], others: Counter[Any]) -> int:
    """Return how many n-grams both have, each as often as where it is rarer."""
    return sum(min(number, others[gram]) for gram, number in grams.items() if gram in others)


def count_bleu(text: str, accepted: Sequence[str]) -> NDArray[Any]:
    """Return what BLEU counts of a text (2 + 2 * orders): its length in words, that of the expected
    text nearest in length, n-grams of each order that are right, and all of them. The counts of a
    corpus are the sums of its texts'."""
    words, others = _split_13a(text), [_split_13a(each) for each in accepted]
    wanted = min((abs(len(each) - len(words)), len(each)) for each in others)[1]
    right, total = [], []
    for order in range(1, BLEU_ORDER + 1):
        grams = _count_ngrams(words, order)
        limits = reduce(or_, (_count_ngrams(each, order) for each in others))
        right.append(_count_shared(grams, limits))
        total.append(grams.total())
    return np.array([len(words), wanted, *right, *total], np.int64)


def combine_bleu(counts: NDArray[Any]) -> float:
    """Return BLEU of a corpus (Papineni et al., 2002), 0 to 100, from its counts. An order without
    a right n-gram counts as half of one, the next such as a quarter, …."""
    (length, wanted), (right, total) = counts[:2], counts[2:].reshape(2, BLEU_ORDER)
    if not right.any() or not total.all():
        return 0.0
    logarithms, smoothing = 0.0, 1
    for correct, number in zip(right.tolist(), total.tolist()):
        if not correct:
            smoothing *= 2
        logarithms += math.log(correct / number if correct else 1 / (smoothing * number))
    brevity = min(0.0, 1 - float(wanted / length))
    return 100 * math.exp(brevity + logarithms / BLEU_ORDER)


def _split_13a(text: str) -> tuple[str, ...]:
    """Return the words of a text as NIST's mteval-v13a tells them apart."""
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES.items():
        line = line.replace(entity, character)
    line = f" {line} "
    for pattern, replacement in SPLITS:
        line = re.sub(pattern, replacement, line)
    return tuple(line.split())


def count_chrf(text: str, accepted: Sequence[str]) -> NDArray[Any]:
    """Return what chrF counts of a text (orders * 3), with the expected one that makes its own chrF
    best. The counts of a corpus are the sums of its texts'."""
    grams = _count_characters(text)
    found = [_compare_characters(grams, _count_characters(each)).ravel() for each in accepted]
    return max(found, key=combine_chrf)


def _count_characters(text: str) -> list[Counter[str]]:
    """Count the n-grams of characters of each order, blanks left out."""
    characters = "".join(text.split())
    return [_count_ngrams(characters, at + 1) for at in range(CHRF_ORDER)]


def _compare_characters(grams: list[Counter[str]], others: list[Counter[str]]) -> NDArray[np.int64]:
    """Return for each order how many n-grams there are, were expected, and both: (orders, 3). An
    order that the expected text is too short for counts none."""
    rows = [
        (each.total() if other else 0, other.total(), _count_shared(each, other))
        for each, other in zip(grams, others)
    ]
    return np.array(rows, np.int64)


def combine_chrf(counts: NDArray[Any]) -> float:
    """Return chrF2 (Popović, 2015), 0 to 100, from counts (orders * 3): precision and recall are
    means over the orders that both sides have, and recall weighs twice."""
    counts = counts.reshape(CHRF_ORDER, 3)
    counts = counts[counts[:, 0] > 0]  # of an order that nothing was expected of there are none
    if not counts[:, 2].any():
        return 0.0
    precision, recall = (counts[:, 2:] / counts[:, :2]).mean(axis=0).tolist()
    return 100 * 5 * precision * recall / (4 * precision + recall)
