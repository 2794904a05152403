"""A model goes to the hub, or gets its card.

Its doors, in the order a reader needs them:

    push    `lora push`: what is to be uploaded is listed, looked through, sent and compared
    show    `lora card`: the card of an adapter, a merged model or a GGUF file
"""

__all__ = ["push", "show"]
