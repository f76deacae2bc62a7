"""Weights into a vLLM server, through its own registry of weight-transfer engines.

Written against vLLM 0.33.0, where this package in the server's environment registers the backend "miles-sync" by
vLLM's plugin entry point:

    MILES_SYNC_TOKEN=... VLLM_SERVER_DEV_MODE=1 vllm serve ... --weight-transfer-config '{"backend": "miles-sync"}'

and the trainer pushes to `VLLMTarget("http://127.0.0.1:8000")`, or to `VLLMTarget.ranks(url, tp_size)`. vLLM guards its
routes for weights by nothing (its API key covers /v1 alone): keep the server on loopback or behind a proxy.
"""

from miles_sync.vllm.target import BACKEND, TESTED_VERSION, VLLMTarget

__all__ = ["BACKEND", "TESTED_VERSION", "VLLMTarget", "register"]


def register() -> None:
    """Tell vLLM of the backend: what its plugin entry point calls, in each of its processes."""
    from vllm.distributed.weight_transfer import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        WeightTransferEngineFactory,
    )

    WeightTransferEngineFactory.register_engine(BACKEND, "miles_sync.vllm.engine", "MilesSyncEngine")
