"""A run: from a settled recipe to an adapter, in a folder that one process owns and that can be
resumed.

Its doors, in the order a reader needs them:

    run      `lora train`: a recipe becomes an adapter
    measure  two steps of a recipe, to learn how long its steps take
    trial    a miniature trained for a step, for what the libraries refuse
"""

__all__ = [
    "measure",
    "run",
    "trial",
]
