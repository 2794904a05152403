"""What a recipe needs and becomes on this machine: hardware, `auto`, memory, sizes; the verbs
`check` and `plan`."""

__all__ = [
    "auto",
    "check",
    "flops",
    "hardware",
    "memory",
    "show",
    "sizes",
]
