"""FiftyOne: its ImageSegmentationDirectory, data/ and labels/ with PNG masks of the same names.

Enters: label maps. Leaves: them as they are, 255 too. That layout has no place for class names, so
they stand in mask_targets.json, and load.py shows how both are read.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from zsplg_ray.records import IGNORE, encode_png
from zsplg_ray.views.export.job import Item, Job, things

_LOAD = '''"""Loads this folder into FiftyOne: python load.py [IMAGES], or `dataset = load()`.

IMAGES is the images' folder, by default data/ beside this file.
"""

import json
import sys
from pathlib import Path

import fiftyone as fo

HERE = Path(__file__).resolve().parent


def load(data_path: str = str(HERE / "data"), label_field: str = "labels") -> fo.Dataset:
    """The data set, with its class names; data_path is the images' folder."""
    dataset = fo.Dataset.from_dir(
        dataset_type=fo.types.ImageSegmentationDirectory,
        data_path=data_path,
        labels_path=str(HERE / "labels"),
        label_field=label_field,
    )
    targets = json.loads((HERE / "mask_targets.json").read_text(encoding="utf-8"))
    dataset.mask_targets[label_field] = {int(k): name for k, name in targets.items()}
    dataset.save()
    return dataset


if __name__ == "__main__":
    session = fo.launch_app(load(*sys.argv[1:2]))
    session.wait()
'''


class FiftyoneWriter:
    """Writes FiftyOne's directory."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> None:
        """The mask of an image."""
        self.job.write(f"labels/{item.name}.png", encode_png(item.label_HW))

    def finish(self, entries: Iterable[tuple[Item, None]]) -> str:
        """The names of the classes, and how to load them."""
        for _ in entries:
            pass
        indices = [*(index for index, _ in things(self.job.classes)), IGNORE]
        self.job.write_json("mask_targets.json", {str(k): self.job.name_of(k) for k in indices})
        self.job.write("load.py", _LOAD)
        images = " IMAGES" if self.job.options.images == "none" else ""
        return f"python {shlex.quote(f'{self.job.out}/load.py')}{images}"
