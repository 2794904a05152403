"""Several processes that train together: started, met, agreed on everything, ended together; and
the files that have a cluster start them.

Its doors, in the order a reader needs them:

    place    which of several processes this one is, by what a launcher left in the environment
    launch   starts the processes of `--nproc N`; their first failure is the job's
    shares   who of them gets which rows of a batch
    ranks    the processes as a group: what one knows and all do
    jobs     the files that start them on a cluster
"""

__all__ = [
    "jobs",
    "launch",
    "place",
    "ranks",
    "shares",
]
