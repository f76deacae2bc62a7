"""Numeric formats for model weights: encode, decode and fake-quantise, held to a plain-torch reference.

A format is a small object with six members (`Format`). Two are here, each also found by its name:

    bf16        bfloat16, what most checkpoints and engines carry
    fp8_block   float8 e4m3 in 128x128 blocks with float32 scales, as DeepSeek-V3 publishes it

`miles_precision.conformance` examines any other object that claims to be a format.
"""

from miles_precision.bf16 import BF16
from miles_precision.errors import FormatError
from miles_precision.format import Format, Parts, straight_through
from miles_precision.fp8_block import FP8Block
from miles_precision.ignored import FUSED_MODULES, with_fused_modules
from miles_precision.lookup import FORMATS, get_format

__all__ = [  # noqa: RUF022 (grouped by subject)
    # what a format is
    "Format",
    "FormatError",
    "Parts",
    # the formats, and finding one by name
    "BF16",
    "FP8Block",
    "FORMATS",
    "get_format",
    # for those who write a format
    "FUSED_MODULES",
    "straight_through",
    "with_fused_modules",
]
