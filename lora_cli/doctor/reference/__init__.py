"""LoRA, rsLoRA, DoRA and NF4 as published, in plain torch, to compare PEFT and bitsandbytes with.

Written from the papers' formulas, for reading; not for speed. Nothing that trains, merges or
exports imports it: `oracle.py` compares the installed libraries with it, for the tests and for
`lora doctor`.

    layers.py   LoRALinear, LoRAEmbedding, LoRAConv2d and the three DoRA ones
    nf4.py      NF4Tensor and QLoRALinear
    tree.py     LoraModel: a whole module tree adapted, saved, swapped, merged

Throughout, a layer with weight W₀ and input x computes

    LoRA    h = W₀x + b + s·BAx               s = α/r, or α/√r (rsLoRA);  merged W = W₀ + s·BA
    DoRA    h = m ⊙ (W₀x + s·BAx)/‖V‖ + b      V = W₀ + s·BA;              merged W = m ⊙ V/‖V‖

LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732. QLoRA and NF4:
Dettmers et al. 2023, arXiv:2305.14314. DoRA: Liu et al. 2024, arXiv:2402.09353.
"""
