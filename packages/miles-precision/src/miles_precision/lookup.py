"""Formats by name."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from miles_precision.bf16 import BF16
from miles_precision.errors import FormatError
from miles_precision.format import Format
from miles_precision.fp8_block import FP8Block

FORMATS: Mapping[str, Format] = MappingProxyType({format.name: format for format in (BF16(), FP8Block())})
"""Every format of this package by its name."""


def get_format(name: str) -> Format:
    """Find a format by its name.

    Raises:
        FormatError: There is none of this name; the message has the nearest and all.
    """
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise FormatError(f"unknown format {name!r}: {hint}the formats are {', '.join(FORMATS)}")
