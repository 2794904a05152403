"""Answers to a recipe's sample prompts while it trains, in samples.jsonl: those of the base as
training begins, and at each evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lora_cli.common import files, privacy, provenance
from lora_cli.models import answering
from lora_cli.train import saved_state


class Asked(NamedTuple):
    """What a recipe asks for."""

    prompts: Sequence[str] = ()
    most: int = 0
    """Tokens of an answer, at most."""
    stops: Sequence[int] = ()
    """The tokens that trained answers end with."""


class Samples:
    """The prompts and the file of a run; its lines are counted, so that a run that goes on cuts it
    to those of its checkpoint."""

    def __init__(self, folder: Path, asked: Asked) -> None:
        self.file = folder / provenance.SAMPLES
        self.asked = asked
        self.lines = 0
        self.last: int | None = None
        """The step of the newest answers."""
        self.first_answers: dict[str, str] = {}
        """Of the model as training begins, by their prompts."""
        self.answers: dict[str, str] = {}
        """The newest ones."""

    def answer(self, network: PreTrainedModel, tokenizer: Any) -> list[str]:
        """Return the answers of a model in eval mode."""
        most, stops = self.asked.most, self.asked.stops
        return [
            answering.write_answer(network, tokenizer, prompt, most, stops)
            for prompt in self.asked.prompts
        ]

    def add(self, step: int, answers: Sequence[str]) -> None:
        """Append the answers of a step; those of step 0 begin the file."""
        lines = [
            privacy.mask_each({"step": step, "prompt": prompt, "answer": answer})
            for prompt, answer in zip(self.asked.prompts, answers)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        if not step:
            files.write_text(self.file, "")
            self.lines = 0
            self.first_answers = dict(zip(self.asked.prompts, answers))
        self.answers = dict(zip(self.asked.prompts, answers))
        with self.file.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        self.lines += len(lines)
        self.last = step

    def show(self) -> tuple[str, str, str] | None:
        """Return the first prompt with the first and the newest answer; None before there is
        one."""
        prompt = next(iter(self.asked.prompts), "")
        if prompt not in self.answers:
            return None
        return prompt, self.first_answers.get(prompt, ""), self.answers[prompt]

    def flush(self) -> int:
        """Bring the file to the disk; return its lines."""
        if self.lines:
            with self.file.open("rb") as file:
                os.fsync(file.fileno())
        return self.lines

    def cut(self, lines: int) -> None:
        """Drop the lines that were written after the checkpoint that a run goes on from."""
        if not lines and not self.file.is_file():
            return
        answers = saved_state.cut_lines(self.file, lines, {"prompt": str, "answer": str})
        self.lines = len(answers)
        for found in answers:
            self.last = found["step"]
            self.answers[found["prompt"]] = found["answer"]
            if not found["step"]:
                self.first_answers[found["prompt"]] = found["answer"]
