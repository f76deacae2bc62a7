"""The examples run: transformers' own trainer with the callback, verl's registry as a stub recorded from verl 0.9.1."""

from __future__ import annotations

import abc
import asyncio
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from miles_sync import ModuleReceiver, ReceiverTarget, WeightSync, serve

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKEN = "the token of these tests"


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_example_is_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert len(lengths) == 3 and all(length < 200 for length in lengths.values()), lengths


# -- verl ----------------------------------------------------------------------------------------------


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """verl.checkpoint_engine.base as far as an engine sees it: the registry and the abstract methods."""
    base = types.ModuleType("verl.checkpoint_engine.base")

    class Registry:
        registered: ClassVar[dict[str, type]] = {}

        @staticmethod
        def register(backend: str) -> Callable[[type], type]:
            def wrapper(kind: type) -> type:
                Registry.registered[backend] = kind
                return kind

            return wrapper

    names = ("prepare", "build_topology", "init_process_group", "finalize", "send_weights", "receive_weights")
    methods = {name: abc.abstractmethod(lambda self: None) for name in names}
    base.CheckpointEngine = abc.ABCMeta("CheckpointEngine", (), methods)  # type: ignore[attr-defined]
    base.CheckpointEngineRegistry = Registry  # type: ignore[attr-defined]
    for name in ("verl", "verl.checkpoint_engine"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setenv("MILES_SYNC_TOKEN", TOKEN)
    _load("verl_checkpoint_engine")
    return Registry.registered["miles_sync"]


def _once(kind: Any, actors: list[Any], rollouts: list[Any], weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """One sync in the order of verl's CheckpointEngineManager.update_weights."""
    workers = [*actors, *rollouts]
    metadata = [worker.prepare() for worker in workers]
    actor_kwargs, rollout_kwargs = kind.build_topology(len(actors), len(rollouts), metadata)
    for kwargs, group in ((actor_kwargs, actors), (rollout_kwargs, rollouts)):
        assert all(len(values) == len(group) for values in kwargs.values())
        for i, worker in enumerate(group):
            worker.init_process_group(**{key: values[i] for key, values in kwargs.items()})

    async def taken(worker: Any) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() async for name, tensor in worker.receive_weights(global_steps=1)}

    async def everybody() -> list[Any]:
        walked: list[Iterator[Any]] = [iter(weights.items()) for _ in actors]
        sending = [actor.send_weights(each, global_steps=1) for actor, each in zip(actors, walked, strict=True)]
        results = await asyncio.gather(*map(taken, rollouts), *sending)
        assert all(next(each, None) is None for each in walked), "an actor did not walk its generator to the end"
        return results[: len(rollouts)]

    received = asyncio.run(asyncio.wait_for(everybody(), 60))
    for worker in workers:
        worker.finalize()
    return received


def test_verl_brings_every_tensor_to_every_rollout_worker_sync_after_sync(verl: Any) -> None:
    actors = [verl(bucket_size=1 << 20, is_master=rank == 0) for rank in range(2)]
    rollouts = [verl(bucket_size=1 << 20) for _ in range(2)]
    for _ in range(3):
        weights = {"a": torch.rand(7, 5), "b": torch.rand(3).bfloat16()}
        for received in _once(verl, actors, rollouts, weights):
            assert list(received) == list(weights)
            assert all(torch.equal(received[name], weights[name]) for name in weights)
    rollouts.append(verl(bucket_size=1 << 20))  # the fleet grows
    weights = {"a": torch.rand(7, 5), "b": torch.rand(3).bfloat16()}
    assert all(torch.equal(received["a"], weights["a"]) for received in _once(verl, actors, rollouts, weights))
    for worker in rollouts:
        worker._server.close()
    actors[0]._sync.close()


# -- TRL -----------------------------------------------------------------------------------------------


def test_the_callback_pushes_what_a_trainer_trains(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: the callback is its own")
    pytest.importorskip("accelerate", reason="accelerate is not installed: transformers' trainer needs it")
    torch.set_num_threads(1)
    example = _load("trl_callback")
    config = transformers.Qwen3Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    trained, served = (transformers.Qwen3ForCausalLM(config) for _ in range(2))
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]} for _ in range(6)]
    with serve(ModuleReceiver(served), token=TOKEN) as server:
        callback = example.SyncCallback(
            lambda: WeightSync([ReceiverTarget(server.host, server.port)], token=TOKEN, deadline_s=20), every_steps=2
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        before = trained.lm_head.weight.detach().clone()
        transformers.Trainer(trained, arguments, train_dataset=rows, callbacks=[callback]).train()
        assert server.version == 2  # at the start, after step 2, after step 4
    assert not torch.equal(before, trained.lm_head.weight)
    theirs = served.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in trained.state_dict().items())


def test_a_callback_that_never_pushes_is_refused() -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: the callback is its own")
    with pytest.raises(ValueError, match="every_steps=0"):
        _load("trl_callback").SyncCallback(lambda: None, every_steps=0)
