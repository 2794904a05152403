"""Check what is installed, also against a reference implementation."""

__all__ = [
    "checks",
]
