"""The samples of a step as a file that any Parquet reader opens, and back.

    samples/step=000012/part-0.parquet                    one row a sample
    samples/step=000012/part-0.routed_experts.safetensors routed experts, where the engine gave them

Columns: group, sample (which one of the group), prompt_id, prompt_text, prompt_messages (null for plain prompts),
prompt_metadata (JSON), response_text, tokens, loss_mask, rollout_logprobs, version_spans, reward, reward_parts,
finish_reason, metadata (JSON), has_routed_experts.
"""

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from miles_core._arrow import pa, pq
from miles_core.errors import InputError
from miles_core.types import Group, Prompt, Sample, VersionSpan

_EXPERTS = "part-0.routed_experts.safetensors"
_SPAN = pa.struct([("start", pa.int32()), ("stop", pa.int32()), ("weight_version", pa.int64())])
_SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("sample", pa.int32()),
        ("prompt_id", pa.string()),
        ("prompt_text", pa.string()),
        ("prompt_messages", pa.list_(pa.map_(pa.string(), pa.string()))),
        ("prompt_metadata", pa.string()),
        ("response_text", pa.string()),
        ("tokens", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("version_spans", pa.list_(_SPAN)),
        ("reward", pa.float64()),
        ("reward_parts", pa.map_(pa.string(), pa.float64())),
        ("finish_reason", pa.string()),
        ("metadata", pa.string()),
        ("has_routed_experts", pa.bool_()),
    ]
)


def write_samples(folder: Path, step: int, groups: Sequence[Group]) -> Path:
    """Write the groups of a step to `<folder>/step=NNNNNN/part-0.parquet`.

    The step's folder appears whole or not at all, and replaces one that is there.

    Args:
        folder: the run's `samples`; made if missing.
        step: number of the step.
        groups: at least one.

    Returns:
        The Parquet file.

    Raises:
        InputError: metadata of a prompt or sample cannot be written as JSON.
    """
    target = folder / f"step={step:06d}"
    unfinished = folder / f".step={step:06d}.tmp"  # readers of a folder of Parquet files skip names with a dot
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    pq.write_table(_table(groups), unfinished / "part-0.parquet", compression="zstd")
    experts = _routed_experts(groups)
    if experts:
        save_file(experts, unfinished / _EXPERTS)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(unfinished, target)
    return target / "part-0.parquet"


def read_samples(path: Path) -> list[Group]:
    """Read what `write_samples` wrote.

    Args:
        path: the Parquet file, or its folder.

    Raises:
        OSError: there is no such file.
    """
    path = path / "part-0.parquet" if path.is_dir() else path
    rows: list[dict[str, Any]] = pq.ParquetFile(path).read().to_pylist()
    has_experts = any(row["has_routed_experts"] for row in rows)
    experts = load_file(path.parent / _EXPERTS) if has_experts else {}
    by_group = itertools.groupby(rows, key=lambda row: row["group"])
    return [_group(list(members), experts) for _, members in by_group]


def _table(groups: Sequence[Group]) -> Any:
    rows = [_row(place, index, group) for place, group in enumerate(groups) for index in range(len(group.samples))]
    samples = [sample for group in groups for sample in group.samples]
    columns = {name: pa.array([row[name] for row in rows], _SCHEMA.field(name).type) for name in rows[0]}
    lengths = [len(sample.tokens) for sample in samples]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    for name, dtype in (("tokens", np.int32), ("loss_mask", np.bool_), ("rollout_logprobs", np.float32)):
        flat = np.concatenate([getattr(sample, name) for sample in samples]).astype(dtype, copy=False)
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(flat))
    return pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


def _row(place: int, index: int, group: Group) -> dict[str, Any]:
    """All columns of a sample but those that have a value per token."""
    prompt, sample = group.prompt, group.samples[index]
    messages = None if isinstance(prompt.content, str) else [list(m.items()) for m in prompt.content]
    return {
        "group": place,
        "sample": index,
        "prompt_id": prompt.id,
        "prompt_text": _readable(prompt),
        "prompt_messages": messages,
        "prompt_metadata": _json(prompt.metadata, prompt),
        "response_text": sample.text,
        "version_spans": [span._asdict() for span in sample.version_spans],
        "reward": sample.reward,
        "reward_parts": list(sample.reward_parts.items()),
        "finish_reason": sample.finish_reason,
        "metadata": _json(sample.metadata, prompt),
        "has_routed_experts": sample.routed_experts is not None,
    }


def _readable(prompt: Prompt) -> str:
    if isinstance(prompt.content, str):
        return prompt.content
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt.content)


def _json(metadata: Mapping[str, Any], prompt: Prompt) -> str:
    try:
        return json.dumps(dict(metadata))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"metadata of prompt {prompt.id}", dict(metadata), f"must fit JSON ({error})", "Change what is put there."
        ) from None


def _routed_experts(groups: Sequence[Group]) -> dict[str, NDArray[Any]]:
    return {
        f"{place}.{index}": np.ascontiguousarray(sample.routed_experts)
        for place, group in enumerate(groups)
        for index, sample in enumerate(group.samples)
        if sample.routed_experts is not None
    }


def _group(rows: Sequence[Mapping[str, Any]], experts: Mapping[str, NDArray[Any]]) -> Group:
    first = rows[0]
    messages = first["prompt_messages"]
    content = first["prompt_text"] if messages is None else [dict(message) for message in messages]
    prompt = Prompt(first["prompt_id"], content, json.loads(first["prompt_metadata"]))
    return Group(prompt, tuple(_sample(row, experts) for row in rows))


def _sample(row: Mapping[str, Any], experts: Mapping[str, NDArray[Any]]) -> Sample:
    return Sample(
        tokens=np.asarray(row["tokens"], np.int32),
        loss_mask=np.asarray(row["loss_mask"], np.bool_),
        rollout_logprobs=np.asarray(row["rollout_logprobs"], np.float32),
        version_spans=tuple(VersionSpan(**span) for span in row["version_spans"]),
        finish_reason=row["finish_reason"],
        text=row["response_text"],
        reward=row["reward"],
        reward_parts=dict(row["reward_parts"]),
        metadata=json.loads(row["metadata"]),
        routed_experts=experts[f"{row['group']}.{row['sample']}"] if row["has_routed_experts"] else None,
    )
