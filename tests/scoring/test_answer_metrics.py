"""What each metric of `lora evaluate` says of an answer: a table of nasty cases counted by hand,
GSM8K's own rows against a count of its own, and a regular expression that would never end.

Hermetic: no model. Alone: pytest tests/scoring/test_answer_metrics.py
"""

from __future__ import annotations

import time

import pytest
import sacrebleu

from lora_cli.common.errors import UsageError
from lora_cli.scoring import answer_metrics, regexes, text_metrics
from lora_cli.scoring.answer_metrics import PER_ROW, choose_metrics, find_number, score_regex

CASES = [
    # metric, answer, expected, score
    ("exact", " The Elbe.\n", "The Elbe.", 1),
    ("exact", "the Elbe.", "The Elbe.", 0),
    ("exact", "", "", 1),
    ("exact", "", "x", 0),
    ("exact", "e\u0301", "é", 0),  # two spellings of one letter are two texts
    ("normalised", "An answer: the ELBE!", "answer Elbe", 1),
    ("normalised", "theory", "ory", 0),  # `the` within a word stays
    ("normalised", "a", "the", 1),  # no words on either side
    ("normalised", "“Elbe”", "Elbe", 0),  # ASCII's punctuation only, as SQuAD
    ("f1", "the cat sat", "cat sat down", 0.8),
    ("f1", "1 2 3 4", "3 4 5 6", 0.5),
    ("f1", "cat cat cat", "cat", 0.5),
    ("f1", "", "the", 1),
    ("f1", "", "cat", 0),
    ("contains", "It is\nthe   ELBE, I think", "the Elbe", 1),
    ("contains", "420", "42", 1),  # characters, not words
    ("contains", "elb", "elbe", 0),
    ("contains", "", "x", 0),
    ("numeric", "so 5 + 5 = 10\n#### 10", "#### 10.0", 1),
    ("numeric", "#### 1,234", "#### 1234", 1),
    ("numeric", "The answer is $1,234.50.", "1234.5", 1),
    ("numeric", "It costs -$7.", "#### -7", 1),
    ("numeric", "It costs $-7.", "#### -7", 1),
    ("numeric", "\u22127", "#### -7", 1),
    ("numeric", "10-3", "#### 3", 1),  # a minus between two numbers
    ("numeric", "10 - 3", "#### 3", 1),
    ("numeric", "(2)-3", "#### 3", 1),
    ("numeric", "#### 42 of 50", "#### 42", 1),  # the first behind the mark
    ("numeric", "#### 1\n#### 2", "#### 2", 1),  # the last mark
    ("numeric", "42 #### none", "#### 42", 0),  # a mark without a number gives none
    ("numeric", "I do not know", "#### 42", 0),
    ("numeric", "", "#### 42", 0),
    ("numeric", "42", "no number", None),
    ("numeric", "1,2", "2", 1),  # two numbers
    ("numeric", "12,345,6", "6", 1),
    ("numeric", "H2O", "2", 0),
    ("numeric", "1.2.3", "1.2", 1),
    ("numeric", "about .5", "0.50", 1),
    ("numeric", "5e3", "5000", 1),
    ("numeric", "-0", "0", 1),
    ("numeric", "50%", "50", 1),
    ("numeric", "9" * 5000, "9" * 5000, 1),
    ("numeric", "-" + "9" * 30 + "8", "-" + "9" * 31, 0),
    ("json_valid", "[1e99999999999999999999]", "", 1),
    ("json_equal", "[1e99999999999999999999]", "[1e99999999999999999999]", 1),
    ("json_equal", "1e99999999999999999998", "1e99999999999999999999", 0),
    ("json_equal", "-1e-99999999999999999999", "0", 0),
    ("json_valid", ' {"a": [1, null]}\n', "", 1),
    ("json_valid", '```json\n{"a": 1}\n```', "", 0),
    ("json_valid", '{"a": NaN}', "", 0),
    ("json_valid", '{"a": 1', "", 0),
    ("json_valid", "", "", 0),
    ("json_valid", "[" * 100_000, "", 0),
    ("json_valid", "9" * 5000, "", 0),
    ("json_equal", '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', 1),
    ("json_equal", '{"a": true}', '{"a": 1}', 0),
    ("json_equal", "[2, 1]", "[1, 2]", 0),
    ("json_equal", '{"a": 1, "b": 2}', '{"a": 1}', 0),
    ("json_equal", "0.1", "0.10", 1),
    ("json_equal", "no", "[1]", 0),
    ("json_equal", "no", "no", None),
    ("json_equal", "null", "null", 1),
]


@pytest.mark.parametrize(("metric", "answer", "expected", "score"), CASES)
def test_nasty_cases(metric: str, answer: str, expected: str, score: float | None) -> None:
    assert PER_ROW[metric](answer, expected) == (
        None if score is None else pytest.approx(score, abs=1e-12)
    )


def test_every_metric_of_a_row_has_its_cases() -> None:
    seen = {metric: {score for name, *_, score in CASES if name == metric} for metric in PER_ROW}
    assert all({0, 1} <= scores for scores in seen.values())


def test_regex_compares_a_group_or_looks_for_a_presence() -> None:
    places = ["a", "b", "c"]
    answers, expected = ["x = 5 .", "y = 7", ""], ["x=5", "no", "x = 1"]
    assert score_regex(r"x\s*=\s*(\d)", answers, expected, places) == [1.0, None, 0.0]
    assert score_regex(r"=\s*\d", answers, expected, places) == [1.0, 1.0, 0.0]
    # a group without a part in the match is none on both sides
    assert score_regex("x|(y)", ["x"], ["x"], ["a"]) == [1.0]


def test_a_regex_that_never_ends_is_stopped_and_its_row_named(monkeypatch) -> None:
    monkeypatch.setattr(regexes, "SECONDS", 0.3)
    answers = ["aaa", "a" * 64 + "!", "b"]
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"takes over 0.3 s on the answer to rows.jsonl:2$"):
        score_regex("(a+)+$", answers, [""] * 3, [f"rows.jsonl:{n}" for n in (1, 2, 3)])
    assert time.monotonic() - began < 30
    with pytest.raises(UsageError, match=r"'\(' is not a regular expression: missing \)"):
        regexes.refuse_pattern("(")
    with pytest.raises(UsageError, match="10,001 characters"):
        regexes.refuse_pattern("a" * 10_001)


def test_gsm8k_s_answers_are_read_as_a_plain_count_reads_them() -> None:
    rows = [
        "He pays 3*$4=$<<3*4=12>>12.\n#### 12",
        "It grew -3 degrees\n#### -3",
        "That is 1,000 x 2 = 2,000.\n#### 2,000",
        "Half: 2.5.\n#### 2.5",
    ]
    plain = [float(row.split("####")[1].replace(",", "")) for row in rows]
    assert [float(find_number(row)) for row in rows] == plain
    assert [float(find_number(row.split("####")[0])) for row in rows] == [12, -3, 2000, 2.5]


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (['{"a": 1}', "[2]"], ("json_valid", "json_equal", "exact")),
        (["so\n#### 4", "#### 1,000"], ("numeric", "f1")),
        (["4", "$1,000"], ("numeric", "exact")),
        (["the Elbe", "no"], ("exact", "normalised", "f1", "contains")),
        (["a text of more than five words, in which much is said"], ("exact", "f1", "chrf")),
        ([], ()),
    ],
)
def test_the_data_choose_the_metrics(expected: list[str], names: tuple[str, ...]) -> None:
    choice = choose_metrics(expected)
    assert choice.names == names
    assert choice.why
    assert set(names) <= set(answer_metrics.METRICS)


def test_corpus_metrics_add_up_to_sacrebleu_s() -> None:
    said = ["the cat sat on a mat today", "no", "", "er läuft schnell nach Hause, sagt er"]
    right = ["the cat sat on the mat", "yes", "x", "er läuft sehr schnell nach Hause"]
    bleu = sum(text_metrics.count_bleu(*each) for each in zip(said, [[r] for r in right]))
    chrf = sum(text_metrics.count_chrf(*each) for each in zip(said, [[r] for r in right]))
    assert text_metrics.combine_bleu(bleu) == pytest.approx(
        sacrebleu.corpus_bleu(said, [right]).score, abs=1e-9
    )
    assert text_metrics.combine_chrf(chrf) == pytest.approx(
        sacrebleu.corpus_chrf(said, [right]).score, abs=1e-9
    )
