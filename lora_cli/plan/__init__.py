"""What a recipe needs and becomes on this machine, found before any weights are loaded.

Its doors, in the order a reader needs them:

    hardware   the device a run is for
    auto       every `auto` of a recipe replaced
    settled    … and all that a recipe becomes, with its base and the adapter it trains on
    sizes      the adapter's size, the steps, how full the batches are
    memory     what a recipe needs of a device's memory, item by item
    outlook    … said before it is looked at closely
    weightless a recipe's network without weights
    spread     what several processes need and lose
    flops      operations of training on a token, and the share of a device's peak
    check      `lora check`: what a recipe would train on
    show       `lora plan`: what a recipe would need

    auto_choices    what an `auto` became, and why
    configurations  upstream's configurations, built once, so that it refuses at once
"""

__all__ = [
    "auto",
    "auto_choices",
    "check",
    "configurations",
    "flops",
    "hardware",
    "memory",
    "outlook",
    "settled",
    "show",
    "sizes",
    "spread",
    "weightless",
]
