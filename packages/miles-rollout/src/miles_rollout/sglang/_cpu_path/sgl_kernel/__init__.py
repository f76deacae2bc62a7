"""Stand-in for `sgl_kernel`, whose released wheel needs libcuda.so.1 to import: pure torch, for CPU engines only.

Only what SGLang calls on its CPU path without AMX. Any other name raises when it is called. This folder is put ahead on
the path of CPU engine processes by `miles_rollout.sglang.cpu` and is not importable anywhere else.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

__version__ = "0.0.0+miles.cpu"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start: torch.Tensor,
    end: torch.Tensor,
    out_cache_loc: torch.Tensor,
    _pool_len: int,
) -> None:
    """Write each request's new cache locations into its row of `req_to_token`, from `start` to `end`, in place."""
    taken = 0
    for row, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        count = last - first
        req_to_token[row, first:last] = out_cache_loc[taken : taken + count].to(req_to_token.dtype)
        taken += count


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A callable for every name that SGLang imports and does not need on a CPU."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} has no CPU stand-in")

    return missing
