"""Columns of texts (ids, addresses) out of a Parquet file of any origin.

What enters: the place of a Parquet file. What leaves: lists of texts; or one ValueError that names
the setting and the file, whatever is wrong with it.

Why not plainly `read().to_pylist()`: a dictionary of one text of ten MB can stand for a million
rows of it in a file of some KB. So texts, and bytes that may be texts, are read as dictionaries,
and their lengths looked at before a list is made.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from zsplg_ray.filesystems import StoreError
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place

MAX_ID_CHARS = 4096
"""Of an image's id, as of a path."""
MAX_URI_CHARS = 4 * MAX_ID_CHARS

pc: Any = pyarrow.compute
"""Its functions are made while it is imported, where no type checker sees them."""

_TEXTS = ["image_id", "uri"]


@contextlib.contextmanager
def opened(place: Place, name: str) -> Iterator[pq.ParquetFile]:
    """The file, open for `texts`. `name`: the setting that it was given for, for errors.

    Raises: ValueError for all that is wrong with the file, also what shows inside the context.
    """
    try:
        with place.open() as source:
            footer = pq.read_metadata(source)
            there = {footer.schema.column(i).path for i in range(footer.num_columns)}
            known = [name for name in _TEXTS if name in there]
            with pq.ParquetFile(source, metadata=footer, read_dictionary=known) as file:
                yield file
    except (pa.ArrowException, OSError, UnicodeDecodeError, RecursionError) as error:
        if isinstance(error, OSError) and (
            error.errno is not None or isinstance(error, StoreError)
        ):
            raise  # the storage failed, not the file
        fix = f"write it again ({' '.join(str(error).split())})"
        raise ValueError(complain(name, "a readable Parquet file", place.uri, fix)) from error


def texts(file: pq.ParquetFile, column: str, most_chars: int, unique: bool = False) -> list[str]:
    """The texts of a column, numbers as texts.

    Args:
        file: Of `opened`.
        column: Its name.
        most_chars: The longest that a text may be.
        unique: No two are the same; said early, for then they cannot be more than the file holds.

    Raises: pa.ArrowException, which `opened` turns into an error of its own: a text is too long or
        missing, or there are other things in the column.
    """
    kind = file.schema_arrow.field(column).type
    if not (pa.types.is_dictionary(kind) or _is_small(kind)):
        raise pa.ArrowInvalid(f"{column} of type {kind}, neither texts nor numbers")
    found = file.read(columns=[column])[column]
    distinct = 0
    for chunk in found.chunks:
        values = chunk.dictionary if isinstance(chunk, pa.DictionaryArray) else chunk
        distinct += len(values)
        if isinstance(chunk, pa.DictionaryArray):
            longest = pc.max(pc.binary_length(values)).as_py() or 0
            if longest > most_chars:
                raise pa.ArrowInvalid(f"{column} of {longest} characters, at most {most_chars}")
    if found.null_count:
        row = pc.index(pc.is_null(found), True).as_py()
        raise pa.ArrowInvalid(f"no {column} in row {row}")
    if unique and distinct < len(found):
        found = found.unify_dictionaries() if pa.types.is_dictionary(found.type) else found
        values, counts = pc.value_counts(found).flatten()
        twice = values[pc.index(pc.greater(counts, 1), True).as_py()].as_py()
        raise pa.ArrowInvalid(f"{column} {twice} more than once")
    return found.cast(pa.string()).to_pylist()


def _is_small(kind: pa.DataType) -> bool:
    """Whether no value of a type has more than some bytes."""
    return pa.types.is_primitive(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)


def metadata(file: pq.ParquetFile, key: bytes) -> dict[str, Any]:
    """The JSON mapping under a key of the schema's metadata, empty if there is none.

    Raises: pa.ArrowException, which `opened` turns into an error of its own, if it is none.
    """
    try:
        found = json.loads((file.schema_arrow.metadata or {}).get(key, b"{}"))
    except (ValueError, RecursionError) as error:
        raise pa.ArrowInvalid(f"its metadata is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise pa.ArrowInvalid("its metadata is no mapping")
    return found
