"""Proof that what is pushed is what is served, against an engine started for it or one that runs already."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from miles_sync.bench.measure import Case, measure
from miles_sync.channel import Deadline
from miles_sync.errors import DriftError, ManifestError
from miles_sync.manifest import TensorMeta
from miles_sync.messages import Mode
from miles_sync.receivers import fingerprint
from miles_sync.routes import Transport
from miles_sync.sglang.http import EngineHttp
from miles_sync.sglang.target import SGLangTarget
from miles_sync.sync import WeightSync
from miles_sync.targets import ReceiverTarget, Target
from miles_sync.tensorfile import Checkpoint


def verify_case(case: Case, metas: Sequence[TensorMeta]) -> dict[str, Any]:
    """Push twice to an engine of its own; its live weights are read at the end. Raises a `SyncError`."""
    result = measure(case, metas, 1, lambda _: None)
    return {
        "transport": case.transport,
        "mode": case.mode,
        "digest": result["pushes"][-1]["digest"],
        "live_weights_equal": result["live_weights_equal"],
        "bytes": result["bytes"],
        "tensors": result["tensors"],
    }


def verify_running(
    where: str,
    checkpoint: Path,
    *,
    token: str,
    transport: Transport,
    mode: Mode,
    admin_api_key: str | None,
    deadline_s: float,
) -> dict[str, Any]:
    """Push a checkpoint to what runs at an address as its next version, then compare digests and live weights.

    Args:
        where: "http://host:port" of an SGLang server (all its ranks), or "host:port" of a receiver.
        checkpoint: Directory of safetensors files.
        token: Shared with it.
        transport: As for `WeightSync`.
        mode: As for `WeightSync`; in place pauses the server meanwhile.
        admin_api_key: The server's.
        deadline_s: Bound on every wait.

    Raises:
        SyncError: Something failed; `DriftError` where it does not serve what was pushed.
    """
    source = dict(Checkpoint(checkpoint))
    targets = _targets(where, admin_api_key, deadline_s)
    with WeightSync(targets, token=token, transport=transport, mode=mode, deadline_s=deadline_s) as sync:
        before = sync.status()
        version = max((state.version for state in before if state.version is not None), default=-1) + 1
        with _paused(targets[0], mode):
            report = sync.push(source, version)
        expected = fingerprint(source)()
        if report.digest != expected:
            raise DriftError(f"digest {report.digest} was committed, the files have {expected}", stage="status")
        sync.check(version, expected)
        return {
            "targets": [asdict(state) for state in sync.status()],
            "routes": [asdict(route) for route in report.routes],
            "live_weights_equal": True,
            **report.as_dict(),
        }


@contextlib.contextmanager
def _paused(target: Target, mode: Mode) -> Iterator[None]:
    """In place, an engine must not generate from a mixture."""
    if mode != "in_place" or not isinstance(target, SGLangTarget):
        yield
        return
    target.pause()
    try:
        yield
    finally:
        target.resume()


def _targets(where: str, admin_api_key: str | None, deadline_s: float) -> tuple[Target, ...]:
    if where.startswith(("http://", "https://")):
        info = EngineHttp(where, None, admin_api_key, where).get("/server_info", "connect", Deadline(deadline_s))
        return SGLangTarget.ranks(where, int(info.get("tp_size", 1)), admin_api_key=admin_api_key)
    host, _, port = where.rpartition(":")
    if not host or not port.isdigit():
        raise ManifestError(f"--target {where!r} must be host:port or http://host:port", stage="connect")
    return (ReceiverTarget(host, int(port)),)
