"""Is this engine a faithful receiver? A check to run against any engine that is started for miles-sync.

It needs a running stock engine, idle, and the weights that it should serve in the end; it asserts, it does not
time. Afterwards the engine serves `weights` under a higher version, its prefix cache flushed.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from miles_sync.errors import AuthError, BusyError, MismatchError, VersionError
from miles_sync.routes import Transport
from miles_sync.sglang.adapter import SGLangAdapter
from miles_sync.sglang.target import SGLangTarget
from miles_sync.sync import WeightSync

_PROMPT = list(range(2, 34))


def examine(
    url: str,
    weights: Mapping[str, torch.Tensor],
    *,
    token: str,
    api_key: str | None = None,
    admin_api_key: str | None = None,
    transport: Transport = "auto",
    deadline_s: float = 60.0,
) -> None:
    """Push to an engine in every way it must take and refuse; raise `AssertionError` at the first that differs.

    Args:
        url: Of the engine, for example "http://127.0.0.1:30000".
        weights: The model's weights under Hugging Face names; at least 34 token ids must exist.
        token: What the engine has in MILES_SYNC_TOKEN.
        api_key: The engine's.
        admin_api_key: The engine's.
        transport: To examine.
        deadline_s: Of each wait.
    """

    def target() -> SGLangTarget:
        return SGLangTarget(url, api_key=api_key, admin_api_key=admin_api_key)

    def sender(secret: str) -> WeightSync:
        return WeightSync([target()], token=secret, transport=transport, deadline_s=deadline_s)

    def logprobs() -> tuple[str, list[float]]:
        return _logprobs(url, api_key, admin_api_key)

    weights = dict(weights)
    others = {name: tensor * 0.5 for name, tensor in weights.items()}
    with sender(token) as sync:
        before = sync.status()[0].version
        version = 1 if before is None else before + 1
        report = sync.push(weights, version)
        sync.check(version, report.digest)
        served, reference = logprobs()
        assert served == str(version), f"the engine stamps {served} after version {version}"

        for fault, broken in _faults(weights).items():
            _refuses(MismatchError, lambda broken=broken: sync.push(broken, version + 1), fault)
        _refuses(VersionError, lambda: sync.push(others, version), "other weights under the same version")
        _refuses(VersionError, lambda: sync.push(weights, version - 1), "an older version")
        _refuses(BusyError, lambda: sender(token).connect(), "a second sender")
        assert logprobs() == (str(version), reference), "a refused push changed what is served"

        sync.push(others, version + 1)
        served, changed = logprobs()
        assert served == str(version + 1), f"the engine stamps {served} after version {version + 1}"
        assert changed != reference, "other weights, same logprobs"

        back = sync.push(weights, version + 2)
        assert back.digest == report.digest, "the same weights, another digest"
        assert logprobs() == (str(version + 2), reference), "the same weights, other logprobs"
        again = sync.push(weights, version + 2)
        assert again.routes[0].transport == "none", "a repeated push moved bytes"
        sync.check(version + 2, report.digest)
    _refuses(AuthError, lambda: sender("not the token of this engine").connect(), "a wrong token")
    with sender(token) as sync:
        sync.check(version + 2, report.digest)


def examine_adapter(
    url: str,
    adapters: Sequence[Mapping[str, torch.Tensor]],
    config: Mapping[str, Any],
    *,
    api_key: str | None = None,
    admin_api_key: str | None = None,
) -> None:
    """Push two adapters in turn to an engine with LoRA enabled; raise `AssertionError` at the first that differs.

    Args:
        url: Of the engine, idle.
        adapters: Two adapters that differ, under PEFT's names.
        config: PEFT's adapter_config.json for both.
        api_key: The engine's.
        admin_api_key: The engine's.
    """

    def logprobs(adapter: str | None) -> list[float]:
        return _logprobs(url, api_key, admin_api_key, adapter)[1]

    one, other = adapters
    base = logprobs(None)
    adapter = SGLangAdapter(url, "examined", api_key=api_key, admin_api_key=admin_api_key)
    adapter.push(one, config, 1)
    first = adapter.served
    with_one = logprobs(first)
    assert with_one != base, "an adapter changes nothing"
    adapter.push(other, config, 2)
    assert logprobs(first) == with_one, "the version before is served no longer"
    assert logprobs(adapter.served) not in (base, with_one), "another adapter, the same logprobs"
    adapter.push(one, config, 3)
    assert logprobs(adapter.served) == with_one, "the same adapter, other logprobs"
    _refuses(VersionError, lambda: adapter.push(other, config, 3), "the same version again")
    adapter.close()
    assert logprobs(None) == base, "the base model has changed"


def _faults(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights that do not fit, by what is wrong with them."""
    last, tensor = list(weights.items())[-1]
    return {
        "an unknown name": weights | {"model.no_such_tensor": torch.zeros(1)},
        "a missing name": {name: value for name, value in weights.items() if name != last},
        "a wrong shape": weights | {last: torch.cat([tensor, tensor[:1]])},
    }


def _refuses(kind: type[Exception], act: Any, what: str) -> None:
    try:
        act()
    except kind:
        return
    raise AssertionError(f"{what} was taken where {kind.__name__} was due")


def _logprobs(
    url: str, api_key: str | None, admin_api_key: str | None, adapter: str | None = None
) -> tuple[str, list[float]]:
    """The version that the engine stamps, and the prompt's logprobs, computed without cached prefixes."""
    _post(url + "/flush_cache?timeout=10", admin_api_key or api_key, {})
    reply = json.loads(
        _post(
            url + "/generate",
            api_key,
            {
                "input_ids": _PROMPT,
                "sampling_params": {"max_new_tokens": 1, "temperature": 0},
                "return_logprob": True,
                "logprob_start_len": 0,
            }
            | ({} if adapter is None else {"lora_path": adapter}),
        )
    )
    meta = reply["meta_info"]
    return meta["weight_version"], [entry[0] for entry in meta["input_token_logprobs"][1:]]


def _post(url: str, key: str | None, body: dict[str, Any]) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()
