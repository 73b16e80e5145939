"""Ultralytics' segmentation layout: images/SPLIT/, labels/SPLIT/*.txt with polygons, data.yaml.

Enters: label maps. Leaves: a line a region, `class x1 y1 x2 y2 ...`, the class counted from 0
without background, points as shares of width and height, as Ultralytics' own converter writes them
(the point of a pixel is its index). A class of several parts is a line each. Holes are cut in: the
polygon goes along a seam from the outline to the hole, around it, and back. (Ultralytics' own
converter fills holes.) Drawn by cv2.fillPoly, as Ultralytics draws them, polygons give their pixels
back. The format cannot say that a pixel has no label: those (255) become background.

Shapes: P, Q points.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np
import yaml

from zsplg_ray.views.export.job import Item, Job, things
from zsplg_ray.views.export.regions import Region, regions

_DECIMALS = 1_000_000
_MOST_PAIRS = 4_000_000


class YoloWriter:
    """Writes polygons."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def entry(self, item: Item) -> int:
        """The polygons of an image, in a file that is empty if there are none; how many."""
        found = regions(item.label_HW, "components", self.job.options.min_area_px)
        lines = [_line(region, item.size_hw) for region in found]
        self.job.write(f"labels/{item.split}/{item.name}.txt", "".join(lines))
        return len(lines)

    def finish(self, entries: Iterable[tuple[Item, int]]) -> str:
        """The description of the data set; without a validation split the training one is both."""
        self.job.told["instances"] = sum(count for _, count in entries)
        for split in self.job.splits:
            (self.job.folder / f"images/{split}").mkdir(parents=True, exist_ok=True)
        names = {index - 1: name for index, name in things(self.job.classes)}
        data = {"train": "images/train", "val": f"images/{self.job.splits[-1]}", "names": names}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
        self.job.write("data.yaml", "# Paths are relative to the folder of this file.\n" + text)
        return f"yolo segment train data={self.job.out}/data.yaml model=yolo11n-seg.pt"


def _line(region: Region, size_hw: tuple[int, int]) -> str:
    """The line of a connected region."""
    point_P2 = polygon(region.mask_hw) + np.array([region.left, region.top])
    side_2 = np.array(size_hw[::-1])
    share_P2 = np.rint(point_P2 / side_2 * _DECIMALS) / _DECIMALS
    # Ultralytics cuts off what stands behind the point: 0.333333 of 9 would be pixel 2, not 3.
    short_P2 = (np.float32(share_P2) * np.float32(side_2)).astype(np.int64) < point_P2
    share_P2 += short_P2 / _DECIMALS
    text = " ".join(f"{v:.6f}".rstrip("0").rstrip(".") for v in share_P2.ravel().tolist())
    return f"{region.index - 1} {text}\n"


def polygon(mask_hw: np.ndarray) -> np.ndarray:
    """One polygon of a connected mask, holes cut in: int64 [P, 2] of x, y, P >= 3."""
    contours, levels = cv2.findContours(
        mask_hw.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    rings = [contour[:, 0].astype(np.int64) for contour in contours]
    outline_P2 = next(r for r, level in zip(rings, levels[0], strict=True) if level[3] < 0)
    holes = [r for r, level in zip(rings, levels[0], strict=True) if level[3] >= 0]
    for hole_Q2 in sorted(holes, key=lambda ring: tuple(ring.min(axis=0))):
        outline_P2 = _with_hole(outline_P2, hole_Q2)
    corner_P2 = _corners(outline_P2)
    # Again from the start: a point or a line is a polygon too.
    return np.resize(corner_P2, (3, 2)) if len(corner_P2) < 3 else corner_P2


def _with_hole(outline_P2: np.ndarray, hole_Q2: np.ndarray) -> np.ndarray:
    """The outline with a way to the hole, around it and back, where both are nearest."""
    step = max(1, len(outline_P2) * len(hole_Q2) // _MOST_PAIRS)  # of a huge hole not every point
    some_Q2 = hole_Q2[::step]
    distance_PQ = np.abs(outline_P2[:, None] - some_Q2[None]).max(axis=2)
    p, q = np.unravel_index(int(distance_PQ.argmin()), distance_PQ.shape)
    q = int(q) * step
    around_Q2 = np.concatenate([hole_Q2[q:], hole_Q2[: q + 1]])
    return np.concatenate([outline_P2[: p + 1], around_Q2, outline_P2[p:]])


def _corners(outline_P2: np.ndarray) -> np.ndarray:
    """The points at which an outline turns."""
    moved = (outline_P2 != np.roll(outline_P2, 1, axis=0)).any(axis=1)
    outline_P2 = outline_P2[moved] if moved.any() else outline_P2[:1]
    before_P2 = outline_P2 - np.roll(outline_P2, 1, axis=0)
    after_P2 = np.roll(outline_P2, -1, axis=0) - outline_P2
    cross_P = before_P2[:, 0] * after_P2[:, 1] - before_P2[:, 1] * after_P2[:, 0]
    same_way_P = (before_P2 * after_P2).sum(axis=1) > 0
    return outline_P2[~((cross_P == 0) & same_way_P)]
