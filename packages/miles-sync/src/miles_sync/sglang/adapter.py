"""A LoRA adapter in a stock SGLang engine, version after version.

The engine can load an adapter from tensors and unload one; it cannot replace one. So each version is an adapter of its
own, `name@version`:

    load name@8 ▸ name@8 is what `served` says ▸ unload name@6        (name@7 may still have requests running)

A request names the version it wants (`"lora_path": adapter.served`), keeps it to its end, and cached prefixes of one
version are never used for another: the engine keys them by adapter. Nothing pauses.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from miles_sync.channel import Deadline
from miles_sync.errors import MismatchError, SyncError, VersionError
from miles_sync.manifest import describe
from miles_sync.sglang.http import EngineHttp


class SGLangAdapter:
    """One adapter of one engine, which was started with `--enable-lora`.

    Args:
        url: Where the engine serves.
        name: Of the adapter; no "@" in it.
        api_key: The engine's `--api-key`, if it has one.
        admin_api_key: Its `--admin-api-key`; where it is missing, `api_key` guards these routes too.
        keep: How many versions stay loaded: 2 lets requests of the last one end in peace.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        api_key: str | None = None,
        admin_api_key: str | None = None,
        keep: int = 2,
    ) -> None:
        """Keep the address; nothing is sent yet."""
        if not name or "@" in name:
            raise ValueError(f"name={name!r} must not be empty and have no @: versions are name@version")
        if keep < 1:
            raise ValueError(f"keep={keep} must be 1 or more")
        self.name = name
        self._http = EngineHttp(url, api_key, admin_api_key, f"{url} adapter {name}")
        self._keep = keep
        self._loaded: list[int] = []
        self._ranks = 0

    @property
    def version(self) -> int | None:
        """The version last pushed."""
        return self._loaded[-1] if self._loaded else None

    @property
    def served(self) -> str:
        """What a request gives as `lora_path` to get the version last pushed; `VersionError` before the first."""
        if not self._loaded:
            raise VersionError("no version was pushed yet", stage="status", peer=self._http.name)
        return f"{self.name}@{self._loaded[-1]}"

    def push(
        self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], version: int, *, deadline_s: float = 60.0
    ) -> None:
        """Load a version; from here on `served` names it. Then unload what is older than `keep` versions.

        Args:
            tensors: Under PEFT's names ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight").
            config: PEFT's adapter_config.json: at least "r", "lora_alpha" and "target_modules".
            version: Higher than the one before.
            deadline_s: Bound on each request.

        Raises:
            VersionError: It is not higher.
            MismatchError: The engine does not take it, in its words; it serves what it served.
        """
        if self._loaded and version <= self._loaded[-1]:
            reason = f"version {version} was offered, {self._loaded[-1]} is served: versions only grow"
            raise VersionError(reason, stage="begin", peer=self._http.name)
        ranks = self._ranks or self._check_engine(Deadline(deadline_s))
        body = {
            "lora_name": f"{self.name}@{version}",
            "config_dict": dict(config),
            "serialized_named_tensors": [_envelope(tensors)] * ranks,
        }
        reply = self._http.post("/load_lora_adapter_from_tensors", body, "commit", Deadline(deadline_s))
        if not reply.get("success"):
            reason = f"the engine does not take the adapter: {reply.get('error_message')}"
            raise MismatchError(reason, stage="commit", peer=self._http.name)
        self._loaded.append(version)
        while len(self._loaded) > self._keep:
            self._unload(self._loaded[0], Deadline(deadline_s))

    def close(self, *, deadline_s: float = 60.0) -> None:
        """Unload every version; waits for their requests to end."""
        while self._loaded:
            self._unload(self._loaded[-1], Deadline(deadline_s))

    def _unload(self, version: int, deadline: Deadline) -> None:
        """Unload a version once its requests have ended."""
        reply = self._http.post("/unload_lora_adapter", {"lora_name": f"{self.name}@{version}"}, "commit", deadline)
        if not reply.get("success"):
            reason = f"version {version} was not unloaded: {reply.get('error_message')}"
            raise SyncError(reason, stage="commit", peer=self._http.name)
        self._loaded.remove(version)

    def _check_engine(self, deadline: Deadline) -> int:
        """Hold the engine's settings to what this needs; returns its number of tensor-parallel ranks."""
        info = self._http.get("/server_info", "connect", deadline)
        if not info.get("enable_lora"):
            raise MismatchError("start it with --enable-lora", stage="connect", peer=self._http.name)
        self._ranks = int(info.get("tp_size", 1))
        return self._ranks


def _envelope(tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors the way SGLang wants them: base64 of a pickle, of plain values that name no memory of this process."""
    if not tensors:
        raise ValueError("an adapter without tensors")
    plain = {}
    for name, tensor in tensors.items():
        describe(name, tensor)  # refuses a dtype that does not travel
        plain[name] = tensor.detach().cpu().contiguous().clone()  # a view would bring its whole storage
    return base64.b64encode(pickle.dumps(plain, protocol=4)).decode()
