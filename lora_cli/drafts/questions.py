"""What is asked where a person sits at a terminal, each with what holds if they press Enter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from lora_cli.common import LoraError, escape, ui

Value = TypeVar("Value")


def is_answered() -> bool:
    """Return whether there is a terminal to ask at, and to read what is typed from."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


class Questions:
    """Asks, or where it is not to (`asks` is false) takes what each question has for an answer."""

    def __init__(self, asks: bool) -> None:
        self.asks = asks

    def ask(self, what: str, default: Value, read: Callable[[str], Value]) -> Value:
        """Return what is answered to `what`, as `read` makes it of the text; `default` for none.

        What `read` refuses, with a LoraError, is said, and it is asked again. Raises
        KeyboardInterrupt where no more can be typed.
        """
        shown = f"{default:g}" if isinstance(default, float) else default
        while self.asks:
            ui.ask(f"{what} [{shown}]: ")
            line = sys.stdin.readline()
            if not line:
                raise KeyboardInterrupt
            if not line.strip():
                break
            try:
                return read(line.strip())
            except LoraError as error:
                ui.say(f"  {error.message}")
        return default

    def choose(self, what: str, among: Sequence[str], default: str) -> str:
        """Return one of several answers, or of their numbers from 1."""

        def read(text: str) -> str:
            if text in among:
                return text
            if text.isdecimal() and 0 < int(text) <= len(among):
                return among[int(text) - 1]
            raise LoraError(f"one of {', '.join(among)}")

        listed = ", ".join(f"{number} {each}" for number, each in enumerate(among, 1))
        return self.ask(f"{what}: {escape(listed)}", default, read)

    def confirm(self, what: str) -> bool:
        """Return whether the answer is yes, which is what holds."""

        def read(text: str) -> str:
            if text.lower() not in ("y", "yes", "n", "no"):
                raise LoraError("yes or no")
            return text.lower()[0]

        return self.ask(what, "y", read) == "y"
