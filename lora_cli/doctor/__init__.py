"""Checks of the machine and of the installed libraries, against a reference implementation in
`reference/`.

Its door:

    checks   `lora doctor`: what is installed, tried
"""

__all__ = [
    "checks",
]
