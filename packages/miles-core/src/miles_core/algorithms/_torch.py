"""Says which extra brings torch, before a module that needs it fails without a word."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ImportError('miles_core.algorithms.losses and .corrections need torch: pip install "miles-core[torch]"')
