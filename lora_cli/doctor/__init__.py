"""Checks of the machine and of the installed libraries, against a reference implementation in
`reference/`.

Its doors:

    checks   `lora doctor`: what is installed, tried
    cached   `lora cache`: what is kept in the cache
"""

__all__ = [
    "cached",
    "checks",
]
