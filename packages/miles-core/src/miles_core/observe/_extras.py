"""Optional libraries, found when they are first needed."""

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`.

    Raises:
        ImportError: it is not installed; names the extra of miles-core that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{module} is not installed. Add it with: pip install "miles-core[{extra}]"') from error
