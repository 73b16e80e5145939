"""Whether a table is one that a run has written: the columns that readers rest on, and their types.

What enters: a table as it was read from a part of a run's folder, which may come from a stranger.
What leaves: nothing, or a ValueError that names the column and the part. What is in a cell is
looked at by whoever decodes it (label maps: images; segments: label.segments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pyarrow as pa

from zsplg_ray.settings import complain


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_integers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)


_TYPES: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "image_id": ("texts", _is_text),
    "uri": ("texts", _is_text),
    "width": ("whole numbers", pa.types.is_integer),
    "height": ("whole numbers", pa.types.is_integer),
    "image_sha256": ("texts", _is_text),
    "segments": ("lists", pa.types.is_list),
    "label_png": ("bytes", _is_binary),
    "score_png": ("bytes", _is_binary),
    "class_px": ("lists of whole numbers", _is_integers),
    "source": ("texts", _is_text),
    "confidence": ("numbers", pa.types.is_floating),
    "error": ("texts", _is_text),
}


def check_columns(table: pa.Table, wanted: Iterable[str] | None, where: str) -> None:
    """Look at the columns of a part.

    Args:
        table: As read.
        wanted: Columns that must be there; None: at least the ids.
        where: Address of the part, for errors.

    Raises:
        ValueError: a column is missing or of another type, or a row has no id.
    """
    fix = "no run has written that: take it away"
    for name in ("image_id",) if wanted is None else wanted:
        if name not in table.column_names:
            shown = f"{where} with {', '.join(table.column_names) or 'none'}"
            raise ValueError(complain("part", f"with a column {name}", shown, fix))
    for name in table.column_names:
        kind, fits = _TYPES.get(name, ("", None))
        if fits is not None and not fits(table[name].type):
            shown = f"{table[name].type} in {where}"
            raise ValueError(complain(f"{name} of a part", kind, shown, fix))
    if "image_id" in table.column_names and table["image_id"].null_count:
        raise ValueError(complain("image_id of a part", "given", f"none in {where}", fix))
