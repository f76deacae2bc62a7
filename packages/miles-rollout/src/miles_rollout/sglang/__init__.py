"""SGLang as an engine: stock server in a child process, reached over HTTP."""

import importlib.util

if importlib.util.find_spec("sglang") is None:
    raise ImportError('miles_rollout.sglang needs SGLang: pip install "miles-rollout[sglang]"')

from miles_rollout.sglang.arguments import check_arguments, known_arguments
from miles_rollout.sglang.client import EngineAddress, SGLangEngine
from miles_rollout.sglang.server import ServerSettings, SGLangServer

__all__ = [  # noqa: RUF022 (grouped by subject)
    # server
    "SGLangServer",
    "ServerSettings",
    "check_arguments",
    "known_arguments",
    # client
    "EngineAddress",
    "SGLangEngine",
]
