"""Rows of a run's folder, gathered and written as parts.

What enters: one image's rows at a time. What leaves: a part of each kind, and `errors/X`; the kind
that counts as the commit comes last (see rundir). Addresses are written without credentials.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from zsplg_ray.label.compose import Composed, summarise
from zsplg_ray.label.naming import Naming
from zsplg_ray.label.segments import Segments
from zsplg_ray.part_index import Written
from zsplg_ray.records import ERRORS, LABELS, encode_png, encode_score
from zsplg_ray.rundir import Kind, RunFolder, part_name
from zsplg_ray.safe_text import masked, one_line, without_credentials


def labels_row(
    image: Mapping[str, Any], composed: Composed, n_classes: int, source: str = "zeroshot"
) -> dict[str, Any]:
    """A row of labels/. `image` has image_id and uri."""
    class_px, confidence = summarise(composed, n_classes)
    height, width = composed.label_HW.shape
    return {
        "image_id": image["image_id"],
        "uri": without_credentials(image["uri"]),
        "width": width,
        "height": height,
        "label_png": encode_png(composed.label_HW),
        "score_png": encode_score(composed.score_HW),
        "class_px": class_px,
        "source": source,
        "confidence": confidence,
    }


def segments_row(image: Mapping[str, Any], segments: Segments) -> dict[str, Any]:
    """A row of segments/. `image` has image_id, uri and image_sha256."""
    height, width = segments.size_hw
    return {
        **{k: image[k] for k in ("image_id", "image_sha256")},
        "uri": without_credentials(image["uri"]),
        "width": width,
        "height": height,
        "segments": segments.to_rows(),
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
        schemas: Kind -> schema of what each image has a row in; the last kind is the commit.
    """

    def __init__(
        self, folder: RunFolder, meta: Mapping[str, Any], schemas: Mapping[Kind, pa.Schema]
    ) -> None:
        self.folder, self.meta, self.schemas = folder, meta, dict(schemas)
        self._clear()

    def _clear(self) -> None:
        self.rows: dict[Kind, list[dict[str, Any]]] = {kind: [] for kind in self.schemas}
        self.errors: list[dict[str, Any]] = []
        self.since = time.monotonic()

    def add(self, rows: Mapping[Kind, dict[str, Any]]) -> None:
        """One image done: its row of each kind."""
        for kind, waiting in self.rows.items():
            waiting.append(rows[kind])

    def fail(self, image: Mapping[str, Any], stage: str, error: str, detail: str = "") -> None:
        """One image that could not be done."""
        self.errors.append(
            {
                "image_id": image["image_id"],
                "uri": without_credentials(image["uri"]),
                "stage": stage,
                "error": one_line(masked(" ".join(error.split())))[:500],
                "detail": masked(detail)[-4000:],
            }
        )

    @property
    def done(self) -> list[str]:
        """Ids of the images that are done and not written yet."""
        return [row["image_id"] for row in next(iter(self.rows.values()))]

    @property
    def ids(self) -> list[str]:
        """Image ids not written yet, failed ones too."""
        return [*self.done, *(row["image_id"] for row in self.errors)]

    def write(self) -> list[Written]:
        """Write what there is; the commit last, since its part is what counts as done."""
        *before, commit = self.schemas
        written = []
        if self.done:
            for kind in before:
                written.append(self._put(kind, self.rows[kind], self.schemas[kind]))
        if self.errors:
            written.append(self._put("errors", self.errors, ERRORS))
        if self.done:
            written.append(self._put(commit, self.rows[commit], self.schemas[commit]))
        self._clear()
        return written

    def _put(self, kind: Kind, rows: list[dict[str, Any]], schema: pa.Schema) -> Written:
        image_ids = [row["image_id"] for row in rows]
        name, table = part_name(image_ids), pa.Table.from_pylist(rows, schema=schema)
        size = self.folder.write_part(kind, name, table, self.meta)
        return Written(kind, name, size, image_ids)
