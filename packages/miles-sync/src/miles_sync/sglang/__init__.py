"""Weights into a stock SGLang engine, through its custom weight loader.

The sender's half; it does not import sglang, so a trainer stays light. Start the engine with

    MILES_SYNC_TOKEN=<token>  python -m sglang.launch_server ... --custom-weight-loader miles_sync.sglang.loader.load

and push to `SGLangTarget(url, ...)`. Tested with SGLang 0.5.17; the engine needs `pip install "miles-sync[sglang]"`.
"""

from miles_sync.sglang.adapter import SGLangAdapter
from miles_sync.sglang.target import LOADER, TESTED_VERSION, TOKEN_VARIABLE, SGLangTarget

__all__ = ["LOADER", "TESTED_VERSION", "TOKEN_VARIABLE", "SGLangAdapter", "SGLangTarget"]
