"""The verdict: what is said of a run that went well, of one that did not, and of what nobody has
looked at.

Hermetic: runs written by hand. Alone: pytest tests/report/test_verdict.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_cli.report import history, verdict
from tests.report import written


def judge(run: Path) -> list[str]:
    return [f"{each.kind}: {each.text}" for each in verdict.judge(history.read_run(run))]


def write(folder: Path, lines: list[dict[str, Any]], **changes: Any) -> Path:
    run = written.write_run(folder, **changes)
    written.write_lines(run / "metrics.jsonl", *lines)
    return run


def log(*losses: float | None, **evaluations: float | None) -> list[dict[str, Any]]:
    """Lines of these losses at steps 1, 2, …, and of evaluations `at_STEP`."""
    found: list[dict[str, Any]] = [{"step": at + 1, "loss": loss} for at, loss in enumerate(losses)]
    named = {int(name.removeprefix("at_")): loss for name, loss in evaluations.items()}
    return found + [{"step": step, "eval_loss": loss} for step, loss in named.items()]


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "fell": (log(2.0, 1.0), {}, "yes: The training loss fell from 2.0000 to 1.0000 (first and last logged step)."),
    "rose": (log(1.0, 2.0), {}, "look: The training loss did not fall: from 1.0000 to 2.0000 (first and last logged step)."),
    "not finite": (log(2.0, None, None, 1.0), {}, "look: The loss was not finite at 2 logged steps."),
    "one not finite": (log(2.0, None, 1.0), {}, "look: The loss was not finite at 1 logged step."),
    "never finite": (log(None, None), {}, "look: The loss was not finite at 2 logged steps."),
    "finite once": (log(2.0, None), {}, "open: Whether the training loss fell is not known: it was finite once at most."),
    "logged once": (log(2.0), {}, "open: Whether the training loss fell is not known: it was logged once at most."),
    "not evaluated": (log(2.0, 1.0), {}, "open: Not evaluated during the run: whether it learnt more than its own rows is not known."),
    "evaluated once": (log(at_5=1.0), {}, "open: Evaluated once, at step 5: loss 1.0000. Whether it was better before is not known."),
    "evaluations not finite": (log(2.0, 1.0) + log(at_5=None, at_10=None), {}, "look: 2 evaluations were not finite: whether it learnt more than its own rows is not known."),
    "best at the end": (log(at_5=1.0, at_10=0.9), {}, "yes: Evaluation was best where it stopped: loss 0.9000 at step 10."),
    "best before": (log(at_5=0.9, at_10=1.0), {}, "look: Evaluation was best at step 5 (loss 0.9000), not where it stopped (step 10: 1.0000); the last step is what was kept."),
    "last not finite": (log(at_5=1.0, at_10=0.9, at_15=None), {}, "look: Evaluation was best at step 10 (loss 0.9000), not where it stopped (step 15: not finite); the last step is what was kept."),
    "an evaluation not finite": (log(at_5=None, at_10=0.9), {}, "look: 1 evaluation was not finite."),
    "best kept": (log(at_5=0.9, at_10=1.0), {"kept": {"which": "best", "step": 5}}, "yes: Evaluation was best at step 5 (loss 0.9000), not where it stopped (step 10: 1.0000); the best step is what was kept."),
    "last kept": (log(at_5=0.9, at_10=1.0), {"kept": {"which": "last", "step": 10}}, "look: Evaluation was best at step 5 (loss 0.9000), not where it stopped (step 10: 1.0000); the last step is what was kept."),
    "finished": (log(1.0), {}, "yes: The run finished: 100 steps in 5m22s."),
    "resumed": (log(1.0), {"resumed": ["2026-11-27T05:00:00+00:00"]}, "yes: The run finished: 100 steps, 5m22s since it was resumed."),
    "ended early": (log(1.0), {"kept": {"which": "best", "step": 5, "why": "no better for 3"}}, "yes: The run finished: 100 steps in 5m22s. It ended before its steps were done: no better for 3."),
    "died": (log(1.0, 2.0), {"status": "running", "results": None}, "look: The run died after 2 steps: its record says running, but no process holds its folder."),
    "interrupted": (log(1.0, 2.0), {"status": "interrupted", "results": None}, "look: The run was interrupted after 2 steps."),
    "failed": ([], {"status": "failed", "results": None}, "look: The run failed before its first logged step."),
    "later version": ([], {"status": "paused", "results": None}, "open: How the run ended is not recorded (status: paused)."),
    "many rows dropped": ([], {}, "look: 150 of 600 rows were left out (25%)."),
    "not merged": ([], {}, "open: Not merged, as far as can be seen from here."),
    "not scored": ([], {}, "open: Not compared with its base on held-out rows."),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_sentence_of_the_verdict(name: str, tmp_path: Path) -> None:
    lines, changes, said = CASES[name]
    assert said in judge(write(tmp_path / "run", lines, **changes))


def test_a_command_for_an_adapter_is_shown_where_there_is_one(tmp_path: Path) -> None:
    """A run that failed before it saved any has none to evaluate."""
    run = write(tmp_path / "run", [], status="failed", results=None)

    def commands() -> list[str | None]:
        return [each.command for each in verdict.judge(history.read_run(run)) if each.command]

    assert commands() == [f"lora evaluate {run}/adapter --data FILE"]
    (run / "adapter").rmdir()
    assert commands() == []


def test_rows_that_were_cut_are_not_left_out(tmp_path: Path) -> None:
    data = written.make_record()["data"] | {
        "left_out": {"cut at 128 tokens": 300, "dropped: bad": 9}
    }
    assert not [
        each for each in judge(write(tmp_path / "run", [], data=data)) if "left out" in each
    ]


@pytest.mark.parametrize(("key", "value"), [("keep", "best"), ("load_best_model_at_end", True)])
def test_a_recipe_of_any_version_says_that_the_best_step_is_kept(
    key: str, value: Any, tmp_path: Path
) -> None:
    record = written.make_record()
    record["recipe"]["training"][key] = value
    said = judge(write(tmp_path / "run", log(at_5=0.9, at_10=1.0), **record))
    assert any(each.endswith("; the best step is what was kept.") for each in said)


def test_by_a_metric_of_which_more_is_better(tmp_path: Path) -> None:
    lines = [{"step": at, "eval_loss": 1 / at, "eval_f1": at % 3 / 10} for at in (1, 2, 3)]
    record = written.make_record()
    record["recipe"]["training"]["metric_for_best_model"] = "eval_f1"
    said = judge(write(tmp_path / "run", lines, **record))
    assert any("best at step 2 (f1 0.2000)" in each for each in said)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.03, 0.61, "yes: Better in exact of 200 held-out rows: 0.03 before, 0.61 after; the intervals do not overlap."),
        (0.61, 0.03, "look: Worse in exact of 200 held-out rows: 0.61 before, 0.03 after; the intervals do not overlap."),
        (0.60, 0.61, "look: No clear difference in exact of 200 held-out rows: 0.6 before, 0.61 after; the intervals overlap."),
    ],
)  # fmt: skip
def test_before_and_after(before: float, after: float, said: str, tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    written.write_evaluation(run, exact=(before, after), paired=False)
    found = judge(run)
    assert said in found
    assert "yes: Better in loss of 200 held-out rows: 2.5 before, 0.875 after." in found
    assert (
        "yes: It has forgotten little or nothing: loss on general text: 3.2500 before, 3.3125 after."
        in found
    )


def test_the_difference_on_the_same_rows_counts_more_than_two_intervals(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    written.write_evaluation(run, exact=(0.60, 0.62))
    start = (
        "yes: Better in exact of 200 held-out rows: 0.6 before, 0.62 after; the difference lies in"
    )
    assert f"{start} 0.005 to 0.035." in judge(run)
    written.write_evaluation(run, exact=(0.60, 0.61))
    start = "look: No clear difference in exact of 200 held-out rows: 0.6 before, 0.61 after; the"
    assert f"{start} difference lies in -0.005 to 0.025." in judge(run)


def test_what_has_been_forgotten_is_pointed_at(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    file = written.write_evaluation(run) / "evaluation.json"
    data = json.loads(file.read_text())
    forgetting = data["models"][1]["forgetting"]
    forgetting["loss"] = 4.0
    written.write_json(file, data)
    assert any(each.startswith("look: It has forgotten something") for each in judge(run))
    for ends, start in (
        ((0.5, 1.0), "look: It has forgotten something"),
        ((-0.5, 2.0), "open: Whether it has forgotten something is not clear"),
        ((0.01, 0.02), "yes: It has forgotten little or nothing"),
    ):
        forgetting["difference"] = {"value": 0.75, "low": ends[0], "high": ends[1]}
        written.write_json(file, data)
        [said] = [each for each in judge(run) if "forgotten" in each]
        assert said.startswith(start) and f"lies in {ends[0]:.4g} to {ends[1]:.4g}." in said


def test_what_is_not_verified_is_said_to_be_so(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    merged = written.write_merged(run / "merged", checked=False)
    written.write_gguf(merged / "x.gguf", engine=False)
    found = judge(run)
    assert "open: merged is merged; that it is what was trained is not verified." in found
    assert "open: x.gguf is not verified: there was no llama.cpp to open it." in found


def test_what_is_verified_is_said_with_its_figure(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    written.write_gguf(written.write_merged(run / "merged") / "x.gguf")
    found = judge(run)
    assert (
        "yes: What was merged is what was trained: merged, largest difference of a logit 5.5e-05 "
        "before rounding." in found
    )
    assert (
        "yes: x.gguf, in llama.cpp: the model's likeliest token at 97.5% of the positions." in found
    )


def test_a_running_run_names_who_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write(tmp_path / "run", log(1.0, 2.0, 3.0), status="running", results=None)
    monkeypatch.setattr(history.lock, "find_owner", lambda folder: "process 12 on here")
    assert (
        "open: The run goes on, by process 12 on here: this page shows it after 3 steps."
        in judge(run)
    )


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "look: 1 line of metrics.jsonl could not be read, as after a crash." in judge(run)
