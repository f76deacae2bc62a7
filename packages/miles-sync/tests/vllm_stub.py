"""What of vLLM 0.33.0 an engine of its registry meets: base class, registry, worker and HTTP routes, no more.

`RECORDED` was taken from the released wheel (vllm/distributed/weight_transfer/base.py and factory.py,
vllm/v1/worker/gpu_worker.py): names and arguments, to which a test holds what stands here.
"""

from __future__ import annotations

import http.server
import importlib
import json
import sys
import threading
import types
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

VERSION = "0.33.0"
RECORDED = {
    "WeightTransferEngine": {
        "drain_pending": ["self"],
        "__init__": ["self", "config", "vllm_config", "device", "model"],
        "set_weight_update_target": ["self", "model", "model_config"],
        "reset_weight_update_target": ["self"],
        "parse_init_info": ["self", "init_dict"],
        "parse_update_info": ["self", "update_dict"],
        "init_transfer_engine": ["self", "init_info"],
        "start_weight_update": ["self"],
        "finish_weight_update": ["self"],
        "update_weights": ["self", "update_info"],
        "receive_weights": ["self", "update_info"],
        "shutdown": ["self"],
    },
    "WeightTransferEngineFactory": {
        "register_engine": ["cls", "name", "module_path_or_cls", "class_name"],
        "create_engine": ["cls", "config", "vllm_config", "device", "model"],
    },
    "Worker": {
        "init_weight_transfer_engine": ["self", "init_info"],
        "start_weight_update": ["self"],
        "update_weights": ["self", "update_info"],
        "finish_weight_update": ["self"],
    },
}

InitInfo = TypeVar("InitInfo")
UpdateInfo = TypeVar("UpdateInfo")


@dataclass
class WeightTransferInitInfo(ABC):  # noqa: B024 - as upstream
    pass


@dataclass
class WeightTransferUpdateInfo(ABC):  # noqa: B024 - as upstream
    pass


class WeightTransferEngine(ABC, Generic[InitInfo, UpdateInfo]):
    init_info_cls: type
    update_info_cls: type
    supports_draft_weight_update = True
    defers_processing = False

    def drain_pending(self) -> None:
        return

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        self.config, self.vllm_config = config, vllm_config
        self.parallel_config, self.model_config = vllm_config.parallel_config, vllm_config.model_config
        self.device, self.model = device, model
        self._default = model, self.model_config

    def set_weight_update_target(self, model: torch.nn.Module, model_config: Any) -> None:
        self.model, self.model_config = model, model_config

    def reset_weight_update_target(self) -> None:
        self.model, self.model_config = self._default

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return _parsed(self.init_info_cls, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        return _parsed(self.update_info_cls, update_dict)

    @abstractmethod
    def init_transfer_engine(self, init_info: Any) -> None: ...

    @abstractmethod
    def start_weight_update(self) -> None: ...

    @abstractmethod
    def finish_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    @abstractmethod
    def receive_weights(self, update_info: Any) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...


def _parsed(kind: type, given: dict[str, Any]) -> Any:
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"Invalid info: {error}") from error


class WeightTransferEngineFactory:
    _registry: dict[str, Callable[[], type]] = {}  # noqa: RUF012 - as upstream

    @classmethod
    def register_engine(cls, name: str, module_path_or_cls: str | type, class_name: str | None = None) -> None:
        if name in cls._registry:
            raise ValueError(f"Weight transfer engine '{name}' is already registered.")
        if isinstance(module_path_or_cls, str):
            assert class_name is not None
            cls._registry[name] = lambda: getattr(importlib.import_module(module_path_or_cls), class_name)
        else:
            cls._registry[name] = lambda: module_path_or_cls

    @classmethod
    def create_engine(cls, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> Any:
        return cls._registry[config.backend]()(config, vllm_config, device, model)


class Worker:
    """One rank: its model, and the sessions as vLLM's worker keeps them."""

    def __init__(self, vllm_config: Any, model: torch.nn.Module) -> None:
        self.vllm_config, self.rank = vllm_config, vllm_config.parallel_config.rank
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            vllm_config.weight_transfer_config, vllm_config, torch.device("cpu"), model
        )
        self._active = False

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.weight_transfer_engine.init_transfer_engine(self.weight_transfer_engine.parse_init_info(init_info))

    def start_weight_update(self) -> None:
        if self._active:
            raise RuntimeError("start_weight_update called while a weight update is already active.")
        self.weight_transfer_engine.start_weight_update()
        self._active = True

    def update_weights(self, update_info: dict | list[dict]) -> None:
        if not self._active:
            raise RuntimeError("start_weight_update must be called before update_weights.")
        parallel = self.vllm_config.parallel_config
        if isinstance(update_info, list):
            update_info = update_info[parallel.data_parallel_index * parallel.world_size + self.rank]
        try:
            self.weight_transfer_engine.update_weights(update_info)
        except BaseException:
            self._active = False
            self.weight_transfer_engine.reset_weight_update_target()
            raise

    def finish_weight_update(self) -> None:
        if not self._active:
            raise RuntimeError("finish_weight_update called without a matching start_weight_update.")
        self.weight_transfer_engine.finish_weight_update()
        self.weight_transfer_engine.reset_weight_update_target()
        self._active = False


def config(rank: int = 0, ranks: int = 1, **changes: Any) -> Any:
    """What of VllmConfig an engine reads."""
    parallel = {
        "rank": rank,
        "world_size": ranks,
        "tensor_parallel_size": ranks,
        "pipeline_parallel_size": 1,
        "data_parallel_size": 1,
        "data_parallel_index": 0,
    }
    return types.SimpleNamespace(
        weight_transfer_config=types.SimpleNamespace(backend="miles-sync"),
        parallel_config=types.SimpleNamespace(**(parallel | {k: v for k, v in changes.items() if k in parallel})),
        model_config=types.SimpleNamespace(quantization=changes.get("quantization")),
    )


@contextmanager
def installed() -> Iterator[None]:
    """`import vllm` finds this, with an empty registry."""
    names = ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer", "vllm.distributed.weight_transfer.base")
    modules = {name: types.ModuleType(name) for name in names}
    modules["vllm"].__version__ = VERSION  # type: ignore[attr-defined]
    for thing in (WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo):
        setattr(modules[names[3]], thing.__name__, thing)
        setattr(modules[names[2]], thing.__name__, thing)
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    modules[names[2]].WeightTransferEngineFactory = WeightTransferEngineFactory  # type: ignore[attr-defined]
    WeightTransferEngineFactory._registry = {}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in (*names, "miles_sync.vllm.engine"):
            sys.modules.pop(name, None)


@contextmanager
def server(workers: list[Worker]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The routes of vllm/entrypoints/rl/online/api_router.py over workers that act one after the other."""
    state: dict[str, Any] = {"weight_version": "default", "calls": []}
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.urlsplit(self.path).path
            self._answer({"/get_world_size": {"world_size": len(workers)}, "/weight_info": state}[path])

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            call = self.path[1:]
            arguments = {
                "init_weight_transfer_engine": ["init_info"],
                "update_weights": ["update_info"],
            }.get(call, [])
            with lock:
                state["calls"].append(call)
                try:
                    if call == "update_weight_version":
                        state["weight_version"] = body["new_version"]
                    else:
                        for worker in workers:
                            getattr(worker, call)(*(body[name] for name in arguments))
                        state["weight_version"] = body.get("weight_version") or state["weight_version"]
                except Exception as error:  # noqa: BLE001 - a server answers
                    return self._answer({"error": str(error)}, 500)
            return self._answer({"message": "done"})

        def _answer(self, reply: dict[str, Any], status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}", state
        finally:
            httpd.shutdown()
