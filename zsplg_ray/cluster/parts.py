"""Rows of a run's folder, gathered and written as parts.

What enters: one image's result at a time. What leaves: `labels/X`, `errors/X`, then `segments/X`,
the commit (see rundir).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from zsplg_ray.label.compose import Composed, summarise
from zsplg_ray.label.labeler import Naming
from zsplg_ray.label.segments import Segments
from zsplg_ray.records import ERRORS, LABELS, encode_png, encode_score, segments_schema
from zsplg_ray.rundir import RunFolder, part_name


def labels_row(
    image: Mapping[str, Any], composed: Composed, n_classes: int, source: str = "zeroshot"
) -> dict[str, Any]:
    """A row of labels/. `image` has image_id and uri."""
    class_px, confidence = summarise(composed, n_classes)
    height, width = composed.label_HW.shape
    return {
        "image_id": image["image_id"],
        "uri": image["uri"],
        "width": width,
        "height": height,
        "label_png": encode_png(composed.label_HW),
        "score_png": encode_score(composed.score_HW),
        "class_px": class_px,
        "source": source,
        "confidence": confidence,
    }


def relabel_table(segments_table: pa.Table, naming: Naming) -> pa.Table:
    """Rows of segments/ -> rows of labels/, in the same order."""
    rows = []
    column = segments_table["segments"]
    for i, row in enumerate(segments_table.drop_columns(["segments"]).to_pylist()):
        segments = Segments.from_arrow(column[i].values, (row["height"], row["width"]))
        rows.append(labels_row(row, naming.compose(segments), len(naming.classes)))
    return pa.Table.from_pylist(rows, schema=LABELS)


def relabel_part(folder: RunFolder, name: str, naming: Naming, meta: Mapping[str, Any]) -> int:
    """Compose `labels/name` from `segments/name` and put it in place; returns its images."""
    labels = relabel_table(folder.read_part("segments", name), naming)
    folder.write_part("labels", name, labels, meta)
    return len(labels)


class PartWriter:
    """Collects the rows of some images and writes them as one part of each kind.

    Args:
        folder: The run's folder.
        meta: Fingerprints and class list for the files' metadata.
        embedding_dim: D of the segments' schema.
        n_classes: Classes with background.
    """

    def __init__(
        self, folder: RunFolder, meta: Mapping[str, Any], embedding_dim: int, n_classes: int
    ) -> None:
        self.folder, self.meta, self.n_classes = folder, meta, n_classes
        self.schema = segments_schema(embedding_dim)
        self._clear()

    def _clear(self) -> None:
        self.segments: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []
        self.errors: list[dict[str, Any]] = []
        self.since = time.monotonic()

    def add(self, image: Mapping[str, Any], segments: Segments, composed: Composed) -> None:
        """One image done. `image` has image_id, uri and image_sha256."""
        height, width = segments.size_hw
        row = {
            **{k: image[k] for k in ("image_id", "uri", "image_sha256")},
            "width": width,
            "height": height,
            "segments": segments.to_rows(),
        }
        label = labels_row(image, composed, self.n_classes)  # may fail: then neither is kept
        self.segments.append(row)
        self.labels.append(label)

    def fail(self, image: Mapping[str, Any], stage: str, error: str, detail: str = "") -> None:
        """One image that could not be done."""
        self.errors.append(
            {
                **{k: image[k] for k in ("image_id", "uri")},
                "stage": stage,
                "error": " ".join(error.split())[:500],
                "detail": detail[-4000:],
            }
        )

    @property
    def ids(self) -> list[str]:
        """Image ids not written yet."""
        return [row["image_id"] for row in (*self.segments, *self.errors)]

    def write(self) -> None:
        """Write what there is; segments last, since their part is what counts as done."""
        name = part_name(row["image_id"] for row in self.segments)
        if self.labels:
            self._put("labels", name, self.labels, LABELS)
        if self.errors:
            failed = part_name(row["image_id"] for row in self.errors)
            self._put("errors", failed, self.errors, ERRORS)
        if self.segments:
            self._put("segments", name, self.segments, self.schema)
        self._clear()

    def _put(self, kind: Any, name: str, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        self.folder.write_part(kind, name, pa.Table.from_pylist(rows, schema=schema), self.meta)
