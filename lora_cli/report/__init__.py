"""What runs have been, and whether they worked: listed, and shown as one page.

Its doors, in the order a reader needs them:

    history   a run's folder, read: its record, curves, samples, evaluations and what was made of it
    listing   `lora runs`: the runs below a folder, a line each
    report    `lora report`: one page of one run or several, and the numbers on it as JSON
"""

__all__ = [
    "history",
    "listing",
    "report",
]
