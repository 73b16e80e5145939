"""Runs with labels that are awkward on purpose, and their maps."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from zsplg_ray.labels import Labels
from zsplg_ray.records import LABELS, encode_png, encode_score
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.vocab import ClassList

ODD = ClassList.of(
    ["a, b", 'it\'s "so"', "<b>&amp;</b>", "x: #1", "ignore", "yes", "{0} %s \\n", "crème 猫"]
)
"""Class names that a careless writer of some format would spoil."""
NESTED = "deep/er/b c.png"
HOSTILE = ("../up.jpg", "a\nb\t'\"<&>.jpg", "x" * 300 + ".jpg", "/root.jpg", "con.jpg")


def blobs(size_hw: tuple[int, int], seed: int, n_classes: int = len(ODD)) -> np.ndarray:
    """A label map with regions of all shapes: with holes, islands, lines, single pixels, 255."""
    rng = np.random.default_rng(seed)
    height, width = size_hw
    label_HW = np.zeros(size_hw, np.uint8)
    y_HW, x_HW = np.mgrid[:height, :width]
    for _ in range(12):
        y, x, r = rng.integers(height), rng.integers(width), rng.integers(2, 14)
        inside = (y_HW - y) ** 2 + (x_HW - x) ** 2 < r * r
        hole = (y_HW - y) ** 2 + (x_HW - x) ** 2 < (r / 2) ** 2
        label_HW[inside & ~(hole & bool(rng.integers(2)))] = rng.integers(1, n_classes)
    label_HW[rng.random(size_hw) < 0.01] = rng.integers(0, n_classes)
    label_HW[-1, : width // 2] = 1
    label_HW[0, 0], label_HW[-1, -1] = 2, n_classes - 1
    label_HW[height // 2 : height // 2 + 3, width // 3 : width // 3 + 5] = 255
    return label_HW


def put_run(
    folder: Path,
    maps: Mapping[str, np.ndarray],
    classes: ClassList = ODD,
    *,
    score: float | np.ndarray = 0.8,
    gone: tuple[str, ...] = (),
    per_part: int = 2,
) -> Labels:
    """A run with these label maps by image id, and images of their sizes, named by number."""
    rows, ids = [], list(maps)
    (folder / "images").mkdir(parents=True)
    for number, image_id in enumerate(ids):
        label_HW = maps[image_id]
        uri = folder / "images" / f"{number}.png"
        if image_id not in gone:
            Image.fromarray(np.full((*label_HW.shape, 3), number, np.uint8)).save(uri)
        rows.append(
            {
                "image_id": image_id,
                "uri": str(uri),
                "width": label_HW.shape[1],
                "height": label_HW.shape[0],
                "label_png": encode_png(label_HW),
                "score_png": encode_score(np.broadcast_to(np.float32(score), label_HW.shape)),
                "class_px": np.bincount(label_HW.ravel(), minlength=256)[: len(classes)].tolist(),
                "source": "zeroshot",
                "confidence": 0.5 if number else float("nan"),
            }
        )
    run = RunFolder(str(folder / "run"))
    for first in range(0, len(rows), per_part):
        some = rows[first : first + per_part]
        table = pa.Table.from_pylist(some, schema=LABELS)
        run.write_part("labels", part_name(r["image_id"] for r in some), table, {})
    keys = {key: {} for key in ("config", "resolved", "weights")}
    run.write_run({**keys, "classes": classes.to_dict(), "labels_state": "complete"})
    return Labels(run.uri)


def odd_maps() -> dict[str, np.ndarray]:
    """Label maps of awkward sizes and ids, one without any label, one without any pixel left."""
    ids = ["a.jpg", "a.png", "A.JPG", NESTED, *HOSTILE]
    maps = {i: blobs((37 + 3 * n, 61 - 2 * n), n) for n, i in enumerate(ids)}
    maps["empty.jpg"] = np.zeros((5, 4), np.uint8)
    maps["full.jpg"] = np.full((6, 3), len(ODD) - 1, np.uint8)
    maps["nothing known.jpg"] = np.full((3, 7), 255, np.uint8)
    maps["one.jpg"] = np.ones((1, 1), np.uint8)
    return maps
