"""What a recipe needs and becomes on this machine, found before any weights are loaded.

Its doors, in the order a reader needs them:

    hardware   the device a run is for
    auto       what each `auto` of a recipe becomes, and why
    settled    … and all that a recipe becomes, with its base and the adapter it trains on
    sizes      the adapter's size, the steps, how full the batches are
    memory     what a recipe needs of a device's memory, item by item
    rehearsal  a recipe's network without weights, and a step of it
    spread     what several processes need and lose
    flops      operations of training on a token, and the share of a device's peak
    check      `lora check`: what a recipe would train on
    show       `lora plan`: what a recipe would need
"""

__all__ = [
    "auto",
    "check",
    "flops",
    "hardware",
    "memory",
    "rehearsal",
    "settled",
    "show",
    "sizes",
    "spread",
]
