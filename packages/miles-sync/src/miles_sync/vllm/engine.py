"""The engine's half: what vLLM's worker calls on its main loop, in one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import vllm  # pyright: ignore[reportMissingImports]
import vllm.distributed.weight_transfer.base as base  # pyright: ignore[reportMissingImports]

from miles_sync.errors import MismatchError
from miles_sync.messages import Commit, Prepare
from miles_sync.planned import PlannedReceiver, attend
from miles_sync.staging import Staging
from miles_sync.vllm.target import TESTED_VERSION


@dataclass
class Attend(base.WeightTransferInitInfo):
    """Rank `rank` connects to the sender; both prove the token then."""

    rank: int
    host: str
    port: int
    deadline_s: float


@dataclass
class Order(base.WeightTransferUpdateInfo):
    """Carry out "prepare" or "commit" of a transaction; "" for ranks that it does not concern."""

    what: str = ""
    txn: str = ""


class VLLMReceiver(PlannedReceiver):
    """The live weights of one rank."""

    def __init__(self, model: Any, vllm_config: Any) -> None:
        """Receive into `model`."""
        parallel = vllm_config.parallel_config
        super().__init__(model, parallel.rank, parallel.tensor_parallel_size)
        self._config = vllm_config

    def check_engine(self) -> None:
        """Raise `MismatchError` for another release, and where loading is not all that makes these weights."""
        if vllm.__version__.split("+")[0] != TESTED_VERSION:
            raise MismatchError(f"vLLM {vllm.__version__} is not {TESTED_VERSION}, the tested one", stage="begin")
        parallel = self._config.parallel_config
        for setting in ("pipeline_parallel_size", "data_parallel_size"):
            if (value := getattr(parallel, setting)) != 1:
                raise MismatchError(f"{setting}={value}, this release needs 1", stage="begin")
        if (quantization := self._config.model_config.quantization) is not None:
            raise MismatchError(f"quantization={quantization!r}: its weights were repacked", stage="begin")


class MilesSyncEngine(base.WeightTransferEngine[Attend, Order]):
    """Weights move on a thread of the worker; orders come through its main loop, and raise nothing there."""

    init_info_cls = Attend
    update_info_cls = Order
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        """Receive into the worker's model."""
        super().__init__(config, vllm_config, device, model)
        self._receiver = VLLMReceiver(model, vllm_config)
        self._staging = Staging(self._receiver, self._receiver.name, remote_orders=True)

    def init_transfer_engine(self, init_info: Attend) -> None:
        """Connect to the sender, if it is this rank that is meant."""
        if init_info.rank == self._receiver.rank:
            attend(self._staging, init_info.host, init_info.port, init_info.deadline_s)

    def start_weight_update(self) -> None:
        """Nothing to do: each order is a session of vLLM's."""

    def receive_weights(self, update_info: Order) -> None:
        """Carry out an order; what comes of it is answered over the channel."""
        if update_info.what:
            kind = {"prepare": Prepare, "commit": Commit}[update_info.what]
            self._staging.order(kind(update_info.txn))

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def shutdown(self) -> None:
        """End the connection to the sender."""
        self._staging.hang_up()
