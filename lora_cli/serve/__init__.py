"""A model behind OpenAI's API, on this machine or as the command that starts another engine.

Its doors, in the order a reader needs them:

    serve      `lora serve`: the models of one base answer over HTTP
    commands   `lora serve --print`: what vLLM, SGLang, Ollama and llama.cpp are started with
"""

__all__ = [
    "commands",
    "serve",
]
