"""Zero-shot labels of a run, looked up by image while a model predicts.

What enters: the folder of a run. What leaves: for each image of a manifest the place of its label,
a short text that goes along with the image, and in an actor the label and its score from there.
Only ids are read on the driver; an actor reads the parts that its own images need, and keeps the
last ones: images come in the order of their ids, and so do parts.

Shapes: H W pixels.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.views.evaluate import check_same
from zsplg_ray.vocab import ClassList

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ZeroShotRun:
    """A run whose labels are used; cheap to send to other processes."""

    folder: RunFolder
    fingerprint: str
    """`labels_fingerprint` of its run.json."""

    @classmethod
    def open(cls, uri: str, classes: ClassList) -> ZeroShotRun:
        """The run in a folder.

        Raises: ValueError if there is none, if it is half relabelled or still without labels, or
            if its classes are not `classes`.
        """
        folder = RunFolder(uri)
        run = folder.read_run()
        fix = "give the folder of a `zsplg label --out` run"
        if run is None:
            raise ValueError(complain("fuse", "a run's folder (with run.json)", uri, fix))
        if run["labels_state"] != "complete":
            fix = f"run `zsplg relabel --run {uri}` to finish it"
            rule = "a run with whole labels"
            raise ValueError(complain("fuse", rule, "a half relabelled one", fix))
        check_same(classes, ClassList.from_dict(run["classes"]), "zero-shot labels")
        return cls(folder, run["labels_fingerprint"])

    def joined(self, manifest: pa.Table) -> pa.Table:
        """The manifest with a column `zeroshot`, null where an image has no label.

        Raises: ValueError if none has one.
        """
        places = self.folder.find_labels(self.folder.parts("labels"))
        rows = manifest.to_pylist()
        found = [places.of(row["image_id"], row["uri"]) for row in rows]
        column = [place and f"{place[0]} {place[1]}" for place in found]
        if not any(column):
            fix = f"its images are called such as {next(iter(places.by_key), 'nothing')!r}"
            shown = f"{self.folder.uri} for images such as {rows[0]['image_id']!r}"
            raise ValueError(complain("fuse", "a run over the same images", shown, fix))
        return manifest.append_column("zeroshot", pa.array(column, pa.string()))

    def read(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        """Label and score * 255, uint8 [H, W], from a place of `joined`."""
        name, _, row = place.partition(" ")
        part = _part(self.folder.uri, name)
        label_png, score_png = (part[c][int(row)].as_py() for c in ("label_png", "score_png"))
        return decode_png(label_png), decode_png(score_png)


@functools.lru_cache(maxsize=4)
def _part(uri: str, name: str) -> pa.Table:
    """One labels part; a run in use is not relabelled meanwhile."""
    return RunFolder(uri).read_part("labels", name, ["label_png", "score_png"])
