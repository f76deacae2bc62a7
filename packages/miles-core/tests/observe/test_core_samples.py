import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_core import Group, InputError, Prompt, Sample, VersionSpan
from miles_core.observe import read_samples, write_samples

TEXT = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
METADATA = st.dictionaries(TEXT, JSON, max_size=2)
MESSAGE = st.builds(lambda r, c, e: {"role": r, "content": c, **e}, TEXT, TEXT, st.dictionaries(TEXT, TEXT, max_size=1))


@st.composite
def samples(draw: Callable[..., Any]) -> Sample:
    length = draw(st.integers(0, 6))
    floats = st.floats(width=32)
    spans = st.builds(VersionSpan, st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**40))
    shape, kind = (max(length - 1, 0), 2, 3), draw(st.sampled_from([np.uint8, np.uint16, np.int32]))
    experts = np.arange(math.prod(shape)).reshape(shape).astype(kind)
    return Sample(
        tokens=np.array(draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length)), np.int32),
        loss_mask=np.array(draw(st.lists(st.booleans(), min_size=length, max_size=length)), np.bool_),
        rollout_logprobs=np.array(draw(st.lists(floats, min_size=length, max_size=length)), np.float32),
        version_spans=tuple(draw(st.lists(spans, max_size=2))),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        text=draw(TEXT),
        reward=draw(st.floats()),
        reward_parts=draw(st.dictionaries(TEXT, st.floats(), max_size=2)),
        metadata=draw(METADATA),
        routed_experts=experts if draw(st.booleans()) else None,
    )


GROUPS = st.lists(
    st.builds(
        Group,
        st.builds(Prompt, TEXT, TEXT | st.lists(MESSAGE, min_size=1, max_size=2), METADATA),
        st.lists(samples(), min_size=1, max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=3,
)


def as_data(group: Group) -> list[Any]:
    """Everything in a group as values in which NaN equals NaN and types count."""
    rows: list[Any] = [repr((group.prompt.id, group.prompt.content, group.prompt.metadata))]
    for sample in group.samples:
        for name in Sample.__slots__:
            value = getattr(sample, name)
            is_array = isinstance(value, np.ndarray)
            rows.append((name, value.dtype.str, value.shape, value.tobytes()) if is_array else (name, repr(value)))
    return rows


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(groups=GROUPS)
def test_groups_come_back_bit_by_bit(tmp_path_factory: pytest.TempPathFactory, groups: list[Group]):
    path = write_samples(tmp_path_factory.getbasetemp() / "samples", 1, groups)
    assert [as_data(group) for group in read_samples(path)] == [as_data(group) for group in groups]


def test_the_file_says_what_it_holds_to_any_reader(tmp_path: Path, make_group: Callable[..., Group]):
    chat = Prompt("b", [{"role": "user", "content": "hello"}], {"answer": "4"})
    groups = [make_group([3, 1], [1, 0]), Group(chat, make_group([2]).samples)]
    for step in (7, 12):
        write_samples(tmp_path, step, groups)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=000007", "step=000012"]
    rows = pq.read_table(tmp_path / "step=000007" / "part-0.parquet").to_pylist()
    assert [(row["group"], row["sample"], row["prompt_id"], row["reward"]) for row in rows] == [
        (0, 0, "p", 1.0),
        (0, 1, "p", 0.0),
        (1, 0, "b", 0.0),
    ]
    assert rows[0]["version_spans"] == [{"start": 2, "stop": 5, "weight_version": 3}]
    assert rows[2]["prompt_text"] == "user: hello"
    assert json.loads(rows[2]["prompt_metadata"]) == {"answer": "4"}
    whole = ds.dataset(tmp_path, format="parquet", partitioning="hive").to_table()
    assert whole.num_rows == 6 and sorted(set(whole["step"].to_pylist())) == [7, 12]


def test_a_step_that_is_done_again_replaces_its_files(tmp_path: Path, make_sample: Callable[..., Sample]):
    experts = np.zeros((4, 1, 1), np.uint8)
    path = write_samples(tmp_path, 1, [Group(Prompt("old", "x"), (make_sample(routed_experts=experts),))])
    assert len(list(path.parent.iterdir())) == 2
    write_samples(tmp_path, 1, [Group(Prompt("new", "x"), (make_sample(),))])
    (group,) = read_samples(path)
    assert group.id == "new" and group.samples[0].routed_experts is None
    assert [file.name for file in path.parent.iterdir()] == ["part-0.parquet"]
    assert read_samples(path.parent)[0].id == "new"


def test_a_step_appears_whole_or_not_at_all(tmp_path: Path, make_sample: Callable[..., Sample]):
    path = write_samples(tmp_path, 1, [Group(Prompt("old", "x"), (make_sample(),))])
    with pytest.raises(InputError, match="metadata of prompt bad"):
        write_samples(tmp_path, 1, [Group(Prompt("bad", "x"), (make_sample(metadata={"f": object()}),))])
    assert read_samples(path)[0].id == "old"
    with pytest.raises(OSError):
        read_samples(tmp_path / "step=000002")
    write_samples(tmp_path, 1, [Group(Prompt("new", "x"), (make_sample(),))])
    assert read_samples(path)[0].id == "new" and len(list(tmp_path.iterdir())) == 1
