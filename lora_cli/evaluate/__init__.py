"""What a model says, and whether two forms of one model say the same.

Its doors, in the order a reader needs them:

    predict    `lora predict`: what models that tell something of rows say of them
    predictors … how rows are read, and how much is said of them
    generate   `lora generate`: several models answer the same prompts side by side
    chat       `lora chat`: a conversation with one model
    score      `lora evaluate`: base, adapter, merged model and GGUF file scored on held-out rows
    answerers  what answers, whatever form a model has
    verify     `lora verify`: adapter, merged model and GGUF file compared
    answerers  … what answers conversations, for other rooms
"""

__all__ = [
    "answerers",
    "chat",
    "generate",
    "predict",
    "predictors",
    "score",
    "verify",
]
