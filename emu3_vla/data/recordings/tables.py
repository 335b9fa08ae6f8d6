"""LeRobot's files of rows and of metadata: parquet, JSON and JSON lines, each read and written, with errors that say which one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emu3_vla.data.recordings.recording import Column, RecordingError

if TYPE_CHECKING:
    import pyarrow as pa


def column_to_numpy(table: pa.Table, key: str, column: Column, where: str) -> np.ndarray:
    """One column as (T, *shape). Raises RecordingError where it does not have that shape."""
    import pyarrow as pa

    array = table[key].combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what combine_chunks leaves of no rows
        array = array.chunk(0) if array.num_chunks else pa.array([], array.type)
    if column.dtype == "string":
        return np.array(array.to_pylist(), dtype=object)
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf" or values.size != table.num_rows * math.prod(column.shape):
        raise RecordingError(
            f"{where}: {key!r} holds {values.size} values of {array.type} in {table.num_rows} rows, expected {column.dtype} of shape "
            f"{list(column.shape) or [1]} in each"
        )
    return values.reshape(table.num_rows, *column.shape).astype(column.dtype, copy=False)


def numpy_to_column(values: np.ndarray, column: Column) -> pa.Array:
    """The inverse of `column_to_numpy`."""
    import pyarrow as pa

    if column.dtype == "string":
        return pa.array(values.tolist(), pa.string())
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(column.shape):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array


def read_json(path: Path) -> dict[str, Any]:
    """A file of JSON. Raises RecordingError where it is missing, damaged or cut short."""
    if not path.is_file():
        raise RecordingError(f"{path} is missing")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecordingError(f"{path} is damaged or cut short ({error})") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines."""
    if not path.is_file():
        raise RecordingError(f"{path} is missing")
    lines = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise RecordingError(f"{path}, line {number}: damaged or cut short ({error})") from error
    return lines


def read_table(path: Path, where: str, rows: slice | None = None, columns: list[str] | None = None) -> pa.Table:
    """A parquet file. Raises RecordingError where it is missing, damaged or cut short."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise RecordingError(f"{where}: {path} is missing")
    try:
        table = pq.read_table(path, columns=columns, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise RecordingError(f"{where}: {path} is damaged or cut short ({str(error).splitlines()[0]}); fetch it again") from error
    return table if rows is None else table.slice(rows.start, rows.stop - rows.start)


def write_table(table: pa.Table, path: Path) -> None:
    """Write beside `path`, then rename."""
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(table, temporary, compression="snappy")
    temporary.replace(path)
