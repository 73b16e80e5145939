"""The door between rooms and processes: Parquet schemas and the PNG codec of label maps.

What enters and leaves: numpy arrays on one side, bytes and Arrow tables on the other. Whoever reads
or writes a run's folder goes through these schemas, so that a part written on one node is read on
another, and by pandas, DuckDB or Spark, without this project.
"""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from zsplg_ray.images import MOST_PX, decode_indices

IGNORE = 255
"""Class index of a pixel that has no label."""

_IMAGE = [("image_id", pa.string()), ("uri", pa.string())]
_SIZE = [("width", pa.int32()), ("height", pa.int32())]

SEGMENT = pa.struct(
    [
        ("box_xyxy", pa.list_(pa.int32(), 4)),
        ("area_px", pa.int64()),
        ("rle", pa.binary()),
        ("predicted_iou", pa.float32()),
        ("stability", pa.float32()),
    ]
)


def segments_schema(embedding_dim: int) -> pa.Schema:
    """One row an image; the embedding of a segment is a list of `embedding_dim` float16."""
    fields = [*SEGMENT, pa.field("embedding", pa.list_(pa.float16(), embedding_dim))]
    return pa.schema(
        [*_IMAGE, *_SIZE, ("image_sha256", pa.string()), ("segments", pa.list_(pa.struct(fields)))]
    )


LABELS = pa.schema(
    [
        *_IMAGE,
        *_SIZE,
        ("label_png", pa.binary()),
        ("score_png", pa.binary()),
        ("class_px", pa.list_(pa.int64())),
        ("source", pa.string()),
        ("confidence", pa.float32()),
    ]
)
"""One row an image: class indices and scores as 8-bit PNGs of the image's size."""

ERRORS = pa.schema(
    [*_IMAGE, ("stage", pa.string()), ("error", pa.string()), ("detail", pa.string())]
)
"""One row an image that could not be done."""


def encode_png(map_HW: np.ndarray) -> bytes:
    """A uint8 [H, W] map as a greyscale PNG; the same array gives the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(map_HW, dtype=np.uint8)).save(
        buffer, format="PNG", compress_level=6
    )
    return buffer.getvalue()


def decode_png(data: bytes | None) -> np.ndarray:
    """The uint8 [H, W] map of `encode_png`. Raises: ValueError if it is none, or nothing."""
    return decode_indices(data or b"", name="label_png", max_px=MOST_PX)


def encode_score(score_HW: np.ndarray) -> bytes:
    """A float [H, W] score map in [0, 1] as a PNG of round(255 * score)."""
    return encode_png(np.rint(np.clip(score_HW, 0.0, 1.0) * 255.0).astype(np.uint8))
