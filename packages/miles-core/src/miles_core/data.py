"""Prompts from a file: JSON lines or Parquet, at any position, in an order that a seed decides.

A position counts prompts from the start of the run: with N rows, positions 0..N-1 are the first epoch, N..2N-1 the second.
The same file, seed and position give the same prompt on every machine, so the cursor of a run is one number.

Every row is checked when the file is opened, before any process starts. Of a JSONL file only the offsets of its lines stay
in memory; a Parquet file is held as Arrow columns, because its row groups cannot be read one row at a time.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from miles_core.errors import InputError
from miles_core.types import Prompt

_SHOWN_CHARS = 80  # of a bad value, in an error


class FilePrompts:
    """A data source over the rows of one file. See `file_prompts`."""

    def __init__(self, rows: "_Rows", name: str, prompt_field: str, seed: int, shuffle: bool):
        """Take rows that were checked."""
        self._rows, self._name, self._prompt_field = rows, name, prompt_field
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    @property
    def num_rows(self) -> int:
        """Rows of the file: prompts of one epoch."""
        return len(self._rows)

    def __call__(self, start: int, count: int) -> list[Prompt]:
        """Return prompts `start` to `start + count` of an endless sequence."""
        positions = [divmod(position, len(self._rows)) for position in range(start, start + count)]
        places = [(epoch, self._row_at(epoch, place)) for epoch, place in positions]
        rows = self._rows.read([row for _, row in places])
        return [
            self._prompt(epoch, row, dict(values))
            for (epoch, row), values in zip(places, rows, strict=True)
        ]

    def _prompt(self, epoch: int, row: int, values: dict[str, Any]) -> Prompt:
        content = values.pop(self._prompt_field)
        return Prompt(f"{self._name}:{self._rows.line(row)}@{epoch}", content, values)

    def _row_at(self, epoch: int, place: int) -> int:
        if not self._shuffle:
            return place
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        return int(self._order[place])


def file_prompts(
    path: Path | str, *, prompt_field: str = "prompt", shuffle: bool = True, seed: int = 0
) -> FilePrompts:
    """Open a file of prompts and check every row.

    Args:
        path: `.jsonl` (one JSON object a line; blank lines are skipped) or `.parquet`.
        prompt_field: the column that holds the prompt: text, or a list of chat messages, each with the text fields "role"
            and "content". The other columns become `Prompt.metadata`.
        shuffle: a new order every epoch; else the order of the file, over and over.
        seed: decides the orders; >= 0.

    Returns:
        A data source. Prompts are named `<stem of the file>:<line>@<epoch>`, lines counted from 1.

    Raises:
        InputError: the file cannot be read, holds no row, or holds a row that is no prompt; names the line and the rule.
    """
    path = Path(path)
    readers = {".jsonl": _JsonLines, ".parquet": _ParquetTable}
    if path.suffix not in readers:
        raise InputError(
            "data.prompts",
            str(path),
            "must end in .jsonl or .parquet",
            "Convert the file, or rename it.",
        )
    try:
        rows = readers[path.suffix](path, prompt_field)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            "data.prompts", str(path), f"the file cannot be read ({reason})", "Check the path."
        ) from None
    if not len(rows):
        raise InputError(
            "data.prompts",
            str(path),
            "the file holds no prompts",
            "Add rows, or name another file.",
        )
    return FilePrompts(rows, path.stem, prompt_field, seed, shuffle)


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order of the rows in one epoch: a permutation of 0..num_rows-1, int64.

    Sorts raw output of a seeded bit generator. numpy promises that stream for ever (NEP 19), unlike what
    `Generator.permutation` makes of it.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_rows)
    return np.argsort(keys, kind="stable").astype(np.int64)


class _Rows(Protocol):
    """Rows by index; checked when opened."""

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]: ...

    def line(self, index: int) -> int:
        """The number that a user finds this row by, from 1."""
        ...


class _JsonLines:
    def __init__(self, path: Path, prompt_field: str):
        self._path = path
        found = np.fromiter(_scan_lines(path, prompt_field), np.dtype((np.int64, 2)))
        self._offsets, self._lines = found[:, 0], found[:, 1]

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        with self._path.open("rb") as file:
            return [self._read_one(file, index) for index in indices]

    def _read_one(self, file: Any, index: int) -> Mapping[str, Any]:
        file.seek(int(self._offsets[index]))
        return json.loads(file.readline())

    def line(self, index: int) -> int:
        return int(self._lines[index])


def _scan_lines(path: Path, prompt_field: str) -> Iterator[tuple[int, int]]:
    """Check each line; yield offset in bytes and number of those that hold a row."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                _check_row(_parse(line, where), prompt_field, where)
                yield offset, number
            offset += len(line)


def _parse(line: bytes, where: str) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        _refuse(
            where, line[:_SHOWN_CHARS], f"must be UTF-8 ({error.reason})", "Save the file as UTF-8."
        )
    except (ValueError, RecursionError) as error:
        shown = line[:_SHOWN_CHARS].decode("utf-8", "replace").rstrip("\r\n")
        _refuse(where, shown, f"must be one JSON object ({error})", "Mend that line.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _ParquetTable:
    def __init__(self, path: Path, prompt_field: str):
        try:
            self._table: pa.Table = pq.ParquetFile(path).read()
        except pa.ArrowInvalid as error:
            _refuse(
                "data.prompts", str(path), f"must be a Parquet file ({error})", "Write it again."
            )
        _check_columns(self._table.schema, prompt_field, path)
        column = self._table[prompt_field]
        for index, value in enumerate(_values(column)):
            _check_prompt(value, prompt_field, f"{path}, row {index + 1}")

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return self._table.take(pa.array(indices, pa.int64())).to_pylist()

    def line(self, index: int) -> int:
        return index + 1


def _values(column: "pa.ChunkedArray") -> Iterator[Any]:
    for chunk in column.chunks:
        for start in range(
            0, len(chunk), 4096
        ):  # Python objects of a slice at a time, not of the whole file
            yield from chunk.slice(start, 4096).to_pylist()


def _check_columns(schema: "pa.Schema", prompt_field: str, path: Path) -> None:
    if prompt_field not in schema.names:
        _refuse_missing(f"{path}", prompt_field, schema.names)
    for field in schema:
        if not _fits_json(field.type):
            _refuse(
                f"{path}, column {field.name}",
                str(field.type),
                "must be of a type that JSON has: text, numbers, booleans, lists and structs of them",
                "Cast the column, or leave it out.",
            )


def _fits_json(kind: "pa.DataType") -> bool:
    types = pa.types
    if types.is_struct(kind):
        return all(_fits_json(kind.field(i).type) for i in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _fits_json(kind.value_type)
    if types.is_dictionary(kind):
        return _fits_json(kind.value_type)
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string)
    return any(test(kind) for test in (*plain, types.is_large_string))


def _check_row(row: Any, prompt_field: str, where: str) -> None:
    if not isinstance(row, dict):
        _refuse(
            where, _shown(row), "must be one JSON object", 'Write {"prompt": "..."} on each line.'
        )
    row = cast(dict[str, Any], row)
    if prompt_field not in row:
        _refuse_missing(where, prompt_field, list(row))
    _check_prompt(row[prompt_field], prompt_field, where)


def _check_prompt(value: Any, prompt_field: str, where: str) -> None:
    where = f"{where}, field {prompt_field}"
    if isinstance(value, str):
        _check_text(value, where)
        return
    if not isinstance(value, list) or not value:
        _refuse(
            where,
            _shown(value),
            "must be text or a list of chat messages, not empty",
            "Mend the row, or drop it.",
        )
    for number, message in enumerate(cast(list[Any], value), start=1):
        _check_message(message, f"{where}, message {number}")


def _check_message(message: Any, where: str) -> None:
    fields = cast(dict[str, Any], message) if isinstance(message, dict) else {}
    if not {"role", "content"} <= fields.keys() or not all(
        isinstance(v, str) for v in fields.values()
    ):
        _refuse(
            where,
            _shown(message),
            'must be an object with the text fields "role" and "content"',
            'Write {"role": "user", "content": "..."}.',
        )
    _check_text(fields["content"], where)


def _check_text(text: str, where: str) -> None:
    if not text:
        _refuse(where, text, "must not be empty", "Mend the row, or drop it.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        _refuse(
            where,
            _shown(text),
            f"must be valid Unicode ({error.reason})",
            "Mend the escapes, or drop it.",
        )


def _refuse_missing(where: str, prompt_field: str, known: Sequence[str]) -> NoReturn:
    raise InputError(
        where,
        list(known),
        f"must have the field {prompt_field!r}",
        "Add it, or name another with data.prompt_field.",
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."


def _refuse(where: str, value: object, rule: str, way_out: str) -> NoReturn:
    raise InputError(where, value, rule, way_out)
