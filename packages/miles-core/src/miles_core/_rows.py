"""Rows of a prompt file by index, all of them checked when the file is opened."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, cast

import numpy as np

from miles_core._arrow import pa, pq
from miles_core.errors import InputError

_SHOWN_CHARS = 80  # of a bad value, in an error
_SLICE_ROWS = 4096  # of a Parquet column that are Python objects at one time


class Rows(Protocol):
    """Rows of a file, by index from 0."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return these rows, in this order."""
        ...

    def number(self, index: int) -> int:
        """The number that a user finds this row by: of the line or row, from 1."""
        ...


def open_rows(path: Path, prompt_field: str) -> Rows:
    """Open a `.jsonl` or `.parquet` file and check every row.

    Raises:
        InputError: the file cannot be read, holds no row, or holds one that is no prompt.
    """
    readers = {".jsonl": _JsonLines, ".parquet": _ParquetTable}
    if path.suffix not in readers:
        raise InputError("data.prompts", str(path), "must end in .jsonl or .parquet", "Convert the file.")
    try:
        rows = readers[path.suffix](path, prompt_field)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError("data.prompts", str(path), f"the file cannot be read ({reason})", "Check the path.") from None
    if not len(rows):
        raise InputError("data.prompts", str(path), "the file holds no prompts", "Add rows, or name another file.")
    return rows


class _JsonLines:
    """Keeps where each row starts, int64, and its line number."""

    def __init__(self, path: Path, prompt_field: str):
        self._path = path
        found = np.fromiter(_scan(path, prompt_field), np.dtype([("offset", np.int64), ("line", np.int64)]))
        self._offsets, self._lines = found["offset"], found["line"]

    def __len__(self) -> int:
        return len(self._offsets)

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        with self._path.open("rb") as file:
            return [self._read_one(file, index) for index in indices]

    def _read_one(self, file: BinaryIO, index: int) -> dict[str, Any]:
        file.seek(int(self._offsets[index]))
        return json.loads(file.readline())

    def number(self, index: int) -> int:
        return int(self._lines[index])


def _scan(path: Path, prompt_field: str) -> Iterator[tuple[int, int]]:
    """Check each line; yield offset and number of those that hold a row."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                _check_row(_parse(line, where), prompt_field, where)
                yield offset, number
            offset += len(line)


def _parse(line: bytes, where: str) -> Any:
    shown = line[:_SHOWN_CHARS].decode("utf-8", "replace").rstrip("\r\n")
    try:
        return json.loads(line.decode("utf-8").rstrip(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InputError(where, shown, f"must be UTF-8 ({error.reason})", "Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        rule = f"must be one JSON object ({error.msg}, column {error.colno})"
        raise InputError(where, shown, rule, "Mend that line.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(where, shown, f"must be one JSON object ({error})", "Mend that line.") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


class _ParquetTable:
    """Holds the table."""

    def __init__(self, path: Path, prompt_field: str):
        try:
            self._table = pq.ParquetFile(path).read()
        except pa.ArrowInvalid as error:
            raise InputError(
                "data.prompts", str(path), f"must be a Parquet file ({error})", "Write it again."
            ) from None
        _check_columns(self._table.schema, prompt_field, path)
        for number, value in enumerate(self._values(prompt_field), start=1):
            _check_prompt(_without_nulls(value), prompt_field, f"{path}, row {number}")
        self._prompt_field = prompt_field

    def _values(self, field: str) -> Iterator[Any]:
        for chunk in self._table[field].chunks:
            for start in range(0, len(chunk), _SLICE_ROWS):
                yield from chunk.slice(start, _SLICE_ROWS).to_pylist()

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._table.take(pa.array(indices, pa.int64())).to_pylist()
        return [row | {self._prompt_field: _without_nulls(row[self._prompt_field])} for row in rows]

    def number(self, index: int) -> int:
        return index + 1


def _without_nulls(value: Any) -> Any:
    """Drop the null fields of messages: columns cannot leave a field out, as JSON can."""
    if not isinstance(value, list):
        return value
    messages = cast(list[Any], value)
    return [
        {key: text for key, text in cast(dict[str, Any], m).items() if text is not None} if isinstance(m, dict) else m
        for m in messages
    ]


def _check_columns(schema: Any, prompt_field: str, path: Path) -> None:
    if prompt_field not in schema.names:
        _refuse_missing(str(path), prompt_field, schema.names)
    for field in schema:
        if not _fits_json(field.type):
            raise InputError(
                f"{path}, column {field.name}",
                str(field.type),
                "must be of a type that JSON has: text, numbers, booleans, lists and structs of them",
                "Cast the column, or leave it out.",
            )


def _fits_json(kind: Any) -> bool:
    types = pa.types
    if types.is_struct(kind):
        return all(_fits_json(kind.field(i).type) for i in range(kind.num_fields))
    nested = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_dictionary)
    if any(test(kind) for test in nested):
        return _fits_json(kind.value_type)
    plain = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_string)
    return any(test(kind) for test in (*plain, types.is_large_string))


def _check_row(row: Any, prompt_field: str, where: str) -> None:
    if not isinstance(row, dict):
        raise InputError(where, _shown(row), "must be one JSON object", 'Write {"prompt": "..."} on each line.')
    fields = cast(dict[str, Any], row)
    if prompt_field not in fields:
        _refuse_missing(where, prompt_field, list(fields))
    _check_prompt(fields[prompt_field], prompt_field, where)


def _refuse_missing(where: str, prompt_field: str, known: Sequence[str]) -> NoReturn:
    rule = f"must have the field {prompt_field!r}"
    raise InputError(where, list(known), rule, "Add it, or name another with data.prompt_field.")


def _check_prompt(value: Any, prompt_field: str, where: str) -> None:
    where = f"{where}, field {prompt_field}"
    if isinstance(value, str) and value:
        _check_text(value, where)
        return
    if not isinstance(value, list) or not value:
        rule = "must be text or a list of chat messages, not empty"
        raise InputError(where, _shown(cast(object, value)), rule, "Mend the row, or drop it.")
    for number, message in enumerate(cast(list[Any], value), start=1):
        _check_message(message, f"{where}, message {number}")


def _check_message(message: Any, where: str) -> None:
    fields = cast(dict[str, Any], message) if isinstance(message, dict) else {}
    if not {"role", "content"} <= fields.keys() or not all(isinstance(text, str) for text in fields.values()):
        rule = 'must be an object with the text fields "role" and "content", and no others than text'
        raise InputError(where, _shown(cast(object, message)), rule, 'Write {"role": "user", "content": "..."}.')
    for text in fields.values():
        _check_text(text, where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"must be valid Unicode ({error.reason})"
        raise InputError(where, _shown(text), rule, "Mend the escapes, or drop the row.") from None


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
