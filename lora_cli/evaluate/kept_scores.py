"""Keep what an evaluation has computed of each model: while it runs, a line of JSON for each batch;
at the end `answers.jsonl` and `evaluation.json`, from which nothing has to be computed again.

Both are known by a fingerprint of the model, the data and how answers are drawn. A process that is
killed leaves whole lines, and perhaps a part of one, which is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import LoraError, files, quote, read_json, ui, write_json, write_text

EVALUATION = "evaluation.json"
ANSWERS = "answers.jsonl"
PART = ".answers-{}.part.jsonl"
GENERAL = 0
"""What is known of the general text stands under this number; rows count from 1."""


class Kept:
    """What is known of the rows of one model, by their numbers."""

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        known: Mapping[int, dict[str, Any]],
        fresh: bool = False,
    ) -> None:
        self.fingerprint = fingerprint
        self.file = folder / PART.format(fingerprint[:16])
        self.rows: dict[int, dict[str, Any]] = {number: dict(row) for number, row in known.items()}
        self.begun = 0
        """How many rows a killed process had left something of."""
        if fresh:
            self.remove()
        self._read()

    def _read(self) -> None:
        """Take in what a killed process has left, and cut the line off that it was writing."""
        if not self.file.is_file():
            return
        whole = self.file.read_bytes()
        ends = whole.rfind(b"\n") + 1
        if ends < len(whole):
            with self.file.open("r+b") as stream:
                stream.truncate(ends)
        for number, line in enumerate(whole[:ends].splitlines(), 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LoraError(
                    f"{self.file}:{number} is damaged: {error}", f"rm {quote(self.file)}"
                ) from None
        self.begun = len(self.rows.keys() - {GENERAL})

    def _take(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            row = dict(record)
            self.rows.setdefault(int(row.pop("row")), {}).update(row)

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Take in what a batch said of rows, and write it down at once."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(f"{json.dumps(records, ensure_ascii=False)}\n")
        self._take(records)

    def lacks(self, numbers: Iterable[int], *keys: str) -> bool:
        """Return whether none of these is known of some of the rows."""
        return any(
            not any(key in self.rows.get(number, {}) for key in (*keys, "error"))
            for number in numbers
        )

    def forget_errors(self) -> None:
        """Let rows that could not be scored be tried again."""
        for row in self.rows.values():
            row.pop("error", None)

    def get(self, number: int) -> dict[str, Any]:
        """Return what is known of a row."""
        return self.rows.get(number, {})

    def remove(self) -> None:
        """Remove what is only for a process that is killed."""
        self.file.unlink(missing_ok=True)


class Finished:
    """What an evaluation that was finished in a folder says of each model, by its fingerprint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.evaluation: dict[str, Any] = {}
        self.by_model: dict[str, dict[int, dict[str, Any]]] = {}
        if (folder / EVALUATION).is_file():
            self._read()

    def _read(self) -> None:
        """Read it; one whose answers are not those that it was written with is as none."""
        try:
            found = read_json(self.folder / EVALUATION)
            text = (self.folder / ANSWERS).read_bytes()
            assert found["command"] == "evaluate" and found["answers_sha256"] == _hash(text)
            rows: dict[str, dict[int, dict[str, Any]]] = {}
            for line in map(json.loads, text.splitlines()):
                rows.setdefault(line["model"], {})[int(line["row"])] = _read_line(line)
            for model in found["models"]:
                own = rows.get(model["label"], {})
                own[GENERAL] = {"general": (model["forgetting"] or {}).get("passages")}
                self.by_model[model["fingerprint"]] = own
            self.evaluation = found
        except (LoraError, OSError, ValueError, KeyError, TypeError, AssertionError):
            self.by_model = {}
            ui.say(f"{self.folder / EVALUATION} is not as it was written: it is not read")

    def find_tasks(self, key: str) -> dict[str, Any] | None:
        """Return what lm-eval's tasks gave under this key."""
        for model in self.evaluation.get("models", []):
            if (model.get("tasks") or {}).get("key") == key:
                return model["tasks"]
        return None


def _read_line(line: dict[str, Any]) -> dict[str, Any]:
    """Return what was computed of a row, from its line in answers.jsonl."""
    names = ("answer", "ended", "foreseen", "tokens", "no_loss", "error")
    kept: dict[str, Any] = {name: line[name] for name in names if line.get(name) is not None}
    if "tokens" in line:
        kept["loss"] = line["scores"].get("loss")
    return kept


def write_finished(
    folder: Path, evaluation: dict[str, Any], lines: Iterable[dict[str, Any]]
) -> None:
    """Write both files; the second names the content of the first."""
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    write_text(folder / ANSWERS, text)
    write_json(folder / EVALUATION, evaluation | {"answers_sha256": _hash(text.encode())})


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def refuse_other_folder(folder: Path) -> None:
    """Raise LoraError for a folder that holds something else than an evaluation."""
    files.refuse_link(folder)
    if folder.exists() and not folder.is_dir():
        raise LoraError(f"{folder} is a file", "--out DIR takes another name")
    if not folder.is_dir():
        return
    others = [
        file.name
        for file in folder.iterdir()
        if file.name not in (EVALUATION, ANSWERS) and not file.name.startswith(".")
    ]
    if others and not (folder / EVALUATION).is_file():
        raise LoraError(
            f"{folder} holds {sorted(others)[0]}, and no evaluation", "--out DIR takes another name"
        )
