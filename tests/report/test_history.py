"""What is read of a run: also of one that a crash has cut off, that is of another version, or whose
files are a stranger's.

Hermetic: runs written by hand. Alone: pytest tests/report/test_history.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.common import LoraError, UsageError, lock
from lora_cli.report import answers, facts, history, metrics, page
from tests.report import written


def test_the_lines_that_a_crash_has_left_are_read(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-30])
    found = history.read_run(run).metrics
    assert (found.lines, found.unreadable) == (105, 1)
    assert found.last_step == 100


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{}",
        b"[1, 2]",
        b'{"loss": 1.0}',
        b'{"step": "1"}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1.5}',
        b"[" * 100_000,
        b'{"step": 1, "x": ' + b"9" * 5000 + b"}",
        b'{"step": ' + b"9" * 300 + b"}",
    ],
    ids=range(10),
)
def test_a_line_that_is_none_of_ours_is_counted(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b'\n{"step": 2}\n')
    found = metrics.read_metrics(tmp_path / "m.jsonl")
    assert (found.lines, found.unreadable) == (2, 1)


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    text = '{"step": 1, "loss": 2}\n{"step": 2, "loss": null}\n{"step": 3, "loss": NaN}\n'
    (tmp_path / "m.jsonl").write_text(text + '{"step": 4, "loss": 1e999, "note": "x"}\n')
    found = metrics.read_metrics(tmp_path / "m.jsonl")
    assert found.get("loss").values == [2, None, None, None]
    assert found.get("loss").gaps == 3
    assert list(found.series) == ["loss"]


def test_a_pipe_in_the_place_of_metrics_is_a_problem_and_keeps_nobody_waiting(
    tmp_path: Path,
) -> None:
    run = written.write_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    assert history.read_run(run).problems == [f"{run}/metrics.jsonl is a pipe, not a file"]


def test_a_record_of_another_version_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    record = {"status": "finished", "recipe": {"method": "later"}, "tomorrow": [1]}
    written.write_json(tmp_path / "run" / "record.json", record)
    run = history.read_run(tmp_path / "run")
    assert (run.state, run.record.method, run.record.short_base) == ("finished", "later", "")
    assert run.record.duration is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "damaged or not ours"),
        ("{}", "it says of no run what that trained on"),
        ('{"status": 3}', "status: input should be a valid string"),
        ('{"status": "x", "base": {"name": []}}', "base.name: input should be a valid string"),
    ],
)
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(LoraError, match="record.json") as error:
        history.read_run(tmp_path)
    assert said in error.value.message


HOLDER = "from lora_cli.common import lock\nwith lock.hold_folder(__import__('pathlib').Path({!r})):\n print(1, flush=True)\n input()"


def test_running_is_who_holds_the_folder_and_died_who_does_not(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run", status="running")
    assert history.read_run(run).state == "died"
    command = [sys.executable, "-c", HOLDER.format(str(run))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = history.read_run(run)
        assert found.state == "running"
        assert found.owner is not None
        assert found.owner.startswith(f"process {holder.pid} on ")
        with pytest.raises(LoraError, match="in use by process"), lock.hold_folder(run):
            pass
        holder.kill()
    assert history.read_run(run).state == "died"


def test_what_was_made_of_a_run_is_found_in_it_and_beside_it(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    inside = written.write_merged(run / "merged")
    gguf = written.write_gguf(inside / "m-Q4_K_M.gguf")
    beside = written.write_merged(tmp_path / "out")
    written.write_merged(tmp_path / "another", run_id="another")
    written.write_gguf(tmp_path / "another.gguf", run_id="another")
    own = written.write_gguf(tmp_path / "own.gguf")
    found = history.read_run(run).made
    assert {made.path for made in found} == {inside, gguf, beside, own}
    assert [made.kind for made in found] == ["merged", "merged", "gguf", "gguf"]


def test_paths_are_runs_their_adapters_and_what_was_made_of_them(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "a" / "run")
    other = written.write_run(tmp_path / "a" / "other", id="other")
    merged = written.write_merged(tmp_path / "b" / "out")
    gguf = written.write_gguf(tmp_path / "b" / "x.gguf", run_id="other")
    first, second = history.read_runs([run / "adapter", merged, run, other, gguf])
    assert (first.folder, [made.path for made in first.made]) == (run, [merged])
    assert (second.folder, [made.path for made in second.made]) == (other, [gguf])


def test_what_was_made_before_a_run_went_on_is_none_of_its_adapter(tmp_path: Path) -> None:
    """Another adapter lies there since: neither its scores nor its parity are this one's."""
    changes: dict[str, object] = {"resumed": ["2026-11-27T05:30:00+00:00"]}
    run = written.write_run(tmp_path / "run", **changes)
    early = written.write_evaluation(run, "early")
    merged = written.write_merged(run / "merged")
    file = written.write_gguf(merged / "m-Q4_K_M.gguf")
    late = written.write_evaluation(run, "late") / "evaluation.json"
    late.write_text(late.read_text().replace("T05:00:00", "T06:00:00"))
    found = history.read_run(run)
    assert [folder.name for folder, _ in found.evaluations] == ["late"]
    assert not found.made
    before = {path.name for path in (early, merged, file)}
    assert {text.partition(" is of")[0].rpartition("/")[2] for text in found.problems} == before
    [given] = history.read_runs([run, file])
    assert not given.made
    assert given.problems == found.problems
    record = json.loads((run / "record.json").read_text()) | {"resumed": []}
    (run / "record.json").write_text(json.dumps(record))
    assert len(history.read_run(run).made) == 2


def test_paths_that_name_no_run_are_refused(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "a" / "run")
    merged = written.write_merged(tmp_path / "b" / "out", run_id="another")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    cases = {
        (tmp_path / "none",): "none does not exist",
        (tmp_path,): "is no run: there is no record.json in it",
        (run, tmp_path / "x.gguf"): "is a GGUF file without a record",
        (merged,): "no run is among these",
        (run, merged): "was made of none of these runs",
    }
    for paths, said in cases.items():
        with pytest.raises(UsageError) as error:
            history.read_runs(paths)
        assert said in error.value.message


def test_an_evaluation_that_is_damaged_is_a_problem_and_others_are_read(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    written.write_evaluation(run, "good")
    (written.write_evaluation(run, "bad") / "evaluation.json").write_text("{")
    found = history.read_run(run)
    assert [folder.name for folder, _ in found.evaluations] == ["good"]
    assert len(found.problems) == 1
    assert "bad/evaluation.json" in found.problems[0]


def test_rows_that_differ_come_first_and_whole_answers_are_compared(tmp_path: Path) -> None:
    same, long = "x" * 5000, "y" * 5000
    lines = [
        {"row": row, "place": f"f:{row}", "model": model, "prompt": "p", "expected": None}
        | {"answer": f"{long}{model}" if row == 8 else same}
        for model in ("base", "adapter")
        for row in range(10)
    ]
    path = written.write_lines(tmp_path / "answers.jsonl", *lines)
    path.write_text(f"{path.read_text()}cut off")
    rows, unreadable = answers.read_rows(path)
    assert (rows[0].row, [row.row for row in rows[1:3]], unreadable) == (8, [0, 1], 1)
    assert len(rows) == answers.MOST_ROWS


def test_rows_without_an_answer_are_no_damage(tmp_path: Path) -> None:
    line = {"place": "f", "model": "m", "prompt": None, "expected": None, "scores": {}}
    lines = [line | {"row": 1, "answer": None}, line | {"row": 2, "answer": "x"}]
    lines.append(line | {"row": 2, "model": "n", "answer": None})
    rows, unreadable = answers.read_rows(written.write_lines(tmp_path / "a.jsonl", *lines))
    assert [(row.row, row.answers) for row in rows] == [(2, {"m": "x", "n": "(none)"})]
    assert unreadable == 0


def test_a_strangers_text_is_cut_and_what_hides_is_written_out() -> None:
    assert answers.show("a\x1b[31mb\u202ec\td\ne\x07") == "a\\x1b[31mb\\u202ec\td\ne\\x07"
    shown = answers.show("é" * 1_000_000)
    assert len(shown) < 2000
    assert shown.endswith("… (cut here; 1,000,000 characters in all)")


def test_a_secret_at_the_cut_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "canary-0123456789abcdef")
    text = "x" * (answers.LONGEST - 8) + " canary-0123456789abcdef " + "y" * 9
    assert "canary" not in answers.show(text)


def test_commands_are_quoted_and_the_home_folder_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert (
        history.write_command("lora", "report", "/home/somebody/a b", "--json", "-x;rm")
        == "lora report ~/'a b' --json './-x;rm'"
    )


def test_a_record_is_read_with_whatever_json_holds(tmp_path: Path) -> None:
    """Fields of the wrong kind deeper in the record, which no model judges, are left out."""
    run = written.write_run(tmp_path / "run")
    record = json.loads((run / "record.json").read_text())
    record["results"] = {"steps": "many", "duration_s": [], "train_loss": None}
    record["data"] = {"rows": "x", "left_out": 3}
    record["kept"] = {"step": "x", "metric": 3}
    record["parameters"] = {"trainable": {}}
    written.write_json(run / "record.json", record)
    assert history.read_run(run).record.duration == 300


def test_a_checkpoint_s_scores_are_not_the_adapter_s() -> None:
    """Nor are those of the adapter of fewer steps, from before the run went on."""
    names = ("run/checkpoint-20", "run/adapter-20/", "run/adapter", "other")
    models = [{"kind": "adapter", "path": name} for name in names]
    found = history.Evaluation(models=models)
    assert found.find_kind("adapter") == models[2]
    assert history.Evaluation(models=models[:2]).find_kind("adapter") is None


def test_a_base_that_was_a_gguf_file_is_told(tmp_path: Path) -> None:
    made = {"file": "~/secret/x.gguf", "sha256": "ab" * 32, "type": "Q4_K", "dtype": "bfloat16"}
    run = written.write_run(tmp_path / "run", base={"name": "~/.cache/x", "made_from": made})
    said = "dequantised from x.gguf (Q4_K) to bfloat16"
    runs = [history.read_run(run)]
    found = facts.gather_run(runs[0], "run")
    assert found["summary"]["base_made_from"] == said
    assert found["provenance"]["names"]["base_gguf_sha256"] == "ab" * 32
    assert f"x, {said} ·" in page.render(runs, facts.gather(runs))
    plain = facts.gather_run(history.read_run(written.write_run(tmp_path / "other")), "other")
    assert "base_made_from" not in plain["summary"]
