"""Zero-shot labels of unlabelled images: found in a run's folder once, read one at a time.

What enters: the folder of a `zsplg label` (or predict) run, and the ids of images. What leaves: for
each image the addresses of its label and score, which `read_label` turns into maps in any process.

Why this way: the labels stay where they are, in Parquet, and a loader reads the two cells of the
image it is at. An image is known by its id without suffix, as for masks, or by its address: ids of
one picture differ where a run was over a folder and training is over a split file.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from zsplg_ray.records import decode_png
from zsplg_ray.rundir import RunFolder
from zsplg_ray.settings import complain
from zsplg_ray.storage import Place, cell_uri, read_bytes
from zsplg_ray.vocab import ClassList


class ZeroShot(NamedTuple):
    """Where the labels of some images are."""

    label_uris: list[str | None]
    """One an image, None where there is no label."""
    score_uris: list[str | None]
    classes: ClassList | None
    """What the labels' numbers mean, if they tell."""
    fingerprint: str | None
    """Of everything that the labels were made with, if they tell."""


def find_labels(
    source: str, image_ids: Sequence[str], uris: Sequence[str] | None = None
) -> ZeroShot:
    """Look up the labels of images in a run's folder. Of several rows of an image the first counts.

    Args:
        source: The run's folder.
        image_ids: With or without suffix.
        uris: Their addresses; an image whose address is not found is looked for by its id.

    Raises:
        ValueError: no labels are there, a part cannot be read, a relabel was interrupted half-way,
            or none of the images has a label.
    """
    folder = RunFolder(source)
    run = folder.read_run()
    if run is not None and run["labels_state"] != "complete":
        fix = f"run `zsplg relabel --run {source}` to finish it"
        raise ValueError(complain("zeroshot", "whole", "a half relabelled run", fix))
    parts = folder.parts("labels")
    if not parts:
        fix = "give the folder of a `zsplg label --out` run that has finished images"
        raise ValueError(complain("zeroshot", "a run's folder with labels/ in it", source, fix))
    try:
        places = folder.find_labels(parts)
        meta = folder.part_meta("labels", parts[0])
    except (OSError, pa.ArrowException) as e:
        fix = f"mend the run ({' '.join(str(e).split())[:200]})"
        raise ValueError(complain("zeroshot", "a run whose parts can be read", source, fix)) from e
    found = map(places.of, image_ids, uris or [None] * len(image_ids))
    pairs = [(None, None) if place is None else _cells(source, *place) for place in found]
    if not any(label for label, _ in pairs):
        example = f"{next(iter(places.by_key), 'no image')!r} there and {image_ids[0]!r} here"
        fix = "label the unlabelled images themselves: their ids have to match"
        raise ValueError(complain("zeroshot", "labels of the unlabelled images", example, fix))
    classes = ClassList.from_dict(meta["classes"]) if "classes" in meta else None
    fingerprint = (run or meta).get("labels_fingerprint")
    labels, scores = zip(*pairs, strict=True)
    return ZeroShot(list(labels), list(scores), classes, fingerprint)


def _cells(source: str, part: str, row: int) -> tuple[str, str]:
    """Addresses of a label and its score."""
    place = Place.parse(source).child(f"labels/{part}.parquet")
    return cell_uri(place, "label_png", row), cell_uri(place, "score_png", row)


def read_label(label_uri: str, score_uri: str) -> tuple[np.ndarray, np.ndarray]:
    """A zero-shot label and 255 * its score, both uint8 [H, W].

    Raises:
        ValueError: a cell is empty or holds no such map, or the two have other sizes.
        OSError: the part has vanished.
    """
    label_HW = decode_png(read_bytes(label_uri))
    score_HW = decode_png(read_bytes(score_uri))
    if label_HW.shape != score_HW.shape:
        fix = "label the image again"
        shown = f"{score_HW.shape} and {label_HW.shape}"
        raise ValueError(complain("score and label", "maps of one size", shown, fix))
    return label_HW, score_HW
