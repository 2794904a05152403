"""Fine-tune language models with LoRA, QLoRA and DoRA from YAML recipes; merge and export what was
trained."""

__version__ = "0.2.0"
