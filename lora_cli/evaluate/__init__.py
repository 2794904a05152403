"""What a model says, and whether two forms of one model say the same.

Its doors, in the order a reader needs them:

    predict    `lora predict`: what models that tell something of rows say of them
    predictors … how rows are read, and how much is said of them
    generate   `lora generate`: several models answer the same prompts side by side
    chat       `lora chat`: a conversation with one model
    score      `lora evaluate`: base, adapter, merged model and GGUF file scored on held-out rows
    verify     `lora verify`: adapter, merged model and GGUF file compared

    answerers       what every answerer is asked, whatever form its model has
    open_answerers  … opened, by what a path stands for
    hf_answerers    … by transformers: a model with one of its adapters, or none
    loaded_bases    … and the bases under these adapters, each loaded once
"""

__all__ = [
    "answerers",
    "chat",
    "generate",
    "hf_answerers",
    "loaded_bases",
    "open_answerers",
    "predict",
    "predictors",
    "score",
    "verify",
]
