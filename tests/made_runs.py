"""Runs' folders made without SAM, CLIP and Ray: known images and known labels."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from zsplg_ray.records import LABELS, encode_png
from zsplg_ray.rundir import RunFolder, part_name
from zsplg_ray.vocab import ClassList

CLASSES = ClassList.of(["a, b", "<b>dog</b>", "cat"])
"""Names that would do harm if they were taken for something else."""


@dataclass
class MadeRun:
    """What `made_run` made."""

    uri: str
    maps: dict[str, np.ndarray]
    images: dict[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def folder(self) -> RunFolder:
        """Its folder."""
        return RunFolder(self.uri)


def made_run(
    tmp_path: Path, ids: list[str], per_part: int, classes: ClassList = CLASSES, seed: int = 0
) -> MadeRun:
    """Noise images in tmp_path/images, labels of all classes and 255 in tmp_path/run.

    The score of each pixel of an image is its position among the sorted ids, out of 255.
    """
    rng = np.random.default_rng(seed)
    made = MadeRun(str(tmp_path / "run"), {}, {}, {"fingerprint": "f", "labels_fingerprint": "l"})
    made.meta["classes"] = classes.to_dict()
    values = np.array([*range(len(classes)), 255], np.uint8)
    rows = []
    for number, image_id in enumerate(ids):
        size_hw = (6 + number, 9)
        label_HW = values[rng.integers(0, len(values), size_hw)]
        image_HWC = rng.integers(0, 256, (*size_hw, 3)).astype(np.uint8)
        path = tmp_path / "images" / image_id
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(path)
        made.maps[image_id], made.images[image_id] = label_HW, image_HWC
        score_HW = np.full(size_hw, sorted(ids).index(image_id), np.uint8)
        rows.append(
            {
                "image_id": image_id,
                "uri": str(path),
                "width": size_hw[1],
                "height": size_hw[0],
                "label_png": encode_png(label_HW),
                "score_png": encode_png(score_HW),
                "class_px": [int((label_HW == k).sum()) for k in range(len(classes))],
                "source": "zeroshot",
                "confidence": 0.5,
            }
        )
    for start in range(0, len(rows), per_part):
        some = rows[start : start + per_part]
        name = part_name(row["image_id"] for row in some)
        table = pa.Table.from_pylist(some, schema=LABELS)
        made.folder.write_part("labels", name, table, made.meta)
    return made
