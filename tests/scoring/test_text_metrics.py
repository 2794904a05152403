"""ROUGE, BLEU and chrF: those of rouge-score and sacrebleu, on generated texts and on some counted
by hand.

Hermetic: hypothesis. Alone: pytest tests/scoring/test_text_metrics.py
"""

from __future__ import annotations

import math
import random
import time

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from lora_cli.scoring import text_metrics
from lora_cli.scoring.metrics import Scores

many = settings(max_examples=200, deadline=None)
ROUGE = ["rouge1", "rouge2", "rougeL"]
scorer = RougeScorer(ROUGE)

PIECES = ["the", "cat", "sat", "on", "The", "mat", "1,000.50", "1-2", "U.S.", "don't", "«ça»", "Straße", "猫", "İ", "ß",
          "e\u0301", "😀", "&amp;lt;", "&quot;", "&", "<skipped>", "-\n", "\n", "\u2028", "\t", ".", ",", "--", "(a)", "[b]", "{c}~", "`", "x_y", "$5",
          "3.", ".3", "a.b", "'", "\u200b", "\u00a0"]  # fmt: skip
"""What tokenisers treat apart."""
pieced = st.tuples(
    st.sampled_from(["", " ", " ", "  "]), st.lists(st.sampled_from(PIECES), max_size=14)
)
plain = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=14).map(" ".join)
texts = st.one_of(pieced.map(lambda pair: pair[0].join(pair[1])), plain, st.text(max_size=12))
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=4)


def wanted_of(said: list[str], expected: list[list[str]]) -> dict[str, float]:
    """The values by rouge-score and sacrebleu, whose references stand in columns."""
    rouge = [scorer.score_multi(accepted, text) for text, accepted in zip(said, expected)]
    wanted = {name: sum(each[name].fmeasure for each in rouge) / len(rouge) for name in ROUGE}
    columns = [
        [accepted[at] if at < len(accepted) else None for accepted in expected]
        for at in range(max(map(len, expected)))
    ]
    wanted["bleu"] = sacrebleu.corpus_bleu(said, columns).score
    wanted["chrf"] = sacrebleu.corpus_chrf(said, columns).score
    equal = [
        any(text.strip() == each.strip() for each in accepted)
        for text, accepted in zip(said, expected)
    ]
    return wanted | {"exact": sum(equal) / len(equal)}


def assert_equal(said: list[str], expected: list[list[str]]) -> dict[str, float]:
    """The values, once they are those of the packages to 1e-9."""
    scores = text_metrics.score_texts(said, expected)
    assert all(type(value) is float for value in scores.values.values())
    assert scores.values == pytest.approx(wanted_of(said, expected), rel=1e-9, abs=1e-9)
    assert not scores.table
    return scores.values


@settings(max_examples=400, deadline=None)
@given(rows)
def test_texts_are_scored_as_by_rouge_score_and_sacrebleu(pairs) -> None:
    assert_equal(*map(list, zip(*pairs)))


def test_likely_texts_are_scored_as_by_rouge_score_and_sacrebleu() -> None:
    """Corpora of copies with words changed, left out and moved: every metric is between its ends."""
    chance, between = random.Random(5), 0
    vocabulary = [f"word{at}" for at in range(30)] + [",", ".", "and", "of", "Ünï", "3.5"]
    for _ in range(150):
        said, expected = [], []
        for _ in range(chance.randint(1, 8)):
            words = chance.choices(vocabulary, k=chance.randint(1, 40))
            expected.append([])
            for _ in range(chance.randint(1, 3)):
                kept = [
                    word if chance.random() < 0.8 else chance.choice(vocabulary)
                    for word in words
                    if chance.random() < 0.9
                ]
                at = chance.randint(0, len(kept))
                expected[-1].append(" ".join(kept[at:] + kept[:at]))
            said.append(" ".join(words))
        values = assert_equal(said, expected)
        between += all(0 < values[name] < 1 for name in ROUGE) and 0 < values["bleu"] < 100
    assert between > 100


@many
@given(texts)
def test_words_are_those_of_mteval_13a(text) -> None:
    assert " ".join(text_metrics._split_13a(text)) == Tokenizer13a()(text.rstrip())


@many
@given(st.lists(st.sampled_from("abc"), max_size=80), st.lists(st.sampled_from("abc"), max_size=80))
def test_the_longest_common_subsequence_is_that_of_the_table(words, others) -> None:
    """Over 64 words too, where the integers have several digits."""
    longest = [0] * (len(others) + 1)
    for word in words:
        before = list(longest)
        for at, other in enumerate(others):
            longest[at + 1] = before[at] + 1 if word == other else max(longest[at], before[at + 1])
    assert text_metrics._measure_common(words, others) == longest[-1]


def test_texts_scored_by_hand() -> None:
    """6 words against 6: 5 shared; pairs "the cat", "on the", "the mat" of 5; in order 5. The orders of
    BLEU: 5/6, 3/5, 1/4 ("on the mat") and none of 3, which counts a half."""
    values = text_metrics.score_texts(["the cat sat on the mat"], ["the cat is on the mat"]).values
    assert values["rouge1"] == pytest.approx(5 / 6)
    assert values["rouge2"] == pytest.approx(3 / 5)
    assert values["rougeL"] == pytest.approx(5 / 6)
    bleu = (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    assert values["bleu"] == pytest.approx(100 * bleu)
    assert values["exact"] == 0.0
    half = text_metrics.score_texts(["a b c d"], ["a b c d e f"]).values
    assert half["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 4))
    assert half["rougeL"] == pytest.approx(8 / 10)


def test_chrf_counted_by_hand() -> None:
    """abc against abd: 2 of 3 characters, 1 of 2 pairs, 0 of 1; longer runs do not count."""
    mean = (2 / 3 + 1 / 2 + 0) / 3
    assert text_metrics.score_texts(["abc"], ["abd"]).values["chrf"] == pytest.approx(100 * mean)
    precision, recall = (2 / 4 + 1 / 3 + 0) / 3, mean  # abxy: an order more than was expected
    chrf = 5 * precision * recall / (4 * precision + recall)
    assert text_metrics.score_texts(["a b x y"], ["abd"]).values["chrf"] == pytest.approx(
        100 * chrf
    )


EDGES = {
    "equal": (["one two three four"], ["one two three four"], [1, 1, 1, 100, 100, 1]),
    "equal but for blanks": (
        [" one two three four\n"],
        ["one two three four"],
        [1, 1, 1, 100, 100, 1],
    ),
    "both empty": ([""], [""], [0, 0, 0, 0, 0, 1]),
    "nothing said": ([""], ["one two three four"], [0, 0, 0, 0, 0, 0]),
    "nothing expected": (["one two three four"], [""], [0, 0, 0, 0, 0, 0]),
    "punctuation only": (["! ? ! ?"], ["! ? ! ?"], [0, 0, 0, 100, 100, 1]),
    "too short for BLEU": (["one two"], ["one two"], [1, 1, 1, 0, 100, 1]),
    "letters that ROUGE does not see": (["котёнок"], ["котёнок"], [0, 0, 0, 0, 100, 1]),
    "nothing shared": (["one two three four"], ["xyz"], [0, 0, 0, 0, 0, 0]),
}


@pytest.mark.parametrize(("said", "expected", "values"), EDGES.values(), ids=EDGES)
def test_edges(said, expected, values) -> None:
    found = assert_equal(said, [[each] for each in expected])
    assert list(found) == [*ROUGE, "bleu", "chrf", "exact"]
    assert list(found.values()) == pytest.approx(values)
    assert text_metrics.score_texts(said, expected).values == found


def test_one_of_several_is_enough() -> None:
    said = ["the cat sat on the mat"]
    values = assert_equal(said, [["a dog", "the cat sat on the mat", "the cat"]])
    assert list(values.values()) == pytest.approx([1, 1, 1, 100, 100, 1])


def test_each_kind_of_rouge_takes_the_text_that_is_best_for_it() -> None:
    """The second has all words in another order, the first most of them in this one."""
    values = assert_equal(["a b c d"], [["a b c x", "d c b a"]])
    assert values["rouge1"] == 1.0
    assert values["rougeL"] == 0.75


def test_of_two_texts_equally_far_the_shorter_gives_bleu_its_length() -> None:
    assert_equal(["a b c d e"], [["a b c d e f", "a b c d"]])
    assert text_metrics.score_texts(["a b c d e"], [["a b c d e f", "a b c d"]]).values[
        "bleu"
    ] == pytest.approx(100)


def test_no_texts_have_no_scores() -> None:
    assert text_metrics.score_texts([], []) == Scores({})


def test_a_text_needs_one_to_compare_with() -> None:
    with pytest.raises(AssertionError):
        text_metrics.score_texts(["x"], [[]])
    with pytest.raises(ValueError, match="longer"):
        text_metrics.score_texts(["x"], ["x", "y"])


def test_long_texts_take_no_table() -> None:
    """2,000 words against as many: rouge-score's own table of 4 million cells takes seconds."""
    chance = random.Random(0)
    said, wanted = (" ".join(chance.choices("abcdefgh", k=2000)) for _ in range(2))
    start = time.process_time()
    text_metrics.score_texts([said] * 5, [wanted] * 5)
    assert time.process_time() - start < 2
