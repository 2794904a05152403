"""Ask models: generate, chat and verify."""

__all__ = [
    "chat",
    "generate",
    "verify",
]
