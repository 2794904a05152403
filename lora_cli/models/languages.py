"""Say which languages a text is read and written in, to tokenizers that mark them (mBART, NLLB).

Left to themselves they mark everything as English. The codes are saved with the tokenizer.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, UsageError, find_nearest
from lora_cli.recipe import Recipe

KEYS = {"source_language": "src_lang", "target_language": "tgt_lang"}
"""Our keys, and the tokenizers' names."""


def set_languages(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer the recipe's languages, unless it was saved with some.

    Raises LoraError where it marks languages and the recipe names none, UsageError for one that it
    does not know, or where it marks none.
    """
    given = {key: getattr(recipe.data, key) for key in KEYS}
    marks = getattr(tokenizer, "src_lang", None) is not None
    for key, code in given.items():
        if code and not marks:
            raise UsageError(
                f"{recipe.where('data', key)}: the tokenizer of {recipe.model.name_or_path} marks "
                "no languages",
                "remove it; what T5 is told in words is data.source_prefix",
            )
        if code and code not in list_languages(tokenizer):
            raise _explain_unknown(recipe, tokenizer, key, code)
    if not marks:
        return
    if not all(given.values()):
        _refuse_silence(recipe, tokenizer)
        return
    own: Any = tokenizer
    own.src_lang, own.tgt_lang = given.values()


def list_languages(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the codes that a tokenizer has: special tokens of letters, such as de_DE."""
    special = (str(token) for token in tokenizer.all_special_tokens)
    return sorted({token for token in special if token.replace("_", "").isalpha()})


def _refuse_silence(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise LoraError where neither the recipe nor whoever saved the tokenizer names languages."""
    if getattr(tokenizer, "tgt_lang", None) is None:
        first, *others = list_languages(tokenizer)
        raise LoraError(
            f"model.name_or_path: the tokenizer of {recipe.model.name_or_path} marks languages, "
            f"and left to itself marks every text as {getattr(tokenizer, 'src_lang', None)}",
            f"data.source_language and data.target_language: such as {first} and {others[0]}",
        )


def _explain_unknown(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, key: str, code: str
) -> UsageError:
    known = list_languages(tokenizer)
    alike = [each for each in known if each.startswith(code.lower()[:2])]
    guess = find_nearest(code, known) or (alike[0] if alike else None)
    hint = f"did you mean {guess}?" if guess else f"the languages are {', '.join(known)}"
    return UsageError(
        f"{recipe.where('data', key)}: the tokenizer of {recipe.model.name_or_path} has no "
        f"language {code}",
        hint,
    )
