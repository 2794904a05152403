"""GGUF: export, quantising, the engine, parity, and Ollama's Modelfile."""
