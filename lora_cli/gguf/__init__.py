"""GGUF: export, quantising, the engine, parity, and Ollama's Modelfile."""

__all__ = [
    "adapter",
    "engine",
    "export",
    "install",
    "quantize",
    "tools",
]
