"""What a generation_config.json may ask for beside one text for each prompt."""

from __future__ import annotations

from typing import Any

ODD: dict[str, Any] = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 2,
    "stop_strings": ["a text that no answer has"],
}
