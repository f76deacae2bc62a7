"""One model in several layouts of ranks: the same logprobs, and the same weights after a step.

assert_layouts_agree(ranks, path, "tp2", "pp2", "cp2")
"""

import json

import numpy as np
import train_tiny
from safetensors import safe_open

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
# Name to ranks and settings. What is not divided further is data parallel.
LAYOUTS = {
    "dp2": (2, {}),
    "tp2": (2, TP2),
    "tp2-whole-sequences": (2, {**TP2, "sequence_parallel": False}),
    "pp2": (2, PP2),
    "pp2-vp2": (2, {**PP2, "num_virtual_stages_per_pipeline_rank": 2}),
    "pp2-uneven": (2, {**PP2, "decoder_first_pipeline_num_layers": 1}),
    "cp2": (2, CP2),
    "ep2": (2, EP2),
    "etp2": (2, {"expert_tensor_parallel_size": 2}),
    "tp2-ep2-etp1": (2, {**TP2, **EP2, "expert_tensor_parallel_size": 1}),
    "cp2-ep2": (2, {**CP2, **EP2}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "cp4": (4, {"context_parallel_size": 4}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "dp2-tp2": (4, TP2),
    "dp2-pp2": (4, PP2),
    "dp2-cp2": (4, CP2),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "tp2-pp2-vp2": (4, {**TP2, **PP2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tp2-cp2": (4, {**TP2, **CP2}),
    "pp2-cp2": (4, {**PP2, **CP2}),
    "tp2-ep2": (4, {**TP2, **EP2}),
    "pp2-ep2": (4, {**PP2, **EP2}),
}
LOGPROBS = 1e-5
UPDATES = 1e-4  # of the norm of a tensor's update
NOISE = 1e-6  # of the largest norm: an update that is 0 but for rounding


def assert_layouts_agree(ranks, path, *names, settings=None, first_takes_all=False, packed=False):
    """Hold layouts against one rank.

    Args:
        ranks: the fixture.
        path: a model directory whose vocabulary holds that of `train_tiny`.
        names: of LAYOUTS; or ranks and settings of another one.
        settings: of the trainer, in all of them.
        first_takes_all: leave all shards but the first empty.
        packed: samples end to end in one row; not on the single rank.
    """
    settings = settings or {}
    alone = ranks.run_one("in_rank_layouts.run", path, settings)
    before = stored_weights(path)
    found = {}
    for name in names:
        world_size, layout = LAYOUTS[name] if isinstance(name, str) else name
        arguments = path, {**settings, **layout}, first_takes_all, packed
        results = ranks.run("in_rank_layouts.run", *arguments, world_size=world_size)
        found[str(name)] = differences(results, alone, before, first_takes_all)
    assert not any(found.values()), json.dumps(found, indent=1)


def differences(results, alone, before, first_takes_all=False):
    """What differs between the ranks of a layout and a single rank, in words.

    Args:
        results: of the ranks.
        alone: of the single rank.
        before: weights before the step.
        first_takes_all: whether all shards but the first were empty.
    """
    _, expected, metrics, weights = alone
    found = []
    for rank, ((shard, num_shards), logprobs, _, _) in enumerate(results):
        if first_takes_all:
            theirs = expected if shard == 0 else expected[:0]
        else:
            theirs = of_shard(expected, shard, num_shards)
        gap = np.abs(logprobs - theirs).max(initial=0)
        if not gap <= LOGPROBS:
            found.append(f"logprobs of rank {rank} differ by {gap:.1e}")
    if any(result[2] != results[0][2] for result in results):
        found.append("metrics differ between the ranks")
    for name in set(metrics) - {"gap_shard", "gap_sample"}:
        ours, theirs = results[0][2].get(name, np.nan), metrics[name]
        if not abs(ours - theirs) <= 1e-6 + 1e-4 * abs(theirs):
            found.append(f"{name} is {ours} instead of {theirs}")
    return found + update_differences(results[0][3], weights, before)


def update_differences(weights, expected, before):
    """Which tensors' updates differ, in words."""
    if set(weights) != set(expected):
        return [f"tensors differ: {set(weights) ^ set(expected)}"]
    updates = {name: expected[name] - before[name] for name in expected}
    noise = NOISE * max(np.linalg.norm(update) for update in updates.values())
    found = []
    for name, update in updates.items():
        gap, norm = np.linalg.norm(weights[name] - expected[name]), np.linalg.norm(update)
        # Weights are float32: what a sum rounds away of an update grows with the weight.
        rounding = 1e-7 * np.linalg.norm(before[name])
        if not gap <= UPDATES * norm + noise + rounding:
            found.append(f"the update of {name} differs by {gap:.1e}, its norm is {norm:.1e}")
    return found


def of_shard(column, shard, num_shards):
    """The part of a column over all samples that lies in a shard."""
    offsets = train_tiny.batch_of().offsets
    return np.concatenate([column[offsets[index] : offsets[index + 1]] for index in range(shard, 12, num_shards)])


def stored_weights(path):
    """All tensors of a model directory in one file."""
    with safe_open(path / "model.safetensors", "numpy") as file:
        return {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118  # no mapping
