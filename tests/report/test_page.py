"""The page: every number of report.json stands on it, nothing is fetched, nothing runs, and what a
model says stays text.

Hermetic: runs written by hand. Alone: pytest tests/report/test_page.py
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lora_cli.common import LoraError, UsageError
from lora_cli.report import facts, history, page, report
from tests.report import written

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What a browser would make of the page: its tags, its texts, the values of its `data`
    elements; and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.values: dict[str, list[str]] = {}
        self.texts: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag == "data":
            self.values.setdefault(str(dict(attrs)["value"]), []).append("")
            self.value = str(dict(attrs)["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)
        if self.open and self.open[-1] == "data":
            self.values[self.value][-1] += data


def list_numbers(data: Any) -> Iterator[float]:
    if isinstance(data, (dict, list)):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from list_numbers(inner)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield data


def check(target: Path) -> tuple[Page, dict[str, Any]]:
    """Read a page and its numbers, and hold them against each other."""
    said = json.loads(target.with_suffix(".json").read_text())
    text = target.read_text()
    read = Page(text)
    numbers = list(list_numbers(said))
    missing = [number for number in numbers if json.dumps(number) not in read.values]
    assert not missing
    assert all(shown.strip() for texts in read.values.values() for shown in texts)
    check_quiet(read)
    assert not re.search("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    return read, said


def check_quiet(read: Page) -> None:
    """Nothing is fetched and nothing runs."""
    assert not {tag for tag, _ in read.tags} & {"script", "img", "iframe", "object", "form", "base"}
    for tag, attributes in read.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "action", "background", "poster", "ping"), tag
            if name in ("href", "xlink:href"):
                assert str(value).startswith("#") or (tag, value) == ("link", "data:,")
            if name == "style":
                assert re.fullmatch(r"width:[\d.]+%", str(value))
    assert not re.search(r"url\(|@import|expression", read.style)
    policies = [each for tag, each in read.tags if tag == "meta" and "http-equiv" in each]
    assert policies[0]["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with all that belongs to it."""
    folder = written.write_run(tmp_path / "one")
    written.write_samples(folder, (0, "a prompt", "before"), (100, "a prompt", "after"))
    written.write_evaluation(folder)
    written.write_gguf(written.write_merged(folder / "merged") / "m-Q4_K_M.gguf")
    return folder


def test_one_run_with_everything(run: Path) -> None:
    read, said = check(report.write_report([run], None))
    assert len(list(list_numbers(said))) > 100
    kinds = [each["kind"] for each in said["runs"][0]["verdict"]]
    assert kinds == ["yes", "yes", "look", "yes", "yes", "yes", "yes", "yes", "look"]
    charts = [attributes for tag, attributes in read.tags if tag == "svg" and "role" in attributes]
    assert len(charts) == 6
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for chart in charts:
        assert set(str(chart["aria-labelledby"]).split()) <= set(ids)
    keys = [each["key"] for each in said["runs"][0]["recipe"]]
    assert "lora.r" in keys
    assert "training.packing" not in keys  # auto chose it
    text = " ".join(read.texts)
    for part in ("a prompt", "before", "after", "no idea about 1", "dropped: over 128 tokens"):
        assert part in text
    assert "best: step 60" in text


def test_three_runs_are_compared(run: Path, tmp_path: Path) -> None:
    record = written.make_record(id="other")
    record["recipe"]["training"]["learning_rate"] = 0.002
    other = written.write_run(tmp_path / "other", **record)
    third = written.write_run(tmp_path / "third", id="third", status="failed", results=None)
    read, said = check(report.write_report([run, other, third], tmp_path / "all.html"))
    assert said["differences"] == [
        {"key": "training.learning_rate", "values": [0.0005, 0.002, 0.0005]}
    ]
    assert (tmp_path / "all.json").is_file()
    assert "How their recipes differ" in " ".join(read.texts)
    assert [each["name"] for each in said["runs"]] == ["one", "other", "third"]


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    """By the folders around them, in the legends of charts too."""
    more = [written.write_run(tmp_path / place) for place in ("a/x/run", "b/x/run", "c/run")]
    read, said = check(report.write_report([run, *more], tmp_path / "all.html"))
    names = [each["name"] for each in said["runs"]]
    assert names == ["one", "a/x/run", "b/x/run", "c/run"]
    for name in names:
        assert sum(text.strip() == name for text in read.texts) > 4


def test_runs_with_nothing_but_a_record(tmp_path: Path) -> None:
    """Another version's, with fields that are missing, or of kinds that nobody writes."""
    records: list[dict[str, Any]] = [
        {"status": "finished"},
        {"status": "running", "started": "never"},
        {"recipe": {"training": {"learning_rate": [1]}, "data": 3, "new": {"x": 1e400}}},
        {"base": {"name": "../x"}, "results": {"steps": {}}, "kept": {"which": "best"}},
        {"status": "later", "holdout": {"rows": 3}, "data": {"read": 5}, "processes": 4},
        {"status": "failed", "data": {"tokens": 3, "trained_tokens": 0}, "parent": {"id": 1}},
    ]
    for at, record in enumerate(records):
        text = json.dumps(record).replace("Infinity", "1")
        (tmp_path / f"{at}").mkdir()
        (tmp_path / f"{at}" / "record.json").write_text(text)
        check(report.write_report([tmp_path / f"{at}"], None))
    check(report.write_report([tmp_path / f"{at}" for at in range(6)], tmp_path / "all.html"))


def test_a_run_of_which_no_evaluation_was_finite(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "run")
    lines = [{"step": step, "eval_loss": math.nan} for step in (10, 20)]
    written.write_lines(run / "metrics.jsonl", *lines)
    read, _ = check(report.write_report([run], None))
    assert "2 evaluations were not finite" in " ".join(read.texts)
    assert " ".join(read.texts).count("not finite") >= 3
    written.write_lines(run / "metrics.jsonl", {"step": 5, "eval_loss": 0.5}, *lines)
    read, said = check(report.write_report([run], None))
    assert "; last not finite" in " ".join(read.texts)
    assert "evaluation_last" not in said["runs"][0]["summary"]


def test_a_fault_of_the_page_is_none_of_a_chat_template() -> None:
    """Which is what the table of libraries' errors takes jinja's for."""
    with pytest.raises(RuntimeError, match=r"the report's template: '\w+' is undefined"):
        page.render([], {"runs": []})


BAD = "</pre></svg></style><script>alert(1)</script><img src=x onerror=y>\"'>{{ 7*7 }}\x1b[31m\u202e\0\x9b&lt;"


def spoil(data: Any) -> Any:
    """Return data in which every text goes on as markup of a stranger's."""
    if isinstance(data, dict):
        return {
            key: spoil(value) if key not in ("id", "status") else value
            for key, value in data.items()
        }
    if isinstance(data, list):
        return [spoil(each) for each in data]
    return f"{data}{BAD}" if isinstance(data, str) else data


def test_what_strangers_write_stays_text(run: Path) -> None:
    for file in run.rglob("*.json*"):
        if file.suffix == ".jsonl":
            lines = [spoil(json.loads(line)) for line in file.read_text().splitlines()]
            written.write_lines(file, *lines)
        else:
            data = json.loads(file.read_text())
            kept = {name: data[name] for name in ("parent", "command") if name in data}
            if "evaluation" not in file.name:  # the kinds of models are words of ours
                data = spoil(data) | kept
            else:
                data["data"] = spoil(data["data"])
                for model in data["models"]:
                    model["label"] += BAD
                    model["metrics"] = {
                        f"{name}{BAD}": value for name, value in model["metrics"].items()
                    }
            written.write_json(file, data)
    record = json.loads((run / "record.json").read_text())
    written.write_json(run / "record.json", record | {"versions": {BAD: BAD}, "status": f"x{BAD}"})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, f"eval_{BAD}": 1.5}) + "\n")
    read, _ = check(report.write_report([run], None))
    text = "".join(read.texts)
    assert text.count("<script>alert(1)</script>") > 20
    assert "{{ 7*7 }}" in text
    assert "\\x1b[31m\\u202e\\x00\\x9b" in text


def test_the_sample_of_the_step_that_was_kept_is_shown(run: Path) -> None:
    kept = {"which": "best", "step": 60, "metric": "eval_loss"}
    written.write_json(run / "record.json", written.make_record(kept=kept))
    written.write_samples(run, *((step, "q", f"at {step}") for step in (0, 60, 100)))
    read, said = check(report.write_report([run], None))
    [sample] = said["runs"][0]["samples"]["prompts"]
    assert (sample["first"], sample["last"], sample["last_step"]) == ("at 0", "at 60", 60)
    assert "adapter, step " in read.texts


def test_megabytes_are_cut(run: Path) -> None:
    written.write_samples(run, (0, "p" * 500_000, "a" * 3_000_000), (5, "q", "b" * 3_000_000))
    target = report.write_report([run], None)
    check(target)
    assert target.stat().st_size < 200_000


def test_no_secret_and_no_home_folder_stand_on_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = "canary-0123456789abcdef"
    monkeypatch.setenv("MY_API_KEY", secret)
    monkeypatch.setenv("HOME", str(tmp_path))
    written.write_samples(run, (0, f"ask {secret}", f"in {tmp_path}/x hf_{'a1B2' * 6} {secret}"))
    record = written.make_record()
    record["recipe"]["data"]["path"] = f"{tmp_path}/rows.jsonl"
    record["base"]["name"] = f"{tmp_path}/base"
    written.write_json(run / "record.json", record)
    target = report.write_report([run], None)
    for file in (target, target.with_suffix(".json")):
        text = file.read_text()
        assert secret not in text
        assert str(tmp_path) not in text
        assert "hf_a1B2" not in text
        assert "~/rows.jsonl" in text


def test_a_hundred_thousand_steps_are_few_bytes_and_keep_their_extremes(tmp_path: Path) -> None:
    run = written.write_run(tmp_path / "long")
    lines = written.make_metrics(100_000, every=1000)
    lines[50_001]["loss"] = 77.0
    for line in lines[70_000:70_400]:
        line["grad_norm"] = None
    written.write_lines(run / "metrics.jsonl", *lines)
    target = report.write_report([run], None)
    text = target.read_text()
    drawings = re.findall("<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 6
    assert sum(map(len, drawings)) < 100_000
    _, said = check(target)
    [loss] = [each for each in said["runs"][0]["curves"] if each["name"] == "loss"]
    assert (loss["most"], loss["points"]) == (77.0, 100_000)
    [norm] = [each for each in said["runs"][0]["curves"] if each["name"] == "grad_norm"]
    assert norm["not_finite"] == sum(line.get("grad_norm", 0) is None for line in lines)
    assert len(said["runs"][0]["evaluations"]["shown"]) <= facts.MOST_EVALUATIONS + 2


def test_what_is_no_report_is_not_replaced(run: Path, tmp_path: Path) -> None:
    for name in ("report.html", "report.json"):
        (run / name).write_text('{"command": "mine"}')
        with pytest.raises(UsageError, match=f"{name} is there, and no report of lora's"):
            report.write_report([run], None)
        assert (run / name).read_text() == '{"command": "mine"}'
        (run / name).unlink()
    target = report.write_report([run], None)
    assert report.write_report([run], None) == target
    for output, said in {
        tmp_path / "none" / "x.html": "is not a folder",
        tmp_path / "x.json": "the numbers get that name",
        run: "is there, and no report",
    }.items():
        with pytest.raises(UsageError, match=said):
            report.write_report([run], output)


def test_a_page_holds_some_runs_and_says_so(tmp_path: Path) -> None:
    runs = [written.write_run(tmp_path / f"{at}", id=f"{at}") for at in range(report.MOST + 1)]
    with pytest.raises(UsageError, match="these are 31 runs, and a page holds 30"):
        report.write_report(runs, tmp_path / "x.html")
    check(report.write_report(runs[: report.MOST], tmp_path / "x.html"))


def test_a_report_that_fails_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report.write_after(run, history.stamp(run))
    assert not (run / "report.html").exists()
    report.write_after(run, 0)
    assert (run / "report.html").is_file()
    monkeypatch.setattr(page, "render", lambda *given: 1 / 0)
    report.write_after(run, 0)
    assert (
        "warning: no report was written: ZeroDivisionError: division by zero"
        in capsys.readouterr().err
    )
    (run / "record.json").write_text("{")
    report.write_after(run, 0)
    assert "warning: no report was written: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")

    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr(report.files, "write_text", fail)
    said = r"report\.html cannot be written: No space left on device"
    with pytest.raises(LoraError, match=said) as raised:
        report.write_report([run], None)
    assert raised.value.hint == f"df -h {run}"
    error = OSError(errno.EACCES, "Permission denied")
    with pytest.raises(LoraError, match="cannot be written: Permission denied") as raised:
        report.write_report([run], None)
    assert raised.value.hint == f"ls -ld {run}"


def test_pairs_have_curves_of_their_own(tmp_path: Path) -> None:
    """How far chosen answers are above rejected ones, and a loss that is no token's."""
    recipe = written.make_record()["recipe"] | {"objective": "dpo"}
    run = written.write_run(tmp_path / "pairs", recipe=recipe)
    lines = written.make_metrics()
    for line in lines:
        if "loss" in line:
            line |= {"rewards_margin": line["step"] / 50, "rewards_accuracy": 1 - 1 / line["step"]}
    written.write_lines(run / "metrics.jsonl", *lines)
    target = report.write_report([run], None)
    _, said = check(target)
    curves = {each["name"]: each for each in said["runs"][0]["curves"]}
    assert curves["loss"]["unit"] == curves["eval_loss"]["unit"] == "a mean over pairs"
    assert (curves["rewards_margin"]["first"], curves["rewards_margin"]["last"]) == (0.02, 2.0)
    assert curves["rewards_accuracy"]["last"] == 0.99
    assert "Margin of rewards" in target.read_text()
    plain = written.write_run(tmp_path / "plain")
    together = report.write_report([run, plain], tmp_path / "both.html").read_text()
    assert "a mean over pairs or nats per trained token" in together


def test_answers_with_a_label_have_a_divergence(tmp_path: Path) -> None:
    recipe = written.make_record()["recipe"] | {"objective": "kto"}
    run = written.write_run(tmp_path / "votes", recipe=recipe)
    lines = written.make_metrics()
    for line in lines:
        if "loss" in line:
            line |= {"rewards_margin": 0.5, "kl": line["step"] / 10}
    written.write_lines(run / "metrics.jsonl", *lines)
    _, said = check(report.write_report([run], None))
    curves = {each["name"]: each for each in said["runs"][0]["curves"]}
    assert curves["loss"]["unit"] == "a mean over answers"
    assert curves["kl"]["last"] == 10


def test_the_loss_of_labels_is_no_token_s(tmp_path: Path) -> None:
    recipe = written.make_record()["recipe"] | {"task": "sequence_classification"}
    run = written.write_run(tmp_path / "labels", recipe=recipe)
    _, said = check(report.write_report([run], None))
    [loss] = [each for each in said["runs"][0]["curves"] if each["name"] == "loss"]
    assert loss["unit"] == "a mean over labels"
