"""A recipe drafted from rows: what they are, what can be learnt from them, what fits this machine.

Its doors, in the order a reader needs them:

    questions   what is asked at a terminal
    write       `lora init`: rows and a base become a recipe
"""

__all__ = [
    "questions",
    "write",
]
