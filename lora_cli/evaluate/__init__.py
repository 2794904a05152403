"""What a model says: generate, chat and verify."""

__all__ = [
    "chat",
    "generate",
    "verify",
]
