"""Ultralytics' segmentation layout: images/SPLIT/, labels/SPLIT/*.txt with polygons, data.yaml.

Enters: label maps. Leaves: a line a region, `class x1 y1 x2 y2 ...`, the class counted from 0
without background, points as shares of width and height, as Ultralytics' own converter writes them
(the point of a pixel is its index). A class of several parts is a line each. Holes are cut in: the
polygon goes along a seam from the outline to the hole, around it, and back. (Ultralytics' own
converter fills holes.) Drawn by cv2.fillPoly, as Ultralytics draws them, polygons give their pixels
back. The format cannot say that a pixel has no label: those (255) become background.

Shapes: h, w pixels of a region's box; P points.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import cv2
import numpy as np
import yaml

from zsplg_ray.views.export.job import Item, Job, things
from zsplg_ray.views.export.regions import Region, regions

_DECIMALS = 1_000_000


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
        data_yaml = shlex.quote(f"data={self.job.out}/data.yaml")
        return f"yolo segment train {data_yaml} model=yolo11n-seg.pt"


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
    """One polygon of a connected mask, holes cut in: int [P, 2] of x, y, P >= 3.

    From the leftmost pixel around a hole a seam goes to the left, as far as the mask does. Where it
    ends there is the outline, or the edge of a hole that reaches farther to the left; so every hole
    hangs on another or on the outline, and no seam leaves the mask.
    """
    contours, levels = cv2.findContours(
        mask_hw.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    rings = [contour[:, 0] for contour in contours]
    outer = [level[3] < 0 for level in levels[0]]
    holes = [ring for ring, is_outer in zip(rings, outer, strict=True) if not is_outer]
    holes.sort(key=lambda ring: int(ring[:, 0].min()))
    rings = [rings[outer.index(True)], *holes]
    owner_hw, place_hw = (np.full(mask_hw.shape, -1, np.int64) for _ in range(2))
    for number in reversed(range(len(rings))):  # of several rings of a pixel the first one counts
        x_P, y_P = rings[number].T
        owner_hw[y_P, x_P], place_hw[y_P, x_P] = number, np.arange(len(x_P))
    hanging: list[list[tuple[int, np.ndarray]]] = [[] for _ in rings]
    for number in range(len(rings) - 1, 0, -1):
        ring_P2 = rings[number]
        first = int(ring_P2[:, 0].argmin())
        x, y = ring_P2[first].tolist()
        ways = [((place - first) % len(ring_P2), hole) for place, hole in hanging[number]]
        around_P2 = _joined(np.concatenate([ring_P2[first:], ring_P2[: first + 1]]), ways)
        leftwards = mask_hw[y, x::-1]
        end = x if leftwards.all() else int(leftwards.argmin()) - 1
        parent = int(owner_hw[y, x - end])
        assert 0 <= parent < number, "a seam that ends nowhere"
        hanging[parent].append((int(place_hw[y, x - end]), around_P2))
    corner_P2 = _corners(_joined(rings[0], hanging[0]))
    # Again from the start: a point or a line is a polygon too.
    return np.resize(corner_P2, (3, 2)) if len(corner_P2) < 3 else corner_P2


def _joined(ring_P2: np.ndarray, ways: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """A ring with ways inserted: from the point at each place along it and back to that point."""
    pieces, start = [], 0
    for place, way_P2 in sorted(ways, key=lambda way: way[0]):
        pieces += [ring_P2[start : place + 1], way_P2]
        start = place
    return np.concatenate([*pieces, ring_P2[start:]])


def _corners(outline_P2: np.ndarray) -> np.ndarray:
    """The points at which an outline turns."""
    moved = (outline_P2 != np.roll(outline_P2, 1, axis=0)).any(axis=1)
    outline_P2 = outline_P2[moved] if moved.any() else outline_P2[:1]
    before_P2 = outline_P2 - np.roll(outline_P2, 1, axis=0)
    after_P2 = np.roll(outline_P2, -1, axis=0) - outline_P2
    cross_P = before_P2[:, 0] * after_P2[:, 1] - before_P2[:, 1] * after_P2[:, 0]
    same_way_P = (before_P2 * after_P2).sum(axis=1) > 0
    return outline_P2[~((cross_P == 0) & same_way_P)]
