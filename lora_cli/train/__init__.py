"""A run: from a settled recipe to an adapter, in a folder that one process owns and that can be
resumed.

Its doors, in the order a reader needs them:

    run      `lora train`: a recipe becomes an adapter
    trial    a miniature trained for a step, for what the libraries refuse
"""

__all__ = [
    "run",
    "trial",
]
