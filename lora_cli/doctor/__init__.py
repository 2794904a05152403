"""Checks of what is installed, and the reference implementation they are held against."""

__all__ = [
    "checks",
]
