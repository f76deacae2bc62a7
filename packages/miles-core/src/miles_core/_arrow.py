"""pyarrow ships no types: the one door to it, so that the rest of the package is checked strictly."""

from typing import Any

import pyarrow  # pyright: ignore[reportMissingTypeStubs]
import pyarrow.parquet  # pyright: ignore[reportMissingTypeStubs]

pa: Any = pyarrow
pq: Any = pyarrow.parquet
