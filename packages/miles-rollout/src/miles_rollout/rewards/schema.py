"""Responses that must be JSON of a schema. Needs miles-rollout[json]."""

import json
from collections.abc import Mapping
from typing import Any

import regex

from miles_core.errors import InputError
from miles_core.types import Prompt, Sample
from miles_rollout.rewards.metadata import structure

try:
    import jsonschema
    import jsonschema.validators
    import referencing
    import referencing.exceptions
except ImportError as error:
    raise ImportError('jsonschema is not installed: pip install "miles-rollout[json]"') from error

_FENCE = regex.compile(r"```(?:json)?[ \t]*\n(.*?)\n[ \t]*```", regex.DOTALL)


def json_schema(
    prompt: Prompt, sample: Sample, *, schema: Mapping[str, Any] | None = None, key: str = "schema"
) -> dict[str, float]:
    """1 if the response is JSON that the schema allows; else 0. The part "json" is 1 if it is JSON at all.

    The response is all of the text, or its only fenced block. References to other documents are not fetched.

    Args:
        prompt: its metadata holds the schema, unless `schema` is given.
        sample: judged by its text.
        schema: for all prompts. JSON Schema, of the draft that its "$schema" names, or else 2020-12.
        key: of the metadata.

    Raises:
        InputError: the schema is none.
    """
    wanted: Any = structure(prompt, key) if schema is None else schema
    kind = jsonschema.validators.validator_for(wanted, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise InputError("hooks.reward", key, f"is no JSON schema ({error.message})", "Mend it.") from None
    try:
        value = _json(sample.text)
    except ValueError:
        return {"reward": 0.0, "json": 0.0}
    try:
        valid = kind(wanted, registry=referencing.Registry()).is_valid(value)
    except referencing.exceptions.Unresolvable as error:
        rule = f"refers to {error.ref!r}: other documents are not fetched"
        raise InputError("hooks.reward", key, rule, "Put it into the schema's $defs.") from None
    return {"reward": float(valid), "json": 1.0}


def _json(text: str) -> Any:
    """The value of a response; NaN and Infinity, which are no JSON, are refused."""
    blocks = _FENCE.findall(text)
    return json.loads(blocks[0] if len(blocks) == 1 else text, parse_constant=_refuse)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
