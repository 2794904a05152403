"""Runs listed: which folders are looked into, and what is said of each run.

Hermetic: runs written by hand. Alone: pytest tests/report/test_listing.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lora_cli.common import LoraError
from lora_cli.report import listing
from tests.report import written


def list_names(top: Path) -> list[str]:
    return sorted(str(each.relative_to(top)) for each in listing.find_runs(top))


def test_runs_are_found_where_they_can_be(tmp_path: Path) -> None:
    for name in ("a", "deep/er/b", "deep/c"):
        written.write_run(tmp_path / name)
    for name in ("a/checkpoint-5", "a/adapter/x", ".hidden/x", "model/x"):
        written.write_run(tmp_path / name)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert list_names(tmp_path) == ["a", "deep/c", "deep/er/b"]


def test_links_are_followed_to_runs_alone(tmp_path: Path) -> None:
    top = tmp_path / "top"
    away = written.write_run(tmp_path / "away" / "x")
    written.write_run(tmp_path / "away" / "y")
    written.write_run(top / "a")
    (top / "loop").symlink_to(top)
    (top / "self").symlink_to("self")
    (top / "again").symlink_to(top / "a")
    (top / "linked").symlink_to(away)
    (top / "elsewhere").symlink_to(tmp_path / "away")
    found = list_names(top)
    assert len(found) == 2
    assert found[1] == "linked"
    (tmp_path / "start").symlink_to(top)
    assert len(list_names(tmp_path / "start")) == 2


def test_the_lines_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = written.write_run(tmp_path / "runs" / "one")
    written.write_evaluation(run)
    kept = {"which": "best", "step": 60, "metric": "eval_loss", "loss": 0.9}
    written.write_run(
        tmp_path / "runs" / "two", started="2026-11-28T04:00:00+00:00", kept=kept, status="failed"
    )
    died = {"started": "2026-11-29T04:00:00+00:00", "status": "running", "results": None}
    written.write_run(tmp_path / "runs" / "three", **died, updated="2026-11-29T04:00:07+00:00")
    broken = written.write_run(tmp_path / "runs" / "broken")
    (broken / "record.json").write_text("{")
    listing.list_runs(None, False)
    header, rule, *lines, unreadable = capsys.readouterr().out.splitlines()
    assert header.split() == "run base method steps evaluation exact time state".split()
    evaluated = ["0.996", "(best", "0.9", "at", "60)"]
    one = ["one", "owner/base", "lora", "100", *evaluated, "61.0%", "5m22s", "finished"]
    assert lines[0].split() == one
    assert lines[1].split() == ["two", "owner/base", "lora", "100", *evaluated, "5m22s", "failed"]
    assert lines[2].split()[:5] == ["three", "owner/base", "lora", "100", "0.996"]
    assert lines[2].endswith("7s  died (recorded as running, no process holds it)")
    assert unreadable.startswith("broken: unreadable: runs/broken/record.json:1: not valid JSON")
    assert len(lines) == 3


def test_the_same_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = written.write_run(tmp_path / "one")
    written.write_evaluation(run)
    (written.write_run(tmp_path / "broken") / "record.json").write_text("[]")
    listing.list_runs(tmp_path, True)
    out = capsys.readouterr().out
    broken, found = json.loads(out)
    assert found["evaluation"] == {
        "metric": "loss",
        "best": 0.9,
        "best_step": 60,
        "last": pytest.approx(0.996),
        "last_step": 100,
    }
    assert (found["exact"], found["steps"], found["state"]) == (0.61, 100, "finished")
    assert (found["seconds"], found["folder"]) == (321.5, "~/one")
    assert (broken["state"], "damaged or not ours" in broken["problem"]) == ("unreadable", True)
    assert str(tmp_path) not in out.replace(broken["problem"], "")


def test_a_run_of_its_own_folder_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(written.write_run(tmp_path / "one"))
    listing.list_runs(None, False)
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "one"


def test_what_the_run_judges_itself_by_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = written.make_record()
    record["recipe"]["training"]["metric_for_best_model"] = "accuracy"
    run = written.write_run(tmp_path / "one", **record)
    lines = [{"step": at, "eval_loss": 1.0, "eval_accuracy": at % 30 / 100} for at in (10, 20, 30)]
    written.write_lines(run / "metrics.jsonl", *lines)
    listing.list_runs(tmp_path, False)
    assert "  accuracy 0 (best 0.2 at 20)  " in capsys.readouterr().out
    written.write_lines(run / "metrics.jsonl", *lines, {"step": 40, "eval_accuracy": None})
    listing.list_runs(tmp_path, False)
    assert "  accuracy not finite (best 0.2 at 20)  " in capsys.readouterr().out


def test_a_name_that_is_cut_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (60, 61):
        written.write_run(tmp_path / ("r" * number))
    listing.list_runs(tmp_path, False)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert names == ["r" * 60, "r" * 59 + "…"]


def test_no_run_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path):
        with pytest.raises(LoraError, match=f"no run is below {tmp_path}"):
            listing.list_runs(folder, False)
    with pytest.raises(LoraError, match="none is not a folder") as caught:
        listing.list_runs(tmp_path / "none", False)
    assert caught.value.hint == "lora runs lists those of this folder"


def test_a_folder_that_may_not_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root reads every folder: the refusal is made here."""
    written.write_run(tmp_path / "one")
    closed = tmp_path / "closed"
    closed.mkdir()
    scan = os.scandir

    def refuse(folder: Path) -> object:
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    listing.list_runs(tmp_path, False)
    said = capsys.readouterr()
    assert "closed was not looked into: Permission denied" in said.err
    assert said.out.splitlines()[2].startswith("one ")


def test_many_runs_are_all_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for at in range(200):
        written.write_run(
            tmp_path / f"{at:03}", started=f"2026-11-27T{at // 60:02}:{at % 60:02}:00Z"
        )
    listing.list_runs(tmp_path, False)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == [f"{at:03}" for at in range(200)]
