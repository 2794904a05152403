"""The loss of answers against transformers' own, and which answer is taken out of windows against
looking at every pair of places.

Hermetic: a BERT of two layers, numbers at random. Alone: pytest tests/scoring/test_spans.py
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertForQuestionAnswering

from lora_cli.data.collate import pad
from lora_cli.models import read_logits
from lora_cli.scoring import losses
from lora_cli.scoring.scorer import Scorer
from lora_cli.scoring.spans import AnswerScorer, Said, choose_answer, find_span
from tests import tasks


@pytest.fixture(scope="module")
def model() -> BertForQuestionAnswering:
    torch.manual_seed(0)
    made = BertForQuestionAnswering(BertConfig(**tasks.SHAPE))
    torch.nn.init.normal_(made.qa_outputs.weight)  # logits that differ
    return made.eval()


def compute(scorer: Scorer, model: Any, ids: Any, labels: Any, mask: Any, **more: Any) -> Any:
    logits = read_logits(model(input_ids=ids, attention_mask=mask))
    return scorer.sum_loss(logits, labels, mask, **more) / losses.count_labels(labels)


def test_the_loss_and_its_gradient_are_transformers_own(model: BertForQuestionAnswering) -> None:
    ids, labels = torch.randint(5, 20, (6, 17)), torch.randint(0, 17, (6, 2))
    mask = torch.ones_like(ids)
    theirs = model(
        input_ids=ids, attention_mask=mask, start_positions=labels[:, 0], end_positions=labels[:, 1]
    ).loss
    ours = compute(AnswerScorer(), model, ids, labels, mask)
    assert abs(ours.item() - theirs.item()) < 1e-6 < theirs.item()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    gradients = [torch.autograd.grad(each, weight)[0] for each in (ours, theirs)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-6 < gradients[1].abs().max()


def test_a_row_s_loss_does_not_know_the_rows_beside_it(model: BertForQuestionAnswering) -> None:
    """Nor how far it is padded, as transformers' own does."""
    lengths = [17, 9, 5]
    rows = [torch.randint(5, 20, (length,)) for length in lengths]
    labels = torch.tensor([[3, 8], [2, 2], [4, 4]])
    alone = [
        compute(AnswerScorer(), model, row[None], label[None], torch.ones(1, len(row))).item()
        for row, label in zip(rows, labels)
    ]
    ids = pad([row.tolist() for row in rows])
    mask = (ids >= 0).long()
    together = compute(AnswerScorer(), model, ids.clamp(min=0), labels, mask).item()
    assert together == pytest.approx(np.mean(alone), abs=1e-6)
    theirs = model(
        input_ids=ids.clamp(min=0),
        attention_mask=mask,
        start_positions=labels[:, 0],
        end_positions=labels[:, 1],
    ).loss
    assert abs(theirs.item() - together) > 1e-3
    labels[1:] = -100  # rows of a process that has none
    only = compute(AnswerScorer(), model, ids.clamp(min=0), labels, mask).item()
    assert only == pytest.approx(alone[0], abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_smoothing_goes_over_a_row_s_own_tokens(smoothing: float) -> None:
    logits, labels = torch.randn(3, 7, 2), torch.tensor([[1, 2], [0, 0], [-100, -100]])
    wanted = functional.cross_entropy(
        logits[:2], labels[:2], reduction="sum", label_smoothing=smoothing
    )
    scorer, mask = AnswerScorer(), torch.ones(3, 7)
    found = scorer.sum_loss(logits, labels, mask, smoothing)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    longer = torch.cat([logits, torch.randn(3, 4, 2)], 1)
    mask = torch.cat([mask, torch.zeros(3, 4)], 1)
    assert scorer.sum_loss(longer, labels, mask, smoothing).item() == pytest.approx(found.item())


def test_the_best_span_is_that_of_all_pairs() -> None:
    drawn = np.random.default_rng(0)
    for _ in range(300):
        length, longest = drawn.integers(1, 14), int(drawn.integers(1, 6))
        begins, ends = drawn.normal(size=(2, length)).astype(np.float32)
        first, last = sorted(drawn.integers(0, length + 1, 2))
        allowed = np.zeros(length, bool)
        allowed[first:last] = True
        pairs = [
            (begins[a] + ends[b], a, b)
            for a, b in product(range(first, last), repeat=2)
            if a <= b < a + longest
        ]
        found = find_span(begins, ends, allowed, longest)
        if not pairs:
            assert found.score == -np.inf
            continue
        assert (found.score, found.first, found.last) == max(pairs)


def window(question: int, text: str, score: float, none: float, *accepted: str) -> Said:
    return Said(question, text, score, none, list(accepted))


def test_the_best_window_answers_and_none_is_where_every_window_says_so() -> None:
    windows = [window(0, "a", 2.0, 5.0), window(0, "b", 3.0, 1.0)]
    # one window has it, another not
    assert choose_answer(windows, may_be_none=True) is windows[1]
    windows[1] = windows[1]._replace(none=4.0)
    assert choose_answer(windows, may_be_none=True) is None
    assert choose_answer(windows, may_be_none=False) is windows[1]


def test_none_is_an_answer_only_where_some_question_has_none() -> None:
    sure = window(0, "b", 3.0, 9.0, "b")
    scorer = AnswerScorer()
    scorer.join([[sure], [window(1, "c", 1.0, 9.0, "c", "d")]])
    assert scorer.score().values == {"exact_match": 1.0, "f1": 1.0}
    scorer.join([[sure, window(1, "c", 1.0, 9.0)]])
    assert scorer.score().values == {
        "exact_match": 0.5,
        "f1": 0.5,
        "no_answer_accuracy": 1.0,
        "has_answer_exact": 0.0,
        "has_answer_f1": 0.0,
    }


def test_windows_are_read_out_of_a_padded_batch() -> None:
    """Tokens of the question and padding are never an answer, however likely; places are those of
    the whole text, of which the batch has a piece."""
    context = "the Über-cat sat"  # from character 100 of its text on
    starts, ends = [-1, -1, 100, 104, 113, -1], [-1, -1, 103, 112, 116, -1]
    logits = torch.full((2, 8, 2), -1.0)
    logits[0, [1, 6], :] = 50.0  # the question, padding
    logits[0, 3, 0], logits[0, 4, 1] = 7.0, 6.0
    beside = {
        "question": pad([[4], []]),
        "starts": pad([starts, []]),
        "ends": pad([ends, []]),
        "context": pad([list(context.encode()), []]),
        "answers": pad([list(json.dumps(["Über-cat sat"]).encode()), []]),
    }
    labels = torch.tensor([[3, 4], [-100, -100]])
    scorer = AnswerScorer()
    scorer.add(logits, labels, beside)
    assert scorer.gathered == [Said(4, "Über-cat sat", 13.0, -2.0, ["Über-cat sat"])]
    assert scorer.score().values == {"exact_match": 1.0, "f1": 1.0}
    scorer.begin()
    short = AnswerScorer(longest=1)
    short.add(logits, labels, beside)
    assert short.gathered[0].text == "Über-cat"
    assert not scorer.score().values
