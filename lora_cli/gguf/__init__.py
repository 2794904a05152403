"""A merged model or an adapter as GGUF files for llama.cpp: converted, quantised, and checked
there.

Its doors, in the order a reader needs them:

    export    `lora export-gguf`: a model becomes GGUF files that were opened in llama.cpp
    adapter   `--adapter-only`: a LoRA adapter becomes a GGUF to lay over its base
    quantize  a GGUF quantised with ggml's own quantiser
    engine    a GGUF opened in llama.cpp
    tools     llama.cpp's converters, found and run
    install   … installed
"""

__all__ = [
    "adapter",
    "engine",
    "export",
    "install",
    "quantize",
    "tools",
]
