"""A merged model or an adapter as GGUF files for llama.cpp: converted, quantised, and checked
there.

Its doors, in the order a reader needs them:

    export    `lora export-gguf`: a model becomes GGUF files that were opened in llama.cpp
    adapter   `--adapter-only`: a LoRA adapter becomes a GGUF to lay over its base
    ggml      ggml's types and its quantiser
    header    what stands before a GGUF's weights
    engine    a GGUF opened in llama.cpp
    llama_api its logits at every position
    llama_writer  its answers to many conversations side by side
    parity    whether they are those of the model it was made from
    modelfile  Ollama's file beside it
    tools     llama.cpp's converters, found and run
    install   … installed
"""

__all__ = [
    "adapter",
    "engine",
    "export",
    "header",
    "ggml",
    "install",
    "llama_api",
    "llama_writer",
    "modelfile",
    "parity",
    "tools",
]
