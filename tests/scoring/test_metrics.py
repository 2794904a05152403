"""Metrics of classes, sets of labels, numbers, tags and answers: those of scikit-learn, scipy,
seqeval and SQuAD's program, on generated cases and on some counted by hand.

Hermetic: hypothesis and numpy. Alone: pytest tests/scoring/test_metrics.py
"""

from __future__ import annotations

import ast
import json
import math
import random
import string
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import seqeval.metrics as seqeval
import sklearn.metrics as sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_cli.scoring import metrics

many = settings(max_examples=200, deadline=None)
NAMES = ["ham", "spam", "ads", "news", "forum", "never"]


@pytest.fixture(autouse=True)
def quiet():
    """Those that are compared with warn of what is not defined, numpy of what we divide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module="lora_cli")
        yield


def assert_equal(found: dict[str, float], wanted: dict[str, float]) -> None:
    """The same names, each of the same value to 1e-9, as a float that JSON takes."""
    assert found.keys() == wanted.keys()
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def assert_rows(table: tuple[metrics.ClassScore, ...], names, wanted) -> None:
    """The table is what precision_recall_fscore_support returns."""
    assert [row.name for row in table] == list(names)
    for row, *numbers in zip(table, *wanted):
        assert row[1:] == pytest.approx(tuple(numbers), rel=1e-9, abs=1e-9)
        assert type(row.support) is int


# --- classes ---

pairs_of_ids = st.integers(1, len(NAMES)).flatmap(
    lambda k: st.tuples(
        st.just(k),
        st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k - 1)), min_size=1, max_size=40),
    )
)


@many
@given(pairs_of_ids)
def test_classes_are_scored_as_by_scikit_learn(case) -> None:
    number, pairs = case
    said, true = map(list, zip(*pairs))
    scores = metrics.score_classes(said, true, NAMES[:number])
    wanted = {
        f"f1_{kind}": sklearn.f1_score(true, said, average=kind, zero_division=0)
        for kind in ("macro", "micro", "weighted")
    }
    wanted["accuracy"] = sklearn.accuracy_score(true, said)
    wanted["matthews"] = sklearn.matthews_corrcoef(true, said)
    rows = sklearn.precision_recall_fscore_support(
        true, said, labels=list(range(number)), zero_division=0
    )
    if number == 2:
        wanted |= {name: rows[at][1] for at, name in enumerate(["precision", "recall", "f1"])}
    assert_equal(scores.values, wanted)
    assert_rows(scores.table, NAMES[:number], rows)


def test_classes_counted_by_hand() -> None:
    """ham 3 of 4 said, 3 of 3 true; spam 1 of 2, 1 of 2; ads never said, once true."""
    scores = metrics.score_classes([0, 0, 0, 0, 1, 1], [0, 0, 0, 2, 1, 1], ["ham", "spam", "ads"])
    assert scores.table == (("ham", 0.75, 1.0, 6 / 7, 3), ("spam", 1, 1, 1, 2), ("ads", 0, 0, 0, 1))
    assert scores.values["accuracy"] == 5 / 6
    assert scores.values["f1_macro"] == pytest.approx((6 / 7 + 1) / 3)
    assert scores.values["f1_weighted"] == pytest.approx((3 * 6 / 7 + 2) / 6)
    assert scores.values["matthews"] == pytest.approx((6 * 5 - 16) / math.sqrt(16 * 22))


def test_a_class_that_never_occurs_is_in_the_table_and_not_in_the_mean() -> None:
    scores = metrics.score_classes([0, 1], [0, 1], NAMES)
    assert scores.values["f1_macro"] == 1.0
    assert scores.table[5] == ("never", 0, 0, 0, 0)


def test_no_example_has_no_scores() -> None:
    empty: list[list[str]] = []
    assert metrics.score_classes([], [], NAMES) == metrics.Scores({})
    assert metrics.score_classes([], [], NAMES[:2]) == metrics.Scores({})
    assert metrics.score_label_sets(np.zeros((0, 6)), np.zeros((0, 6)), NAMES) == metrics.Scores({})
    assert metrics.score_numbers([], []) == metrics.Scores({})
    assert metrics.score_numbers(np.zeros((0, 3)), np.zeros((0, 3))) == metrics.Scores({})
    assert metrics.score_tags(empty, empty) == metrics.Scores({})
    assert metrics.score_tags([[], []], [[], []]) == metrics.Scores({})
    assert metrics.score_answers([], empty) == metrics.Scores({})


@pytest.mark.parametrize(
    ("function", "said", "true"),
    [
        (metrics.score_classes, [0, 1], [0]),
        (metrics.score_classes, [0, 6], [0, 1]),
        (metrics.score_classes, [0, 1], [0, -100]),
        (metrics.score_label_sets, [[True]], [[True]]),
        (metrics.score_label_sets, np.ones((2, 6)), np.ones((1, 6))),
    ],
)
def test_ids_that_cannot_be_are_refused(function, said, true) -> None:
    """Labels that are left out (-100) are the caller's to leave out."""
    with pytest.raises(AssertionError):
        function(said, true, NAMES)


def test_columns_beside_rows_are_not_compared_each_with_each() -> None:
    with pytest.raises(AssertionError):
        metrics.score_numbers([1.0, 2.0], [[1.0], [2.0]])
    with pytest.raises(AssertionError):
        metrics.score_tags([["O", "O"]], [["O"]])


def test_a_hundred_thousand_rows_take_well_under_a_second() -> None:
    chance = np.random.default_rng(0)
    said, true = chance.integers(0, 1000, (2, 100_000))
    names = [str(at) for at in range(1000)]
    sets = chance.random((2, 100_000, 20)) < 0.1
    start = time.process_time()
    metrics.score_classes(said, true, names)
    metrics.score_label_sets(sets[0], sets[1], names[:20])
    metrics.score_numbers(said, true)
    assert time.process_time() - start < 0.7


def test_metrics_need_numpy_alone() -> None:
    room = Path(metrics.__file__).parent
    for name in ("metrics.py", "text_metrics.py"):
        nodes = list(ast.walk(ast.parse((room / name).read_text())))
        asked = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        asked |= {
            each.name for node in nodes if isinstance(node, ast.Import) for each in node.names
        }
        asked = {each for each in asked if each != "lora_cli.scoring.metrics"}
        assert {each.split(".")[0] for each in asked} - sys.stdlib_module_names == {"numpy"}


# --- sets of labels ---


@many
@given(
    st.integers(0, 2**32), st.integers(1, 30), st.integers(2, 6), st.sampled_from([0, 0.2, 0.6, 1])
)
def test_sets_of_labels_are_scored_as_by_scikit_learn(seed, rows, labels, often) -> None:
    chance = np.random.default_rng(seed)
    said = chance.random((rows, labels)) < chance.choice([often, 0.5])
    true = chance.random((rows, labels)) < often
    scores = metrics.score_label_sets(said, true, NAMES[:labels])
    wanted = {
        f"f1_{kind}": sklearn.f1_score(true, said, average=kind, zero_division=0)
        for kind in ("macro", "micro")
    }
    wanted["accuracy"] = sklearn.accuracy_score(true, said)
    assert_equal(scores.values, wanted)
    table = sklearn.precision_recall_fscore_support(true, said, average=None, zero_division=0)
    assert_rows(scores.table, NAMES[:labels], table)


def test_sets_of_labels_counted_by_hand() -> None:
    """One label, which scikit-learn takes for a class; and rows without any label."""
    one = metrics.score_label_sets([[1], [1], [0], [0]], [[1], [0], [1], [0]], ["urgent"])
    assert one.table == (("urgent", 0.5, 0.5, 0.5, 2),)
    assert one.values == {"accuracy": 0.5, "f1_micro": 0.5, "f1_macro": 0.5}
    none = metrics.score_label_sets([[0, 0]], [[0, 0]], ["a", "b"])
    assert none.values == {"accuracy": 1.0, "f1_micro": 0.0, "f1_macro": 0.0}


# --- numbers ---

number = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, 2.5, -1.0]), st.integers(-1000, 1000).map(lambda n: n / 7)
)


def wanted_of_numbers(said, true) -> dict[str, float]:
    """The metrics by scikit-learn and scipy, without those that are not defined."""
    said, true = np.reshape(said, (len(said), -1)), np.reshape(true, (len(true), -1))
    columns = list(zip(said.T, true.T))
    wanted = {
        "mse": sklearn.mean_squared_error(true, said),
        "mae": sklearn.mean_absolute_error(true, said),
        "pearson": np.mean([stats.pearsonr(*each)[0] if len(each[0]) > 1 else math.nan for each in columns]),
        "spearman": np.mean([stats.spearmanr(*each)[0] if len(each[0]) > 1 else math.nan for each in columns]),
        "r2": sklearn.r2_score(true, said, force_finite=False) if len(true) > 1 else math.nan,
    }  # fmt: skip
    return {name: value for name, value in wanted.items() if math.isfinite(value)}


@many
@given(st.lists(st.tuples(number, number), min_size=1, max_size=30))
def test_numbers_are_scored_as_by_scikit_learn_and_scipy(pairs) -> None:
    said, true = zip(*pairs)
    found, wanted = metrics.score_numbers(said, true).values, wanted_of_numbers(said, true)
    if len(set(true)) == 1:  # where the rounded mean differs from all, theirs divides by noise
        wanted.pop("r2", None)
    assert_equal(found, wanted)


@many
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 4), st.booleans())
def test_several_numbers_a_row_are_means_over_the_columns(seed, rows, columns, tied) -> None:
    said, true = np.random.default_rng(seed).normal(size=(2, rows, columns))
    if tied:
        said, true = said.round(), true.round()
    found = metrics.score_numbers(said, true).values
    assert_equal(found, wanted_of_numbers(said, true))


def test_numbers_counted_by_hand() -> None:
    """Ranks 1, 2.5, 2.5, 4 against 2, 1, 3, 4: their distances from 2.5 multiplied are 3, each
    side's squared 4.5 and 5."""
    found = metrics.score_numbers([1, 2, 2, 9], [2, 1, 3, 4]).values
    assert found["mse"] == (1 + 1 + 1 + 25) / 4
    assert found["mae"] == 2.0
    assert found["spearman"] == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert found["r2"] == pytest.approx(1 - 28 / 5)
    assert found["pearson"] == pytest.approx(11 / math.sqrt(41 * 5))


CONSTANT = [
    ("said", [0.1] * 3, [1, 2, 3], {"mse", "mae", "r2"}),
    ("expected", [1, 2, 3], [0.1] * 3, {"mse", "mae"}),
    ("both", [0.1] * 3, [0.1] * 3, {"mse", "mae"}),
    ("one row", [2.0], [1.0], {"mse", "mae"}),
    ("one column of two", [[0.1, 1], [0.1, 2]], [[1, 1], [2, 5]], {"mse", "mae", "r2"}),
    ("a nan", [math.nan, 1], [1, 2], set()),
    ("an infinity", [math.inf, 1], [1, 2], set()),
]


@pytest.mark.parametrize(
    ("said", "true", "names"), [case[1:] for case in CONSTANT], ids=[case[0] for case in CONSTANT]
)
def test_what_is_not_defined_is_left_out(said, true, names) -> None:
    """0.1 three times has a mean of 0.10000000000000002: a variance would not tell."""
    assert np.mean([0.1] * 3) != 0.1
    assert metrics.score_numbers(said, true).values.keys() == names


def test_correlations_of_any_size_stay_in_range() -> None:
    found = metrics.score_numbers([1e200, 2e200, 4e200], [1e-200, 2e-200, 4e-200]).values
    assert found["pearson"] == pytest.approx(1.0) and found["pearson"] <= 1
    assert "mse" not in found  # beyond the largest float
    single = metrics.score_numbers(np.float32([0.1, 0.2, 0.4]), np.float32([0.1, 0.2, 0.4])).values
    assert single == {"mse": 0, "mae": 0, "pearson": 1, "spearman": 1, "r2": 1}


# --- tags ---

USUAL = [f"{mark}-{kind}" for mark in "BI" for kind in ("PER", "LOC", "A-B")] + ["O", "O", "O"]
ODD = [f"{mark}-PER" for mark in "ESUL"] + [
    "B",
    "I",
    "E",
    "S",
    "X",
    ".",
    "O-PER",
    "BPER",
    "I-",
    "-LOC",
    "U",
]


def sentences_of(tags: list[str]):
    """Pairs of sentences of one length."""
    pair = st.tuples(st.sampled_from(tags), st.sampled_from(tags))
    return st.lists(st.lists(pair, max_size=9), min_size=1, max_size=5)


def wanted_of_tags(said, true) -> dict[str, float]:
    """seqeval's values; its macro mean over no type at all is a nan, ours 0.0."""
    wanted = {
        name: getattr(seqeval, f"{name}_score")(true, said, zero_division=0)
        for name in ("precision", "recall", "f1")
    }
    macro = seqeval.f1_score(true, said, average="macro", zero_division=0)
    return wanted | {
        "f1_macro": 0.0 if math.isnan(macro) else macro,
        "accuracy": seqeval.accuracy_score(true, said),
    }


@settings(max_examples=400, deadline=None)
@given(st.one_of(sentences_of(USUAL), sentences_of(USUAL + ODD)))
def test_entities_are_scored_as_by_seqeval(sentences) -> None:
    said = [[pair[0] for pair in each] for each in sentences] + [["B-PER"]]
    true = [[pair[1] for pair in each] for each in sentences] + [["O"]]
    scores = metrics.score_tags(said, true)
    assert_equal(scores.values, wanted_of_tags(said, true))
    rows = seqeval.sequence_labeling.precision_recall_fscore_support(true, said, zero_division=0)
    kinds = {
        kind for tags in (said, true) for kind, _, _ in seqeval.sequence_labeling.get_entities(tags)
    }
    assert_rows(scores.table, sorted(kinds), rows)


ENTITIES = {
    "IOB2": (["B-PER", "I-PER", "O", "B-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
    "IOB1, I- after O": (["I-PER", "I-PER", "O", "I-LOC"], [("PER", 0, 1), ("LOC", 3, 3)]),
    "two neighbours": (["B-PER", "B-PER", "I-PER"], [("PER", 0, 0), ("PER", 1, 2)]),
    "another type": (["B-PER", "I-LOC"], [("PER", 0, 0), ("LOC", 1, 1)]),
    "IOBES": (["S-PER", "B-LOC", "I-LOC", "E-LOC"], [("PER", 0, 0), ("LOC", 1, 3)]),
    "no types": (["B", "I", "O", "B"], [("_", 0, 1), ("_", 3, 3)]),
    "only O": (["O", "O"], []),
}  # fmt: skip


@pytest.mark.parametrize(("tags", "entities"), ENTITIES.values(), ids=ENTITIES)
def test_entities_read_by_hand(tags, entities) -> None:
    """Found wholly by the same tags, and by others as far as types and both ends are equal."""
    scores = metrics.score_tags([tags, tags], [tags, ["O"] * len(tags)])
    assert sum(row.support for row in scores.table) == len(entities)
    assert {row.name for row in scores.table} == {kind for kind, _, _ in entities}
    assert scores.values["precision"] == (0.5 if entities else 0.0)
    assert scores.values["recall"] == (1.0 if entities else 0.0)


def test_an_entity_ends_with_its_sentence() -> None:
    scores = metrics.score_tags([["B-PER"], ["I-PER"]], [["B-PER"], ["I-PER"]])
    assert scores.table == (("PER", 1, 1, 1, 2),)


@many
@given(sentences_of(["NOUN", "VERB", "INTJ", "SYM", "-LRB-", "O", "S", "."]))
def test_tags_without_entities_are_classes_of_tokens(sentences) -> None:
    said = [[pair[0] for pair in each] for each in sentences] + [["VERB"]]
    true = [[pair[1] for pair in each] for each in sentences] + [["NOUN"]]
    flat_said, flat_true = sum(said, []), sum(true, [])
    wanted = {
        f"f1_{kind}": sklearn.f1_score(flat_true, flat_said, average=kind, zero_division=0)
        for kind in ("macro", "micro", "weighted")
    }
    wanted["accuracy"] = sklearn.accuracy_score(flat_true, flat_said)
    wanted["matthews"] = sklearn.matthews_corrcoef(flat_true, flat_said)
    scores = metrics.score_tags(said, true)
    assert_equal(scores.values, wanted)
    rows = sklearn.precision_recall_fscore_support(flat_true, flat_said, zero_division=0)
    assert_rows(scores.table, sorted({*flat_said, *flat_true}), rows)


# --- answers ---


def squad_words(answer: str) -> list[str]:
    """Another way to SQuAD's words: character by character, articles as words of letters and
    digits, which is what stands between two \\b."""
    text = "".join(" " if c.isspace() else c for c in answer.lower() if c not in string.punctuation)
    runs, run = [], ""
    for character in text + " ":
        inside = character.isalnum() or character == "_"
        if run and inside != (run[-1].isalnum() or run[-1] == "_"):
            runs.append(run)
            run = ""
        run += character
    return "".join([*(" " if each in ("a", "an", "the") else each for each in runs), run]).split()


def squad_scores(predicted: list[str], wanted: list[str]) -> tuple[float, float]:
    """Exact match, and F1 from words struck out one by one."""
    left, shared = list(wanted), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            shared += 1
    if not wanted or not predicted:
        return float(wanted == predicted), float(wanted == predicted)
    precision, recall = shared / len(predicted), shared / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
    return float(wanted == predicted), f1


def evaluate_squad(file: Path, said: dict[str, str]) -> dict[str, float]:
    """What SQuAD's evaluate-v2.0.py says of a file and answers by question, by its description."""
    exact, f1, has = {}, {}, {}
    for article in json.loads(file.read_text())["data"]:
        for passage in article["paragraphs"]:
            for question in passage["qas"]:
                accepted = [squad_words(each["text"]) for each in question["answers"]]
                accepted = [each for each in accepted if each] or [[]]
                both = [squad_scores(squad_words(said[question["id"]]), each) for each in accepted]
                exact[question["id"]] = max(each[0] for each in both)
                f1[question["id"]] = max(each[1] for each in both)
                has[question["id"]] = bool(question["answers"])
    found = {"exact_match": list(exact.values()), "f1": list(f1.values())}
    if not all(has.values()):
        found["no_answer_accuracy"] = [exact[each] for each in has if not has[each]]
        found["has_answer_exact"] = [exact[each] for each in has if has[each]]
        found["has_answer_f1"] = [f1[each] for each in has if has[each]]
    return {name: sum(each) / len(each) for name, each in found.items() if each}


WORDS = ["The", "a", "an", "cat", "Cat's", "U.S.", "(dog)", "--", "naïve", "İzmir", "1,000", "a_b", "the\u200b", "¿qué?", "猫", " ", "\n", "A", "theme"]  # fmt: skip


def write_squad(file: Path, chance: random.Random) -> tuple[dict[str, str], list[list[str]]]:
    """Write a file of SQuAD 2's form; answers said by question, and the accepted ones."""
    said, expected, articles = {}, [], []
    for _ in range(chance.randint(1, 3)):
        text = chance.choice([" ", "  ", ""]).join(chance.choices(WORDS, k=30))
        questions = []
        for _ in range(chance.randint(1, 5)):
            spans = [
                sorted(chance.sample(range(len(text)), 2))
                for _ in range(chance.choice([0, 1, 1, 3]))
            ]
            answers = [{"text": text[a:b], "answer_start": a} for a, b in spans]
            expected.append([each["text"] for each in answers])
            name = f"q{len(said)}"
            said[name] = chance.choice(
                [
                    "",
                    "the",
                    " ".join(chance.choices(WORDS, k=3)),
                    *expected[-1],
                    *map(str.upper, expected[-1]),
                ]
            )
            questions.append(
                {"id": name, "question": "?", "answers": answers, "is_impossible": not answers}
            )
        articles.append({"title": "t", "paragraphs": [{"context": text, "qas": questions}]})
    file.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return said, expected


def test_answers_are_scored_as_a_squad_file(tmp_path: Path) -> None:
    chance, without, partly = random.Random(3), 0, 0
    for _ in range(400):
        said, expected = write_squad(tmp_path / "dev.json", chance)
        found = metrics.score_answers(list(said.values()), expected).values
        assert_equal(found, evaluate_squad(tmp_path / "dev.json", said))
        without += "no_answer_accuracy" in found
        partly += 0 < found["exact_match"] < found["f1"] < 1
    assert without > 100 and partly > 50


ANSWERS = {
    "equal": ("Paris", ["Paris"], 1, 1),
    "case, articles, punctuation, blanks": (" the  Eiffel-Tower! ", ["Eiffeltower"], 1, 1),
    "an article inside a word": ("theme", ["me"], 0, 0),
    "two words of three, and one too many": ("red green blue", ["red green grey"], 0, 2 / 3),
    "each word counts as often as in both": ("la la la", ["la la"], 0, 0.8),
    "the best of several": ("New York", ["York", "the New York", "NY"], 1, 1),
    "F1 of the best": ("New York City", ["City", "New York"], 0, 0.8),
    "no answer, as is right": ("", [], 1, 1),
    "no answer, of articles": ("the.", [], 1, 1),
    "an answer where there is none": ("Paris", [], 0, 0),
    "none where there is one": ("", ["Paris"], 0, 0),
    "an accepted answer without words": ("", ["..."], 1, 1),
    "… beside one with words": ("", ["...", "x"], 0, 0),
    "other punctuation than ASCII's counts": ("«Paris»", ["Paris"], 0, 0),
}  # fmt: skip


@pytest.mark.parametrize(("said", "accepted", "exact", "f1"), ANSWERS.values(), ids=ANSWERS)
def test_answers_scored_by_hand(said, accepted, exact, f1) -> None:
    found = metrics.score_answers([said], [accepted]).values
    assert found["exact_match"] == exact
    assert found["f1"] == pytest.approx(f1)
    others = {"no_answer_accuracy": exact} if not accepted else {}
    assert {name: found[name] for name in found.keys() - {"exact_match", "f1"}} == others


def test_questions_without_answer_are_counted_apart() -> None:
    found = metrics.score_answers(["", "x", "big cat", "dog"], [[], [], ["cat"], ["dog"]]).values
    assert found == {
        "exact_match": 0.5,
        "f1": pytest.approx((1 + 0 + 2 / 3 + 1) / 4),
        "no_answer_accuracy": 0.5,
        "has_answer_exact": 0.5,
        "has_answer_f1": pytest.approx((2 / 3 + 1) / 2),
    }
