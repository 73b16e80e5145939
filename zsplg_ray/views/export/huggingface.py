"""Hugging Face `datasets`: data/SPLIT-*.parquet with images and masks inside, and README.md.

Enters: label maps, and the images' files. Leaves: Parquet files whose schema metadata tells
`datasets` that two columns are images; pandas and DuckDB read them as they are. `label` is an 8-bit
PNG of class indices, 255 = ignore. The card, README.md, has the features and the class names.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from zsplg_ray.records import IGNORE, encode_png
from zsplg_ray.views.export.job import Item, Job

SHARD_BYTES = 400 * 2**20
GROUP_ROWS, GROUP_BYTES = 100, 64 * 2**20
"""What readers take at once, and what is kept here until it is written: at most so much."""
SPLIT_NAMES = {"train": "train", "val": "validation"}
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_SCALARS = {
    "image_id": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "source": pa.string(),
    "confidence": pa.float32(),
}
_DTYPES = {pa.string(): "string", pa.int32(): "int32", pa.float32(): "float32"}


class HuggingfaceWriter:
    """Writes a Parquet data set."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pictures = ["label"] if job.options.images == "none" else ["image", "label"]
        features: dict[str, Any] = {name: {"_type": "Image"} for name in self.pictures}
        for name, kind in _SCALARS.items():
            features[name] = {"dtype": _DTYPES[kind], "_type": "Value"}
        told = json.dumps({"info": {"features": features}})
        fields = [*((name, _IMAGE) for name in self.pictures), *_SCALARS.items()]
        self.schema = pa.schema(fields, metadata={"huggingface": told})
        self.sizes: dict[str, list[int]] = {}

    def entry(self, item: Item) -> dict[str, Any]:
        """The row of an image."""
        height, width = item.size_hw
        row: dict[str, Any] = {
            "label": {"bytes": encode_png(item.label_HW), "path": f"{item.name}.png"},
            "image_id": item.image_id,
            "width": width,
            "height": height,
            "source": item.source,
            "confidence": item.confidence,
        }
        if item.data is not None:
            row["image"] = {"bytes": item.data, "path": item.reference}
        return row

    def finish(self, entries: Iterable[tuple[Item, dict[str, Any]]]) -> str:
        """The shards, and the card."""
        shards = {split: _Shards(self.job, split, self.schema) for split in self.job.splits}
        for item, row in entries:
            shards[item.split].add(row)
        for each in shards.values():
            each.close()
        names = {str(k): name for k, name in enumerate(self.job.classes.names)}
        names[str(IGNORE)] = self.job.ignore_name
        self.job.write_json("id2label.json", names)
        self.job.write("README.md", self._card([s for s in shards.values() if s.rows], names))
        self.job.told["shards"] = sum(each.files for each in shards.values())
        out = str(self.job.out)
        upload = f"hf upload NAME {shlex.quote(out)} --repo-type dataset"
        return f"datasets.load_dataset({out!r}), or {upload}"

    def _card(self, shards: list[_Shards], names: dict[str, str]) -> str:
        """README.md: what the hub and `datasets` read at its head, and the classes."""
        features: list[dict[str, Any]] = [{"name": n, "dtype": "image"} for n in self.pictures]
        features += [{"name": n, "dtype": _DTYPES[kind]} for n, kind in _SCALARS.items()]
        splits = [
            {"name": s.name, "num_bytes": s.table_bytes, "num_examples": s.rows} for s in shards
        ]
        head = {
            "task_categories": ["image-segmentation"],
            "dataset_info": {
                "features": features,
                "splits": splits,
                "download_size": sum(s.file_bytes for s in shards),
                "dataset_size": sum(s.table_bytes for s in shards),
            },
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [
                        {"split": s.name, "path": f"data/{s.name}-*.parquet"} for s in shards
                    ],
                }
            ],
        }
        listed = json.dumps(names, ensure_ascii=False, indent=1)
        return (
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n"
            "# Labels by zsplg_ray\n\n"
            f"{sum(s.rows for s in shards)} images with semantic segmentation labels that a model "
            "made. `label` is an 8-bit PNG of class indices:\n\n"
            f"```json\n{listed}\n```\n"
        )


class _Shards:
    """The files of a split, each begun when the one before is full."""

    def __init__(self, job: Job, split: str, schema: pa.Schema) -> None:
        self.name = SPLIT_NAMES[split]
        self._job, self._schema = job, schema
        self._rows: list[dict[str, Any]] = []
        self._waiting = 0
        self._writer: pq.ParquetWriter | None = None
        self._written = 0
        self.rows = self.files = self.table_bytes = self.file_bytes = 0

    def add(self, row: dict[str, Any]) -> None:
        """Take a row."""
        self._rows.append(row)
        self._waiting += sum(len(row[name]["bytes"]) for name in ("image", "label") if name in row)
        self.rows += 1
        if len(self._rows) == GROUP_ROWS or self._waiting >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        table = pa.Table.from_pylist(self._rows, schema=self._schema)
        self._rows, self._waiting = [], 0
        if self._writer is None:
            path = self._job.path(f"data/{self.name}-{self.files:05d}")
            # Images are compressed already, and a dictionary of pictures would be their copy.
            self._writer = pq.ParquetWriter(path, self._schema, use_dictionary=False)
            self.files, self._written = self.files + 1, 0
        self._writer.write_table(table)
        self.table_bytes += table.nbytes
        self._written += table.nbytes
        if self._written >= SHARD_BYTES:
            self._writer.close()
            self._writer = None

    def close(self) -> None:
        """Write what is left, and name the files by how many there are."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for number in range(self.files):
            path = self._job.path(f"data/{self.name}-{number:05d}")
            self.file_bytes += path.stat().st_size
            path.rename(f"{path}-of-{self.files:05d}.parquet")
