"""Reading images, apart from the actors that hold the models.

What enters: blocks of the manifest (image_id, uri). What leaves: the same rows with RGB pixels, or
with the reason why there are none. Runs in plain Ray tasks on CPUs anywhere in the cluster. A bad
image is a row like any other here: nothing is raised for it. A store that is away for good, or lets
nobody in any more, ends the work instead: the same command goes on from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from zsplg_ray.cluster.ledger import MAX_KILLS, Ledger
from zsplg_ray.filesystems import StoreError
from zsplg_ray.images import ImageError, decode_image
from zsplg_ray.storage import read_bytes

DECODED = pa.schema(
    [
        ("image_id", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("zeroshot", pa.string()),
        ("image_sha256", pa.string()),
        ("rgb", pa.large_binary()),
        ("stage", pa.string()),
        ("error", pa.string()),
    ]
)
"""One row an image: uint8 RGB pixels in `rgb`, or stage and error with `rgb` null. `zeroshot` tells
where the image's zero-shot label stands, if the manifest does."""


def decode_block(block: pa.Table, max_px: int, ledger: Ledger) -> Iterator[pa.Table]:
    """Decode the images of one manifest block, one table of `DECODED` an image."""
    rows = block.to_pylist()
    deaths = ledger.enter("decode", [row["image_id"] for row in rows])
    for row in rows:
        image_id = row["image_id"]
        times = deaths.get(image_id, 0)
        if times >= MAX_KILLS:
            error = f"killed its process {times} times while it was read"
            yield _table(row, stage="decode", error=error)
        elif times:  # a suspect, noted by itself
            ledger.begin("decode", [image_id])
            table = decode_row(row, max_px)
            ledger.finish("decode", [image_id])  # before the wait for somebody to take it
            yield table
        else:
            yield decode_row(row, max_px)
    ledger.finish("decode", [image_id for image_id, times in deaths.items() if not times])


def decode_row(row: dict[str, Any], max_px: int) -> pa.Table:
    """Read and decode one image of the manifest: one row of `DECODED`, whatever is wrong with it.

    Args:
        row: With image_id and uri.
        max_px: Most pixels of an image.

    Raises: StoreError if the store lets nobody in any more.
    """
    try:
        data = read_bytes(row["uri"])
    except Exception as e:  # every file system has errors of its own
        if isinstance(e, StoreError) and e.everything:
            raise  # else every image that is left would soon stand in errors/
        return _table(row, stage="read", error=f"{type(e).__name__}: {e}")
    try:
        image_HWC = decode_image(data, max_px=max_px)
    except ImageError as e:
        return _table(row, stage="decode", error=str(e))
    except Exception as e:
        return _table(row, stage="decode", error=f"{type(e).__name__}: {e}")
    height, width = image_HWC.shape[:2]
    return _table(
        row,
        width=width,
        height=height,
        image_sha256=hashlib.sha256(data).hexdigest(),
        rgb=pa.py_buffer(image_HWC),
    )


def _table(row: dict[str, Any], **values: Any) -> pa.Table:
    rgb = values.pop("rgb", None)
    columns = {k: row.get(k) for k in ("image_id", "uri", "zeroshot")} | values
    table = {f.name: pa.array([columns.get(f.name)], f.type) for f in DECODED if f.name != "rgb"}
    if rgb is None:
        table["rgb"] = pa.nulls(1, pa.large_binary())
    else:  # no copy of what may be hundreds of MiB
        ends = pa.py_buffer(pa.array([0, rgb.size], pa.int64()).buffers()[1])
        table["rgb"] = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, ends, rgb])
    return pa.table([table[f.name] for f in DECODED], schema=DECODED)
