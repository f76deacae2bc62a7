"""Reading what a reward needs from a prompt's metadata."""

import json
from typing import Any

from miles_core.errors import InputError
from miles_core.types import Prompt


def entry(prompt: Prompt, key: str) -> Any:
    """The value of `key` in the prompt's metadata.

    Raises:
        InputError: there is none; the message lists the keys that there are.
    """
    if key not in prompt.metadata:
        raise InputError(
            "hooks.reward",
            key,
            f"the metadata of prompt {prompt.id!r} has no such key",
            f"It has: {sorted(prompt.metadata)}. Name another one in the reward's parameters.",
        )
    return prompt.metadata[key]


def structure(prompt: Prompt, key: str) -> Any:
    """A list or table from the prompt's metadata; tables of data often hold them as JSON text.

    Raises:
        InputError: there is none, or its text is no JSON.
    """
    value = entry(prompt, key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise InputError(
            "hooks.reward", key, f"of prompt {prompt.id!r} is text but no JSON ({error})", "Mend or remove that row."
        ) from None
