"""Other tools' configuration files as recipes: axolotl's, LLaMA-Factory's, TRL's and Unsloth's.

Its doors:

    import_file                   a file as a recipe, with what became of each of its keys
    refuse_other_tools            for a file that is given as a recipe, and is another tool's
"""

from lora_cli.translate.import_file import import_file
from lora_cli.translate.tools import refuse_other_tools

__all__ = ["import_file", "refuse_other_tools"]
