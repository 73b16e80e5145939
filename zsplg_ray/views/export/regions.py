"""Label maps -> regions: connected parts, or all of a class; and COCO's run lengths of them.

Enters: uint8 [H, W] label maps, 255 = ignore. Leaves: `Region`s, masks cut to their boxes. Regions
do not overlap, so they give the map back in any order.

Shapes: H, W pixels of the image; h, w of a region's box.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle_codec

from zsplg_ray.config.export import Instances
from zsplg_ray.records import IGNORE

_compress: Any = rle_codec.frPyObjects


@dataclass(frozen=True, eq=False)
class Region:
    """Some pixels of one class."""

    index: int
    """The class."""
    left: int
    top: int
    mask_hw: np.ndarray
    """bool [h, w], cut to the box, which has a pixel on each side."""
    area_px: int

    @property
    def box_xywh(self) -> list[int]:
        """Left, top, width, height in pixels."""
        height, width = self.mask_hw.shape
        return [self.left, self.top, width, height]


def regions(
    label_HW: np.ndarray,
    instances: Instances,
    min_area_px: int | None = None,
    *,
    ignore: bool = False,
) -> list[Region]:
    """The regions of a label map by class, in reading order of their first pixels.

    Args:
        label_HW: uint8 [H, W].
        instances: Connected parts (8 neighbours), or all of a class.
        min_area_px: Leave out smaller ones. None: none.
        ignore: Also give what has no label, as class 255.
    """
    found: list[Region] = []
    present = np.flatnonzero(np.bincount(label_HW.ravel(), minlength=IGNORE + 1))
    for index in present.tolist():
        if index == 0 or (index == IGNORE and not ignore):
            continue
        mask_HW = (label_HW == index).view(np.uint8)
        left, top, width, height = cv2.boundingRect(mask_HW)
        mask_hw = np.ascontiguousarray(mask_HW[top : top + height, left : left + width])
        if instances == "classes" or index == IGNORE:
            found.append(Region(index, left, top, mask_hw.view(bool), int(mask_hw.sum())))
            continue
        _, part_hw, stats, _ = cv2.connectedComponentsWithStats(mask_hw, connectivity=8)
        for part, (x, y, wide, high, area) in enumerate(stats[1:].tolist(), start=1):
            cut = part_hw[y : y + high, x : x + wide] == part
            found.append(Region(index, left + x, top + y, cut, area))
    return [r for r in found if r.index == IGNORE or r.area_px >= (min_area_px or 0)]


def coco_rle(region: Region, size_hw: tuple[int, int]) -> dict[str, Any]:
    """The region's mask in the whole image as COCO's compressed run lengths, ready for JSON."""
    height, width = size_hw
    edge = np.diff(np.pad(region.mask_hw.T.view(np.int8), ((0, 0), (1, 1))), axis=1)
    offset = (np.arange(region.left, region.left + edge.shape[0]) * height + region.top)[:, None]
    at = offset + np.arange(edge.shape[1])
    # Where a run ends as the next column's begins, both are one: the first and last row are in it.
    bounds = np.stack([at[edge == 1], at[edge == -1]], axis=1).ravel()
    twice = np.flatnonzero(bounds[1:] == bounds[:-1])
    bounds = np.delete(bounds, np.concatenate([twice, twice + 1]))
    counts = np.diff(bounds, prepend=0, append=height * width).tolist()
    counts = counts if counts[-1] else counts[:-1]
    rle = _compress({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
