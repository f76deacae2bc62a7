import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_core import HookSpec, InputError
from miles_core.data import epoch_order, file_prompts
from miles_core.hooks import DataSource, bind

CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "hello \u00fc"}]
ROWS = [{"prompt": f"row {i}", "answer": i, "tags": [{"a": i, "b": None}]} for i in range(7)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


@pytest.fixture(params=[".jsonl", ".parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"prompts{request.param}"


def refused(path: Path, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        file_prompts(path, **options)
    return caught.value


def test_in_order_rows_become_prompts_with_the_rest_as_metadata(file: Path):
    source = file_prompts(write(file, ROWS), shuffle=False)
    assert source.num_rows == 7
    (prompt,) = source(2, 1)
    assert (prompt.id, prompt.content) == ("prompts:3@0", "row 2")
    assert prompt.metadata == {"answer": 2, "tags": [{"a": 2, "b": None}]}
    assert [p.content for p in source(5, 4)] == ["row 5", "row 6", "row 0", "row 1"]
    assert [p.id for p in source(6, 2)] == ["prompts:7@0", "prompts:1@1"]


def test_chat_messages_stay_messages(file: Path):
    source = file_prompts(write(file, [{"question": CHAT}]), prompt_field="question", shuffle=False)
    assert source(0, 1)[0].content == CHAT


def test_messages_of_a_parquet_file_lose_the_fields_that_are_null(tmp_path: Path):
    rows = [{"prompt": [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "x"}]}]
    source = file_prompts(write(tmp_path / "a.parquet", rows))
    assert source(0, 1)[0].content == [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b", "name": "x"},
    ]


def test_each_epoch_has_each_row_once_and_its_own_order_and_ids(file: Path):
    source = file_prompts(write(file, ROWS), seed=5)
    epochs = [source(7 * epoch, 7) for epoch in range(4)]
    orders = [[prompt.content for prompt in epoch] for epoch in epochs]
    assert all(sorted(order) == [f"row {i}" for i in range(7)] for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert len({prompt.id for epoch in epochs for prompt in epoch}) == 28


@given(start=st.integers(0, 60), count=st.integers(0, 40), cut=st.integers(0, 40), seed=st.integers(0, 3))
def test_a_cursor_resumes_exactly(
    tmp_path_factory: pytest.TempPathFactory, start: int, count: int, cut: int, seed: int
):
    folder = tmp_path_factory.getbasetemp() / "resume"
    folder.mkdir(exist_ok=True)
    path = write(folder / "prompts.jsonl", ROWS)
    cut = min(cut, count)
    source, resumed = file_prompts(path, seed=seed), file_prompts(path, seed=seed)
    whole = [(p.id, p.content) for p in source(start, count)]
    parts = [*source(start, cut), *resumed(start + cut, count - cut)]
    assert [(p.id, p.content) for p in parts] == whole


def test_both_formats_give_the_same_prompts_in_the_same_order(tmp_path: Path):
    rows = [{"prompt": f"row {i}", "answer": i} for i in range(50)]
    one = file_prompts(write(tmp_path / "prompts.jsonl", rows), seed=1)
    two = file_prompts(write(tmp_path / "prompts.parquet", rows), seed=1)
    assert [(p.id, p.content, p.metadata) for p in one(30, 90)] == [(p.id, p.content, p.metadata) for p in two(30, 90)]


def test_the_order_of_an_epoch_is_pinned():
    """Runs are resumed with other versions of numpy: these numbers must never change."""
    assert epoch_order(8, seed=0, epoch=0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert epoch_order(8, seed=0, epoch=1).tolist() == [7, 4, 5, 1, 6, 2, 0, 3]


@given(st.integers(1, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epochs_order_is_a_permutation(num_rows: int, seed: int, epoch: int):
    assert np.sort(epoch_order(num_rows, seed, epoch)).tolist() == list(range(num_rows))


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"prompt": "one"}\r\n   \r\n{"prompt": "two"}')
    source = file_prompts(path, shuffle=False)
    assert [(p.id, p.content) for p in source(0, 2)] == [("a:2@0", "one"), ("a:4@0", "two")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"prompt": "x"', "must be one JSON object (Expecting ',' delimiter, column 15)"),
        ("[1]", "must be one JSON object"),
        ('{"prompt": "x", "score": NaN}', "NaN is not JSON"),
        ('{"question": "x"}', "must have the field 'prompt'"),
        ('{"prompt": 3}', "must be text or a list of chat messages"),
        ('{"prompt": ""}', "not empty"),
        ('{"prompt": []}', "not empty"),
        ('{"prompt": null}', "must be text or a list of chat messages"),
        ('{"prompt": "\\ud800"}', "must be valid Unicode"),
        ('{"prompt": ["hello"]}', 'text fields "role" and "content"'),
        ('{"prompt": [{"role": "user"}]}', 'text fields "role" and "content"'),
        ('{"prompt": [{"role": "user", "content": 3}]}', 'text fields "role" and "content"'),
        ("[" * 100_000, "must be one JSON object"),
        ("\xff", "must be UTF-8"),
    ],
)
def test_a_bad_line_is_named_with_its_rule_when_the_file_is_opened(tmp_path: Path, line: str, rule: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line.encode("latin-1") + b'\n{"prompt": "fine"}\n')
    error = refused(path)
    assert error.setting.startswith(f"{path}, line 2")
    assert rule in error.rule
    assert error.way_out
    assert len(str(error)) < 500


@pytest.mark.parametrize("value", [None, ""])
def test_a_bad_row_of_a_parquet_file_is_named(tmp_path: Path, value: str | None):
    path = write(tmp_path / "a.parquet", [{"prompt": "fine"}, {"prompt": value}])
    assert refused(path).setting == f"{path}, row 2, field prompt"


def test_a_parquet_column_that_json_cannot_hold_is_named(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [{"prompt": "x", "when": datetime(2020, 1, 1, tzinfo=UTC)}])
    error = refused(path)
    assert error.setting.endswith("column when") and "timestamp" in str(error.value)


def test_a_missing_column_is_named_beside_those_that_are_there(file: Path):
    error = refused(write(file, ROWS), prompt_field="question")
    assert "'question'" in error.rule and "answer" in str(error.value)


@pytest.mark.parametrize("name", ["empty.jsonl", "nowhere.jsonl", "nowhere.parquet", "a.csv", "broken.parquet", "."])
def test_a_file_without_prompts_is_one_error(tmp_path: Path, name: str):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.parquet").write_text("PAR1")
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    assert refused(tmp_path / name).setting == "data.prompts"


def test_a_parquet_file_of_no_rows_is_one_error(tmp_path: Path):
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "holds no prompts" in refused(tmp_path / "a.parquet").rule


def test_a_file_is_a_data_source(file: Path):
    source = file_prompts(write(file, ROWS))
    assert bind(source, HookSpec(name="x").params, "data.source", DataSource) is source
