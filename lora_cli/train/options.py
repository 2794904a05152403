"""What a run asks of its trainer beside upstream's TrainingArguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lora_cli.plan import flops
from lora_cli.recipe import Preference
from lora_cli.scoring import Scorer
from lora_cli.speed import FactoredDora
from lora_cli.train.dealing import Batches
from lora_cli.train.samples import Asked


@dataclass(frozen=True)
class RunOptions:
    """Settings of one run, given to the trainer's constructor."""

    run_id: str
    """Written into every checkpoint: only this run resumes from it, or deletes it."""
    work: flops.Work
    """What training on a token costs, and what the device can do at most."""
    keep_checkpoints: int | None
    """How many checkpoints stay on the disk; None for all."""
    loss_limit: float | None
    """A step's loss above it stops the run."""
    reduce_on_oom: bool
    """Whether the last step must be saved when memory runs out in the next one."""
    own_loss_head: bool
    """Whether the model computes its loss at tokens with a label only (`speed/loss_head.py`)."""
    loraplus: Mapping[str, float]
    """LoRA+'s arguments of PEFT's optimiser helper; empty for one learning rate."""
    dora_layers: Sequence[FactoredDora]
    """Layers whose norms are the same in all sequences of a step."""
    recipe: str = ""
    """As it is settled, in YAML, for trackers."""
    keeps_best: bool = False
    """Whether the step that evaluated best becomes the adapter."""
    patience: int | None = None
    """Stop after so many evaluations in a row that were no better."""
    least_gain: float = 0.0
    """How much better an evaluation has to be for that."""
    preference: Preference | None = None
    """What is made of the two answers of each row, where rows have two."""
    checks_start: bool = False
    """Whether the first pairs' loss has to be that of the reference."""
    scorer: Scorer | None = None
    """What computes the loss and the metrics of a task other than writing."""
    written_tokens: int = 0
    """How many tokens a target may have that is written at an evaluation; 0: none is written."""
    batches: Batches | None = None
    """How a step's rows come, where they are dealt over several processes."""
    sharded: Literal["fsdp", "deepspeed-zero3"] | None = None
    """By what each of several processes holds a part of the base."""
    subject: Sequence[str] = ()
    """What is trained on what, for the screen: method and base; the data."""
    planned: int | None = None
    """Bytes that the plan says the run takes at most, as this process's memory is measured; None
    where nobody asked the plan."""
    samples: Asked = Asked()
    """The prompts that are answered at evaluations."""
    replicas: int = 1
    """Copies of it that are sharded so, among all processes."""
