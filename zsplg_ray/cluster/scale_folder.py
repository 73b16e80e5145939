"""What a large run's folder costs: to look through when the run is resumed, and in bytes.

What enters: how many images. What leaves: rows for `scale_benchmark`. The parts made here hold real
ids in real schemas and nothing else, for nothing else is looked at when a run is resumed.
"""

from __future__ import annotations

import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from zsplg_ray.cluster.parts import labels_row, segments_row
from zsplg_ray.cluster.simulated import DIM, plausible
from zsplg_ray.exactly_once import anti_join, repair
from zsplg_ray.part_index import NAME, PartIndex
from zsplg_ray.records import LABELS, segments_schema
from zsplg_ray.rundir import Kind, RunFolder, part_name
from zsplg_ray.sources import MANIFEST

SCHEMAS: dict[Kind, pa.Schema] = {"labels": LABELS, "segments": segments_schema(DIM)}


class CountedFolder(RunFolder):
    """A run's folder that counts the parts that are opened, and its listings."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.opened = self.listed = 0

    def read_part(self, kind: Kind, name: str, columns: list[str] | None = None) -> pa.Table:
        """Counted."""
        self.opened += 1  # from threads: a count may be lost, which does not matter here
        return super().read_part(kind, name, columns)

    def listing(self, kind: Kind) -> Any:
        """Counted."""
        found = super().listing(kind)
        self.listed += max(1, -(-len(found) // 1000))
        return found


def write_finished(folder: RunFolder, images: int, in_flight: int) -> list[str]:
    """The parts of a finished run, with ids only; returns the ids."""
    ids = [f"photos/{number // 1000:06d}/IMG_{number:09d}.jpg" for number in range(images)]

    def write(start: int) -> None:
        block = ids[start : start + in_flight]
        for kind, schema in SCHEMAS.items():
            columns = {field.name: pa.nulls(len(block), field.type) for field in schema}
            columns |= {"image_id": pa.array(block), "uri": pa.array(block)}
            path = f"{folder.path}/{kind}/{part_name(block)}.parquet"
            pq.write_table(pa.table(columns, schema=schema), path, compression="zstd")

    for kind in SCHEMAS:
        Path(folder.path, kind).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(0, images, in_flight)))
    return ids


def resume(where: RunFolder, images: int, in_flight: int) -> list[dict[str, Any]]:
    """Look through a finished run without an index, then with the one left by that."""
    ids = write_finished(where, images, in_flight)
    manifest = pa.table({"image_id": ids, "uri": ids}, schema=MANIFEST)
    del ids
    rows = []
    for what in ("no index", "index"):
        folder = CountedFolder(where.path)
        began, cpu = time.monotonic(), time.process_time()
        index = PartIndex.load(folder)
        loaded = time.monotonic()
        found = repair(folder, "label", index)
        repaired = time.monotonic()
        todo = anti_join(manifest, found.done)
        joined = time.monotonic()
        if len(todo) or len(found.done) != images:
            raise RuntimeError(f"{len(found.done)} of {images} images found")
        index_bytes = Path(where.path, NAME).stat().st_size
        rows.append(
            {
                "": what,
                "images": images,
                "parts of each kind": -(-images // in_flight),
                "load the index, s": round(loaded - began, 1),
                "repair, s": round(repaired - loaded, 1),
                "anti-join, s": round(joined - repaired, 2),
                "all, s": round(joined - began, 1),
                "CPU s": round(time.process_time() - cpu, 1),
                "parts opened": folder.opened,
                "pages listed": folder.listed,
                "index, MiB": round(index_bytes / 2**20, 1),
                "peak memory, MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            }
        )
        del found, index
    return rows


def row_bytes(segments: int, in_flight: int) -> dict[str, Any]:
    """Bytes of an image in parts of that many, with discs for masks."""
    found, composed = plausible(segments)
    image = {"image_sha256": "0" * 64, "uri": "s3://bucket/photos/000001/IMG_000000001.jpg"}
    rows: dict[Kind, list[dict[str, Any]]] = {"labels": [], "segments": []}
    for number in range(in_flight):
        image["image_id"] = f"photos/000001/IMG_{number:09d}.jpg"
        rows["labels"].append(labels_row(image, composed, 21))
        rows["segments"].append(segments_row(image, found))
    size = {}
    for kind, schema in SCHEMAS.items():
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(rows[kind], schema=schema)
        pq.write_table(table, sink, compression="none", use_dictionary=False)
        size[kind] = sink.getvalue().size / in_flight
    return {
        "segments": segments,
        "segments/, KiB": round(size["segments"] / 1024, 1),
        "labels/, KiB": round(size["labels"] / 1024, 1),
    }
