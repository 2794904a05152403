"""Other tools' configuration files as recipes: axolotl's, LLaMA-Factory's, TRL's and Unsloth's.

Its door:

    import_file                   a file as a recipe, with what became of each of its keys
"""

from lora_cli.translate.import_file import import_file

__all__ = ["import_file"]
